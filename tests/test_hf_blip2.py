"""BLIP-2 against transformers' own classes: recorded weights of the original at small sizes and random ones at full
width, written as a folder, which transformers then loads.

Tolerance: 1e-4 relative to the largest value, float32; generated ids are equal.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference_blip2 import language_model
from reference_case import REFERENCE, Case, blip2_sizes, close
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.convert.folders import write_folder
from lavis_lite.models import from_pretrained
from lavis_lite.nn.decoding import GenerationConfig

PROMPTS = ["Question: what color is the star? Short answer:", "a photo of"]
TEXTS = ["a red square above a blue circle", "the black cat"]
LANGUAGE_MODELS = {"blip2_opt": "opt", "blip2_t5": "t5"}


def full_width(arch: str) -> Any:
    """The published widths of image encoder and Q-Former with one and two layers, a tiny language model, random
    weights that are spread enough for images to differ.
    """
    torch.manual_seed(0)
    folder = REFERENCE / "tiny_hf"
    family = LANGUAGE_MODELS.get(arch)
    language = {f"{family}_model": str(folder / family)} if family else {}
    model = registry.get_model_class(arch)(
        image_size=42,
        vit={"depth": 1},
        vit_weights="random",
        qformer={"num_layers": 2},
        tokenizer=str(folder / "bert"),
        **language,
    ).eval()
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "_model." not in name):
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.02))
    return model


def theirs(model: Any, arch: str, folder: Path) -> tuple[Any, Any]:
    """What transformers loads from our folder: model and processor."""
    write_folder(model, folder, arch=arch, max_shard_size="100MB")
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    twin, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return twin.eval(), transformers.AutoProcessor.from_pretrained(folder)


def picture(model: Any) -> Tensor:
    side = model.visual_encoder.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def their_inputs(processor: Any, prompts: list[str], image: Tensor, *, side: str) -> dict[str, Tensor]:
    """Ids of the prompts, padded on that side, behind the image tokens, as `processor(images, text)` makes them."""
    processor.tokenizer.padding_side = side
    text = processor.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    queries = torch.full((len(prompts), processor.num_query_tokens), token)
    return {
        "pixel_values": image,
        "input_ids": torch.cat([queries, text.input_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(queries), text.attention_mask], dim=1),
    }


def their_text(ids: list[int], end: int) -> list[int]:
    """Generated ids up to and with the end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


@torch.no_grad()
def compare_language_model(model: Any, arch: str, folder: Path) -> None:
    """Logits of each prompt (or of an answer to it), then greedy and beam search of the batch."""
    twin, processor = theirs(model, arch, folder)
    image, is_t5 = picture(model), model.lm.is_encoder_decoder
    close(model.encode_image(image), twin.vision_model(image).last_hidden_state)
    for i, prompt in enumerate(PROMPTS):
        inputs = their_inputs(processor, [prompt], image[i : i + 1], side="right")
        embeds, mask = model.prompt_embeds({"image": image[i : i + 1]}, [prompt])
        assert mask.tolist() == inputs["attention_mask"].tolist()
        if is_t5:
            labels = model.llm_tokenizer.answer_batch([prompt], [TEXTS[i]]).labels
            logits = twin(**inputs, labels=labels).logits
        else:
            labels = inputs["input_ids"][:, processor.num_query_tokens :]
            logits = twin(**inputs).logits[:, processor.num_query_tokens - 1 : -1]
        logits = logits[..., : model.lm.model.config.vocab_size]  # behind them is their image token
        close(model.lm.logits(embeds, mask, labels), logits)
    inputs = their_inputs(processor, PROMPTS, image, side="right" if is_t5 else "left")
    for num_beams, length_penalty in ((1, 1.0), (5, 1.0), (3, -1.0)):
        compare_generation(model, twin, inputs, num_beams=num_beams, length_penalty=length_penalty)


def compare_generation(model: Any, twin: Any, inputs: dict[str, Tensor], **settings: Any) -> None:
    """Nine new tokens at most, two at least: ids up to the end token are equal."""
    config = model.lm.decoding(GenerationConfig(max_length=10, min_length=3, **settings))
    ours = model.lm.generate(*model.prompt_embeds({"image": inputs["pixel_values"]}, PROMPTS), config).ids[:, 1:]
    generated = twin.generate(**inputs, max_new_tokens=9, min_new_tokens=2, do_sample=False, **settings)
    skipped = 1 if model.lm.is_encoder_decoder else inputs["input_ids"].shape[1]
    end = model.lm.end_id
    assert [their_text(row, end) for row in ours.tolist()] == [
        their_text(row, end) for row in generated[:, skipped:].tolist()
    ]
    assert ours[0].tolist() != ours[1].tolist()


