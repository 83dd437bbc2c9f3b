"""Checks of the recorded cases of BLIP-2 with a language model; `test_reference.py` runs them.

Where the original knowingly differs from ours, that is set here: its `predict_answers` took length_penalty 0 with OPT
and Vicuna, its OPT cut prompts, and its ranking of candidates took any length.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from reference_case import REFERENCE, Case, blip2_sizes, close, close_gradients
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.nn.decoding import Decoded

LANGUAGE_MODEL_KEY = {"blip2_opt": "opt_model", "blip2_t5": "t5_model", "blip2_t5_instruct": "t5_model"}
ANSWER_LENGTH_PENALTY = {"blip2_opt": 0.0, "blip2_vicuna_instruct": 0.0}
AS_THE_ORIGINAL: dict[str, dict[str, Any]] = {"blip2_opt": {"cut_prompts": True}}
ANY_LENGTH = 10_000
"""Tokens that a candidate may have: the original cut and refused none."""


@contextmanager
def language_model_folder(llm: dict[str, Any]) -> Iterator[str]:
    """The case's language model as a folder: the reference's, or with other sizes one of its tokenizer and the changed
    config, without weights, which the case has.
    """
    folder = REFERENCE / llm["folder"]
    if not llm["config_overrides"]:
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        changed = Path(place) / folder.name
        shutil.copytree(folder, changed, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        config = json.loads((folder / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps(config | llm["config_overrides"]))
        yield str(changed)


def language_model(case: Case, **settings: Any) -> Any:
    """The case's model in evaluation mode with its weights."""
    arch, llm = case.config["_arch"], case.config["_explicit"]["llm"]
    names = {"max_txt_len", "max_output_txt_len", "qformer_text_input", "prompt"} & case.config.keys()
    given = {name: case.config[name] for name in names} | AS_THE_ORIGINAL.get(arch, {}) | settings
    with language_model_folder(llm) as folder:
        given[LANGUAGE_MODEL_KEY.get(arch, "llm_model")] = folder
        model = registry.get_model_class(arch)(**blip2_sizes(case), **given).eval()
    # Llama's rotary frequencies follow from its config; transformers has long stopped to save them
    weights = {name: value for name, value in case.weights.items() if not name.endswith("rotary_emb.inv_freq")}
    model.load_state_dict(weights)
    return model


def check_blip2_opt(case: Case, monkeypatch: Any) -> None:
    image = case.inputs["image"]
    for kind, prompt in (("prompt", case.config["prompt"]), ("noprompt", "")):
        model = language_model(case, prompt=prompt)
        batch = model.llm_tokenizer.caption_batch(case.facts[f"text_input_{kind}"], model.prompt)
        num_queries = case.config["num_query_token"]
        unlabelled = torch.full((len(image), num_queries), -100)
        assert torch.cat([unlabelled, batch.labels], dim=1).tolist() == case.facts[f"labels_{kind}"]
        seen = model.image_embeds({"image": image}, [prompt] * len(image))
        embeds, mask = model.concat_embeds(seen, batch.ids, batch.mask)
        assert mask.tolist() == case.facts[f"attention_mask_{kind}"]
        close(seen, case.outputs["inputs_opt"])
        logits = model.lm.logits(embeds, mask, batch.labels)
        close(logits, case.outputs[f"logits_{kind}"][:, num_queries - 1 : -1])
        loss = model({"image": image, "text_input": case.facts[f"text_input_{kind}"]})["loss"]
        close(loss, case.facts[f"loss_{kind}"])
        if kind == "prompt":
            check_gradients(case, model, loss)
            check_all_written(case, model, monkeypatch)
    assert model.lm.end_id == case.facts["eos_token_id"]


def check_blip2_t5(case: Case, monkeypatch: Any) -> None:
    model, samples = language_model(case), training_samples(case)
    check_answer_batch(case, model, samples)
    check_gradients(case, model, model(samples)["loss"])
    check_all_written(case, model, monkeypatch)


def check_blip2_instruct(case: Case, monkeypatch: Any) -> None:
    check_blip2_t5(case, monkeypatch)
    model = language_model(case, max_output_txt_len=ANY_LENGTH)
    for name in case.config["cls"]:
        check_classes(model, case.facts[f"predict_class_{name}"], case.inputs)


def training_samples(case: Case) -> dict[str, Any]:
    """The case's questions and answers."""
    return {"image": case.inputs["image"], **{key: case.config[key] for key in ("text_input", "text_output")}}


