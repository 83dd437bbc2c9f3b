"""Every recorded case of the original implementation, found under `cases/` of the reference folder.

Tolerances: losses, logits and features 1e-4 relative (to the largest value), gradient norms 1e-3, queues and momentum
weights 1e-5, ids and strings exact.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_blip2 import check_blip2_instruct, check_blip2_opt, check_blip2_t5
from reference_case import REFERENCE, Case, blip2_sizes, close, close_gradients, up_to_end
from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.nn import losses
from lavis_lite.nn.encoders import build_encoder
from lavis_lite.nn.vision import BlipViT, ViTConfig, interpolate_pos_embed

CASES = sorted(path.name for path in (REFERENCE / "cases").iterdir() if path.is_dir())


def check_vit(case: Case) -> None:
    sizes = case.config["vit"]
    explicit = case.config["_explicit"]["vit"]

    def build(image_size: int) -> BlipViT:
        return BlipViT(
            ViTConfig(
                image_size=image_size,
                patch_size=sizes["patch"],
                width=sizes["width"],
                depth=sizes["depth"],
                num_heads=sizes["heads"],
                norm_eps=explicit["norm_eps"],
                mlp_ratio=explicit["mlp_ratio"],
            )
        ).eval()

    vit = build(sizes["img"])
    vit.load_state_dict(case.weights)
    close(vit(case.inputs["image"]), case.outputs["features"])
    for size in ("big", "small"):
        other = build(case.config[f"img_{size}"])
        resized = interpolate_pos_embed(case.weights["pos_embed"], other.pos_embed.shape[1])
        close(resized, case.outputs[f"pos_embed_{size}"])
        other.load_state_dict({**case.weights, "pos_embed": resized})
        close(other(case.inputs[f"image_{size}"]), case.outputs[f"features_{size}"])


def check_encoder(case: Case, name: str, positions: str) -> None:
    """Tokens at two image sizes from the same weights."""
    vit = case.config["vit"]
    sizes = {"width": vit["width"], "depth": vit["depth"], "num_heads": vit["heads"], "patch_size": vit["patch"]}
    sizes |= {key: case.config["_explicit"]["vit"][key] for key in ("mlp_ratio", "norm_eps")}
    for suffix, image_size in (("", vit["img"]), ("_big", case.config["img_big"])):
        encoder = build_encoder(name, image_size=image_size, sizes=sizes).eval()
        state = encoder.adapt_state_dict(case.weights)
        if suffix:
            close(state[positions], case.outputs["pos_embed_big"])
        encoder.load_state_dict(state)
        close(encoder(case.inputs[f"image{suffix}"]), case.outputs[f"features{suffix}"])


def check_eva_vit(case: Case) -> None:
    check_encoder(case, "eva_tiny", "pos_embed")


def check_clip_vit(case: Case) -> None:
    check_encoder(case, "clip_tiny", "positional_embedding")


def check_caption(case: Case) -> None:
    image = case.inputs["image"]
    for kind, prompt in (("prompt", case.config["prompt"]), ("noprompt", "")):
        model = case.model("blip_caption", "max_txt_len", prompt=prompt)
        close(model.visual_encoder(image), case.outputs["image_embeds"])
        texts = case.facts[f"text_input_{kind}"]
        assert len(model.tokenizer(prompt).input_ids) - 1 == case.facts[f"prompt_length_{kind}"]
        ids, _ = model.tokenize(texts, start=model.decoder_start, max_length=model.max_txt_len)
        assert model.labels(ids, len(model.tokenizer(prompt).input_ids) - 1).tolist() == case.facts[f"labels_{kind}"]
        loss = model({"image": image, "text_input": texts})["loss"]
        close(loss, case.facts[f"loss_{kind}"])
        if kind == "prompt":
            loss.backward()
            close_gradients(model, case.facts["grad_norms"])
        for name in case.config["gen"]:
            check_captions(model, image, case.facts[f"generate_{kind}_{name}"])


def check_captions(model: Any, image: Tensor, expected: dict[str, Any]) -> None:
    """Strings and ids of one way to generate."""
    from lavis_lite.nn.decoding import GenerationConfig, decode

    captions = model.generate({"image": image}, **expected["kwargs"])
    assert captions == [caption.strip() for caption in expected["captions"]]
    end = model.tokenizer.sep_token_id
    context = model.text_decoder.bert.project_kv(model.visual_encoder(image))
    start, _ = model.tokenize([model.prompt] * len(image), start=model.decoder_start)
    ids = decode(model.step(context), start[:, :-1], model.decoding(GenerationConfig(**expected["kwargs"]))).ids
    assert [up_to_end(row, end) for row in ids.tolist()] == [up_to_end(row, end) for row in expected["ids"]]


def check_vqa(case: Case) -> None:
    model = case.model("blip_vqa", "max_txt_len", decoder_sees_padding=True)
    samples = {
        "image": case.inputs["image"],
        "text_input": case.config["questions"],
        "answer": case.config["answers"],
        "weight": torch.tensor(case.config["weight"]),
        "n_answers": torch.tensor(case.config["n_answers"]),
    }
    states, mask = model.encode_questions(samples)
    close(states, case.outputs["question_states"])
    ids, _ = model.tokenize(samples["answer"], start=model.decoder_start)
    assert model.labels(ids).tolist() == case.facts["labels"]
    context = model.text_decoder.bert.project_kv(states, mask=mask)
    question = torch.arange(len(samples["n_answers"])).repeat_interleave(samples["n_answers"])
    close(model.answer_loss(ids, context.select(question)), torch.tensor(case.facts["per_answer_loss"]))
    loss = model(samples)["loss"]
    close(loss, case.facts["loss"])
    loss.backward()
    close_gradients(model, case.facts["grad_norms"])
    for name in case.config["gen"]:
        expected = case.facts[f"generate_{name}"]
        assert model.predict_answers(samples, inference_method="generate", **expected["kwargs"]) == expected["answers"]
    for k in case.config["rank_k"]:
        check_ranks(model, samples, case.config["answer_list"], case.facts[f"rank_{k}"])


def check_ranks(model: Any, samples: dict[str, Any], answers: list[str], expected: dict[str, Any]) -> None:
    """Candidates, their losses (in any order of equal first tokens) and the chosen answers."""
    k = min(expected["num_ans_candidates"], len(answers))
    with torch.no_grad():
        order, losses = model.rank_answers(samples, samples["text_input"], answers, k)
    for row in range(len(order)):
        actual = dict(zip(order[row].tolist(), losses[row].tolist(), strict=True))
        recorded = dict(zip(expected["topk_ids"][row], expected["neg_log_prob"][row], strict=True))
        assert actual.keys() == recorded.keys()
        for answer, loss in recorded.items():
            close(actual[answer], loss)
    kwargs = {"num_ans_candidates": expected["num_ans_candidates"], "answer_list": answers}
    assert model.predict_answers(samples, inference_method="rank", **kwargs) == expected["answers"]


def check_itm(case: Case) -> None:
    model = case.model("blip_image_text_matching", "embed_dim", "max_txt_len")
    samples = {"image": case.inputs["image"], "text_input": case.config["captions"]}
    close(model(samples, match_head="itm"), case.outputs["itm_logits"])
    close(model(samples, match_head="itc"), case.outputs["itc_sim"])


def check_feature_extractor(case: Case) -> None:
    limit = case.text_transformer("med")["max_positions"]  # the original cuts no text here
    model = case.model("blip_feature_extractor", "embed_dim", max_txt_len=limit)
    samples = {"image": case.inputs["image"], "text_input": case.config["captions"]}
    for mode in ("image", "text", "multimodal"):
        expected = {name.split("/")[1]: value for name, value in case.outputs.items() if name.startswith(f"{mode}/")}
        actual = model.extract_features(samples, mode=mode)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            close(actual[name], value)


def check_nlvr(case: Case) -> None:
    model = case.model("blip_nlvr", "num_classes")
    samples = {name: case.inputs[name] for name in ("image0", "image1", "label")} | {
        "text_input": case.config["captions"]
    }
    close(model.states(samples), case.outputs["hidden"])
    close(model.predict(samples)["predictions"], case.outputs["logits"])
    loss = model(samples)["loss"]
    close(loss, case.facts["loss"])
    loss.backward()
    close_gradients(model, case.facts["grad_norms"])


def check_classification(case: Case) -> None:
    model = case.model("blip_classification", "num_classes", "momentum", "alpha", "max_txt_len")
    epoch, step, per_epoch = case.config["schedule"]
    samples = {
        "image": case.inputs["image"],
        "label": case.inputs["label"],
        "text_input": case.config["captions"],
        "epoch": epoch,
        "iters": step,
        "num_iters_per_epoch": per_epoch,
    }
    output = model(samples)
    close(output["loss"], case.facts["loss"])
    close(output["logits"], case.outputs["logits"])
    ids, mask = model.tokenize(samples["text_input"], max_length=model.max_txt_len)
    close(model.momentum_logits(samples["image"], ids, mask, update=False), case.outputs["logits_m"])
    close(model.predict(samples)["predictions"], case.outputs["predict_logits"])
    output["loss"].backward()
    close_gradients(model, case.facts["grad_norms"])
    close_state(model, case, "after/")


def close_state(model: nn.Module, case: Case, prefix: str) -> None:
    """Recorded weights of the momentum twin within 1e-5."""
    state = model.state_dict()
    for name, value in case.outputs.items():
        if name.startswith(prefix):
            close(state[name.removeprefix(prefix)], value, 1e-5)


class Recorder:
    """Keeps the intermediate results that the case recorded, by wrapping methods of the model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, Any] = {}
        from lavis_lite.models.blip import momentum as blip_momentum

        def keep(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                self.seen.setdefault(name, []).append((args, result))
                return result

            return wrapped

        monkeypatch.setattr(blip_momentum, "soft_cross_entropy", keep("itc", blip_momentum.soft_cross_entropy))
        monkeypatch.setattr(blip_momentum, "draw_negatives", keep("negatives", blip_momentum.draw_negatives))
        monkeypatch.setattr(model, "pair_logits", keep("itm", model.pair_logits))


def check_momentum_steps(case: Case, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two training forwards: losses, similarities, targets, negatives, queues, momentum weights; gradients of the
    first.
    """
    for number, suffix in enumerate(("", "_step2")):
        epoch, step, per_epoch = case.config["schedule"][number]
        samples = {
            "image": case.inputs[f"image{suffix}"],
            "text_input": case.config["captions"][number],
            "epoch": epoch,
            "iters": step,
            "num_iters_per_epoch": per_epoch,
        }
        if f"image_id{suffix}" in case.inputs:
            samples["image_id"] = case.inputs[f"image_id{suffix}"]
        close(model.image_queue, case.outputs[f"image_queue_before{suffix}"], 1e-5)
        with monkeypatch.context() as patch:
            seen = Recorder(model, patch).seen
            output = model(samples)
        expected = case.facts[f"step{number}"]
        for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
            if name in expected:
                close(output[name], expected[name])
        (i2t, _), (t2i, _) = seen["itc"]
        check_similarities(case, suffix, i2t, t2i)
        drawn = [row for _, result in seen["negatives"] for row in result.tolist()]
        assert drawn == [negative["idx"] for negative in expected["neg"]]
        close(seen["itm"][0][1], case.outputs[f"itm_logits{suffix}"])
        for queue in ("image_queue", "text_queue"):
            close(getattr(model, queue), case.outputs[f"{queue}_after{suffix}"], 1e-5)
        assert model.queue_ptr.tolist() == expected["queue_ptr_after"]
        if "idx_queue_after" in expected:
            assert model.idx_queue.tolist() == expected["idx_queue_after"]
        close_state(model, case, f"after{suffix}/")
        if number == 0:
            output["loss"].backward()
            close_gradients(model, case.facts["grad_norms"])
            model.zero_grad()


def check_similarities(case: Case, suffix: str, i2t: tuple[Tensor, Tensor], t2i: tuple[Tensor, Tensor]) -> None:
    """Contrastive logits (whole, or the batch's columns where the case recorded those) and soft targets."""
    for direction, (logits, targets) in (("i2t", i2t), ("t2i", t2i)):
        recorded = case.outputs[f"sim_{direction}{suffix}"]
        if recorded.shape == logits.shape:
            close(logits, recorded)
        close(targets, case.outputs[f"sim_{direction}_targets{suffix}"])


def check_pretrain(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("queue_size", "alpha", "embed_dim", "momentum", "max_txt_len")
    check_momentum_steps(case, case.model("blip_pretrain", *settings), monkeypatch)


class EvaluationSet:
    """Images one a batch, as a retrieval loader yields them."""

    def __init__(self, images: Tensor, text: list[str]) -> None:
        self.images, self.text, self.dataset = images, text, self

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Any:
        return ({"image": image[None], "index": torch.tensor([i])} for i, image in enumerate(self.images))


def check_retrieval(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("queue_size", "alpha", "embed_dim", "momentum", "negative_all_rank", "max_txt_len")
    check_momentum_steps(case, case.model("blip_retrieval", *settings), monkeypatch)
    model = case.model("blip_retrieval", *settings)
    model.max_txt_len = 35  # the original's evaluation ignores max_txt_len
    loader = EvaluationSet(case.inputs["eval_images"], case.config["eval_texts"])
    for actual, name in zip(
        model.compute_sim_matrix(loader, case.config["k_test"]), ("score_i2t", "score_t2i"), strict=True
    ):
        recorded = case.outputs[name]
        assert ((torch.as_tensor(actual) == -100) == (recorded == -100)).all()
        chosen = recorded != -100
        close(torch.as_tensor(actual)[chosen], recorded[chosen])


def stage1_model(case: Case, arch: str) -> Any:
    """One of the first stage's models with the case's weights."""
    sizes = blip2_sizes(case) | {name: case.config[name] for name in ("embed_dim", "max_txt_len")}
    model = registry.get_model_class(arch)(**sizes).eval()
    model.load_state_dict(case.weights)
    return model


def check_blip2_qformer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = stage1_model(case, "blip2"), case.inputs["image"]
    close(model.encode_image(image), case.outputs["image_embeds"])
    captions = case.config["captions"]
    loss = check_stage1_losses(case, model, "pretrain", image, captions)
    loss.backward()
    close_gradients(model, case.facts["grad_norms"])
    for name in case.config["gen"]:
        check_stage1_captions(model, image, case.facts[f"generate_{name}"])
    check_score_matrices(case, model)
    with monkeypatch.context() as patch:  # the draw of these two is recorded as the likeliest negative
        likeliest = functools.partial(torch.topk, k=1, sorted=False)
        patch.setattr(losses, "draw", lambda weights: likeliest(weights).indices.squeeze(1))
        image, captions = case.inputs["image3"], case.config["captions3"]
        check_stage1_losses(case, model, "pretrain_bs3_argmax_neg", image, captions)
        ids = torch.tensor(case.config["image_ids3"])
        check_stage1_losses(case, model, "retrieval_ft", image, captions, image_id=ids)
    check_stage1_heads(case)


def check_stage1_losses(
    case: Case, model: Any, kind: str, image: Tensor, captions: list[str], **more: Tensor
) -> Tensor:
    """Losses and drawn negatives of one batch; returns the loss."""
    expected, draw, drawn = case.facts[kind], model.draw_negatives, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "draw_negatives", lambda *logits: drawn.append(draw(*logits)) or drawn[0])
        output = model({"image": image, "text_input": captions, **more})
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        close(output[name], expected[name])
    assert torch.cat(drawn[0]).tolist() == [negative["idx"] for negative in expected["neg"]]
    return output["loss"]


def check_stage1_captions(model: Any, image: Tensor, expected: dict[str, Any]) -> None:
    """Strings and ids of one way to generate."""
    from lavis_lite.nn.decoding import GenerationConfig, decode

    assert model.generate({"image": image}, **expected["kwargs"]) == [text.strip() for text in expected["captions"]]
    end, start = model.tokenizer.sep_token_id, torch.full((len(image), 1), model.decoder_start)
    ids = decode(
        model.step(model.caption_context(image)), start, model.decoding(GenerationConfig(**expected["kwargs"]))
    ).ids
    assert [up_to_end(row, end) for row in ids.tolist()] == [up_to_end(row, end) for row in expected["ids"]]


def check_score_matrices(case: Case, model: Any) -> None:
    """Re-ranked scores of a small gallery."""
    model.max_txt_len, kept = 35, model.max_txt_len  # the original's evaluation ignores max_txt_len
    loader = EvaluationSet(case.inputs["eval_images"], case.config["eval_texts"])
    matrices = model.compute_sim_matrix(loader, case.config["k_test"])
    model.max_txt_len = kept
    for actual, name in zip(map(torch.as_tensor, matrices), ("score_i2t", "score_t2i"), strict=True):
        recorded = case.outputs[name]
        assert ((actual == -100) == (recorded == -100)).all()
        chosen = recorded != -100
        close(actual[chosen], recorded[chosen])


def check_stage1_heads(case: Case) -> None:
    """Features, and both heads: the original answers pair by pair."""
    extractor, matcher = (stage1_model(case, f"blip2_{name}") for name in ("feature_extractor", "image_text_matching"))
    extractor.max_txt_len = case.text_transformer("qformer")["max_positions"]  # the original's features cut no text
    samples = {"image": case.inputs["image"], "text_input": case.config["captions"]}
    features = {name: value for name, value in case.outputs.items() if name.startswith("extract_features/")}
    for name, value in features.items():
        _, mode, key = name.split("/")
        close(extractor.extract_features(samples, mode=mode)[key], value)
    logits, sims = matcher(samples, match_head="itm"), matcher(samples, match_head="itc")
    for row in range(len(logits)):
        one = {"image": samples["image"][row : row + 1], "text_input": samples["text_input"][row]}
        for head, together in (("itm", logits[row][None]), ("itc", sims[row, row].reshape(1, 1))):
            close(matcher(one, match_head=head), case.outputs[f"{head}_head/{row}"])
            close(together, case.outputs[f"{head}_head/{row}"])


CHECKS: dict[str, Callable[..., None]] = {
    "blip_vit": check_vit,
    "eva_vit": check_eva_vit,
    "clip_vit": check_clip_vit,
    "blip_caption": check_caption,
    "blip_vqa": check_vqa,
    "blip_itm": check_itm,
    "blip_feature_extractor": check_feature_extractor,
    "blip_nlvr": check_nlvr,
    "blip_classification": check_classification,
    "blip_pretrain": check_pretrain,
    "blip_retrieval": check_retrieval,
    "blip2_qformer": check_blip2_qformer,
    "blip2_opt": check_blip2_opt,
    "blip2_t5": check_blip2_t5,
    "blip2_vicuna_instruct": check_blip2_instruct,
    "blip2_t5_instruct": check_blip2_instruct,
}


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the check of the case's architecture."""
    arch = case.config["_arch"]
    assert arch in CHECKS, f"no check for architecture {arch}"
    needs_patch = "monkeypatch" in inspect.signature(CHECKS[arch]).parameters
    CHECKS[arch](case, monkeypatch) if needs_patch else CHECKS[arch](case)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(name), monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_case_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, also the convolution of the patches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("cuda"):
        check(Case(name, device="cuda"), monkeypatch)


def test_cases_were_found() -> None:
    assert CASES, f"no case under {REFERENCE / 'cases'}"