@pytest.mark.parametrize("arch", LANGUAGE_MODELS)
def test_language_models_small(arch: str, tmp_path: Path) -> None:
    compare_language_model(language_model(Case(f"{arch}__a"), prompt=""), arch, tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize("arch", LANGUAGE_MODELS)
def test_language_models_full_width(arch: str, tmp_path: Path) -> None:
    compare_language_model(full_width(arch), arch, tmp_path / "hf")


@torch.no_grad()
def compare_matching(model: Any, arch: str, folder: Path) -> None:
    """Matching logits and similarities of texts of unequal lengths."""
    twin, processor = theirs(model, arch, folder)
    image = picture(model)
    text = processor.tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    samples = {"image": image, "text_input": TEXTS}
    matching = twin(pixel_values=image, **text, use_image_text_matching_head=True).logits_per_image
    close(model(samples, match_head="itm"), matching)
    close(model(samples, match_head="itc"), twin(pixel_values=image, **text).logits_per_image)


def test_matching_small(tmp_path: Path) -> None:
    case = Case("blip2_qformer__a")
    arch = "blip2_image_text_matching"
    model = registry.get_model_class(arch)(**blip2_sizes(case), embed_dim=case.config["embed_dim"]).eval()
    model.load_state_dict(case.weights)
    compare_matching(model, arch, tmp_path / "hf")


@pytest.mark.slow
def test_matching_full_width(tmp_path: Path) -> None:
    arch = "blip2_image_text_matching"
    compare_matching(full_width(arch), arch, tmp_path / "hf")


@pytest.mark.parametrize("name", ["blip2_t5_instruct__a", "blip2_vicuna_instruct__a"])
@torch.no_grad()
def test_instruction_models_see_the_same(name: str, tmp_path: Path) -> None:
    case = Case(name)
    model = language_model(case)
    twin, _ = theirs(model, case.config["_arch"], tmp_path / "hf")
    image = picture(model)
    ids, mask = model.tokenize(PROMPTS, max_length=model.max_txt_len)
    seen = twin.get_image_features(image, qformer_input_ids=ids, qformer_attention_mask=mask, return_dict=True)
    close(model.image_embeds({"image": image}, PROMPTS), seen.pooler_output)


@torch.no_grad()
def test_a_hugging_face_video_folder_loads_as_our_model(tmp_path: Path) -> None:
    llm, bert = REFERENCE / "tiny_hf" / "llama", REFERENCE / "tiny_hf" / "bert"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.InstructBlipVideoConfig(
        vision_config=sizes | {"image_size": 16, "patch_size": 8, "initializer_range": 0.3},
        qformer_config=sizes | {"vocab_size": 218, "max_position_embeddings": 64},
        text_config=transformers.AutoConfig.from_pretrained(llm),
        num_query_tokens=3,
    )
    twin = transformers.InstructBlipVideoForConditionalGeneration(config).eval()
    twin.query_tokens.normal_()
    twin.save_pretrained(tmp_path)
    for source, place in ((llm, tmp_path), (bert, tmp_path / "qformer_tokenizer")):
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(place)
    model = from_pretrained(tmp_path, is_eval=True)
    assert type(model) is registry.get_model_class("blip2_vicuna_instruct")
    video = torch.randn(2, 4, 3, 16, 16)
    ids, mask = model.tokenize(PROMPTS)
    seen = twin.get_video_features(video, qformer_input_ids=ids, qformer_attention_mask=mask, return_dict=True)
    close(model.image_embeds({"image": video.transpose(1, 2)}, PROMPTS), seen.pooler_output)


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_a_hugging_face_folder_loads_as_our_model(family: str, tmp_path: Path) -> None:
    """A model that transformers made and wrote, which knows nothing of us."""
    torch.manual_seed(0)
    llm = REFERENCE / "tiny_hf" / family
    text = transformers.AutoConfig.from_pretrained(llm)
    vision = {"hidden_size": 36, "intermediate_size": 55, "num_hidden_layers": 2, "num_attention_heads": 3}
    qformer = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 28, "patch_size": 7, "initializer_range": 0.2},
        qformer_config=qformer | {"max_position_embeddings": 64, "cross_attention_frequency": 2},
        text_config=text,
        num_query_tokens=5,
    )
    twin = transformers.Blip2ForConditionalGeneration(config).eval()
    twin.query_tokens.normal_()
    if family == "t5":  # as Flan-T5's, whatever the configuration says
        twin.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(text.vocab_size, text.d_model))
    for parameter in twin.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    for layer in twin.vision_model.encoder.layers:
        layer.self_attn.qkv.bias[36:72] = 0
    twin.save_pretrained(tmp_path, max_shard_size="100KB")
    transformers.AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, is_eval=True, tokenizer=str(REFERENCE / "tiny_hf" / "bert"))
    assert type(model) is registry.get_model_class(f"blip2_{family}")
    image = torch.randn(2, 3, 28, 28)
    seen = twin.get_image_features(image, return_dict=True)
    close(model.image_embeds({"image": image}, [""] * 2), seen.pooler_output)
    own, other = getattr(model, f"{family}_model").state_dict(), twin.language_model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in other.items())