def check_answer_batch(case: Case, model: Any, samples: dict[str, Any]) -> None:
    """Labels, masks, what the queries give, logits and loss of questions with answers."""
    close(model.encode_image(samples["image"]), case.outputs["image_embeds"])
    asked = samples["text_input"]
    batch = model.llm_tokenizer.answer_batch(asked, samples["text_output"])
    seen = model.image_embeds(samples, asked)
    close(seen, case.outputs["query_inputs_to_llm"])
    embeds, mask = model.concat_embeds(seen, batch.ids, batch.mask)
    longest = mask.shape[1]
    recorded = torch.tensor(case.facts["attention_mask"])
    assert mask.tolist() == recorded[:, :longest].tolist()
    assert not recorded[:, longest:].any(), "the original pads answers and questions separately"
    logits = model.lm.logits(embeds, mask, batch.labels)
    labels, expected = torch.tensor(case.facts["labels"]), case.outputs["logits"]
    if model.lm.is_encoder_decoder:
        decoder_mask = torch.tensor(case.facts["decoder_attention_mask"])
        assert batch.labels.tolist() == labels.tolist()
        assert (batch.labels != -100).long().tolist() == decoder_mask.tolist()
    else:
        first = seen.shape[1]
        assert (labels[:, :first] == -100).all()
        assert (labels[:, longest:] == -100).all()
        assert batch.labels.tolist() == labels[:, first:longest].tolist()
        expected = expected[:, first - 1 : longest - 1]
    close(logits[batch.labels != -100], expected[batch.labels != -100])
    close(model(samples)["loss"], case.facts["loss"])


def check_gradients(case: Case, model: Any, loss: Tensor) -> None:
    """Gradient norms; the frozen parts have none."""
    loss.backward()
    close_gradients(model, case.facts["grad_norms"])
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(case.config["_meta"]["requires_grad"]["frozen_prefixes"])
    assert sum(p.requires_grad for p in model.parameters()) == case.config["_meta"]["requires_grad"]["n_trainable"]


def check_all_written(case: Case, model: Any, monkeypatch: Any) -> None:
    """Every recorded call of `generate` and `predict_answers`."""
    for name in case.config["gen"]:
        check_written(model, case.facts[f"generate_{name}"], case.inputs["image"], monkeypatch)
    for name in case.config.get("gen_video", {}):
        check_written(model, case.facts[f"generate_{name}"], case.inputs["video"], monkeypatch)
    defaults = {"length_penalty": ANSWER_LENGTH_PENALTY.get(case.config["_arch"], -1.0)}
    for name in case.config["ans"]:
        check_written(model, case.facts[f"predict_answers_{name}"], case.inputs["image"], monkeypatch, defaults)


def check_written(
    model: Any, expected: dict[str, Any], image: Tensor, monkeypatch: Any, defaults: dict[str, Any] | None = None
) -> None:
    """Strings and ids of one call, and the prompts that were read."""
    write = model.generate if defaults is None else model.predict_answers
    seen: dict[str, Any] = {}
    generate, asked = model.lm.generate, model.prompt_embeds

    def recorded_ids(*args: Any) -> Decoded:
        seen["ids"] = generate(*args)
        return seen["ids"]

    def recorded_prompts(samples: dict[str, Any], prompts: list[str], **settings: Any) -> Any:
        seen["prompts"] = prompts
        return asked(samples, prompts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(model.lm, "generate", recorded_ids)
        patch.setattr(model, "prompt_embeds", recorded_prompts)
        texts = write({"image": image, **expected["samples"]}, **{**(defaults or {}), **expected["kwargs"]})
    end = model.lm.end_id
    rows = [until_end(row, end) for row in seen["ids"].ids.tolist()]
    assert rows == [until_end(row, end) for row in expected["ids"]]
    recorded_texts = expected["captions" if defaults is None else "answers"]
    for row, text, recorded in zip(rows, texts, recorded_texts, strict=True):
        assert text == recorded.strip() or has_adjacent_bytes(model.llm_tokenizer.tokenizer.convert_ids_to_tokens(row))
    if expected.get("llm_prompts"):
        assert seen["prompts"] == expected["llm_prompts"]


def has_adjacent_bytes(tokens: list[str]) -> bool:
    """Whether two pieces of single bytes follow one another, which sentencepiece decodes one by one (so does the
    original) and transformers' tokenizers together.
    """
    is_byte = [token.startswith("<0x") for token in tokens]
    return any(a and b for a, b in itertools.pairwise(is_byte))


def until_end(row: list[int], end: int) -> list[int]:
    """Ids behind the start token up to and with the first end token."""
    return row[1 : row.index(end, 1) + 1] if end in row[1:] else row[1:]


def check_classes(model: Any, expected: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    """Ranks and losses of the candidates.

    The original divides Vicuna's by positions that include a shorter prompt's padding, if all samples have the same
    candidates: ours are larger by one factor a sample, none for the longest prompt.
    """
    samples = {"image": inputs[expected["image"]], **expected["samples"]}
    candidates, n_segments = expected["candidates"], expected["n_segments"]
    ranks = model.predict_class(samples, candidates, n_segments)
    assert (ranks if isinstance(ranks, list) else ranks.tolist()) == expected["ranks"]
    losses, factors = model.class_losses(samples, candidates, n_segments), []
    for own, recorded in zip(losses, map(torch.tensor, expected["candidate_losses"]), strict=True):
        factors.append(float(own[0] / recorded[0]))
        close(own[: len(recorded)], recorded * factors[-1])
        assert (own[len(recorded) :] == torch.inf).all()
    without_padding = model.family.score_without_eos and n_segments == 1 and isinstance(candidates[0], str)
    close(
        torch.tensor(min(factors) if without_padding else factors), torch.ones(() if without_padding else len(factors))
    )
