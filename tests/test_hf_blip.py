"""BLIP-base with random weights against transformers' own Blip classes, and weights both ways.

Tolerance: 1e-4 relative to the largest value; captions are equal.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from lavis_lite.common.registry import registry
from lavis_lite.convert import blip_from_hf, blip_to_hf
from lavis_lite.models import from_pretrained
from lavis_lite.nn.decoding import GenerationConfig, decode

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
TOKENIZER = str(REFERENCE / "tiny_hf" / "bert")
TEXTS = ["a red square above a blue circle", "the black cat is sitting on the table"]


def ours(arch: str, **settings: Any) -> Any:
    """Our model at BLIP-base size, 224 pixels, with random weights spread enough for the outputs to differ."""
    torch.manual_seed(0)
    model = registry.get_model_class(arch)(image_size=224, tokenizer=TOKENIZER, med={"vocab_size": 30524}, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "text_decoder" in name:
                parameter.mul_(3.0)
    return model.eval()


def theirs(cls: Any, model: Any, **text: Any) -> Any:
    """Hugging Face's class of the same sizes with our weights."""
    special = {"bos_token_id": model.decoder_start, "sep_token_id": model.tokenizer.sep_token_id, "pad_token_id": 0}
    config = BlipConfig(
        text_config={"vocab_size": 30524, "num_attention_heads": 12, **special, **text},
        vision_config={"image_size": 224, "layer_norm_eps": 1e-6},
        projection_dim=256,
        image_text_hidden_size=256,
    )
    twin = cls(config).eval()
    missing, unexpected = twin.load_state_dict(blip_to_hf(model.state_dict()), strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") or name.startswith("logit_scale") for name in missing)
    return twin


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@torch.no_grad()
def test_captioning(image: Tensor) -> None:
    model = ours("blip_caption")
    twin = theirs(BlipForConditionalGeneration, model, label_smoothing=0.1)
    close(model.visual_encoder(image), twin.vision_model(image).last_hidden_state)
    texts = [model.prompt + text for text in TEXTS]
    ids, mask = model.tokenize(texts, start=model.decoder_start)
    labels = model.labels(ids, len(model.tokenizer(model.prompt).input_ids) - 1)
    loss = twin(pixel_values=image, input_ids=ids, attention_mask=mask, labels=labels).loss
    close(model({"image": image, "text_input": texts})["loss"], loss)
    prompt, _ = model.tokenize([model.prompt] * 2, start=model.decoder_start)
    settings = {"num_beams": 3, "max_length": 16, "min_length": 5}
    generated = twin.text_decoder.generate(
        input_ids=prompt[:, :-1],
        encoder_hidden_states=twin.vision_model(image).last_hidden_state,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=0,
        **settings,
    )
    context = model.text_decoder.bert.project_kv(model.visual_encoder(image))
    ids = decode(model.step(context), prompt[:, :-1], model.decoding(GenerationConfig(**settings))).ids
    assert ids.tolist() == generated.tolist()
    assert ids[0].tolist() != ids[1].tolist()


@pytest.mark.slow
@torch.no_grad()
def test_matching(image: Tensor) -> None:
    model = ours("blip_image_text_matching")
    twin = theirs(BlipForImageTextRetrieval, model)
    ids, mask = model.tokenize(TEXTS)
    grounded = ids.clone()
    grounded[:, 0] = model.encoder_start
    itm = model({"image": image, "text_input": TEXTS}, match_head="itm")
    close(itm, twin(input_ids=grounded, attention_mask=mask, pixel_values=image).itm_score)
    itc = model({"image": image, "text_input": TEXTS}, match_head="itc")
    close(itc, twin(input_ids=ids, attention_mask=mask, pixel_values=image, use_itm_head=False).itm_score)


@pytest.mark.slow
@torch.no_grad()
def test_question_answering(image: Tensor) -> None:
    model = ours("blip_vqa")
    twin = theirs(BlipForQuestionAnswering, model)
    ids, mask = model.tokenize(TEXTS, start=model.encoder_start)
    states, _ = model.encode_questions({"image": image, "text_input": TEXTS})
    vision = twin.vision_model(image).last_hidden_state
    close(states, twin.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=vision).last_hidden_state)


def test_weights_convert_both_ways() -> None:
    model = registry.get_model_class("blip_vqa")(vit_type="tiny", image_size=48, tokenizer=TOKENIZER)
    state = model.state_dict()
    back = blip_from_hf(blip_to_hf(state))
    assert back.keys() == {name for name in state if not name.endswith("position_ids")}
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize(
    ("cls", "arch"),
    [
        (BlipForConditionalGeneration, "blip_caption"),
        (BlipForQuestionAnswering, "blip_vqa"),
        (BlipForImageTextRetrieval, "blip_image_text_matching"),
    ],
)
@torch.no_grad()
def test_a_hugging_face_folder_loads_as_our_model(cls: Any, arch: str, tmp_path: Path) -> None:
    """Their sizes and epsilons, their tokenizer, in shards; features of images and grounded texts."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = {"vocab_size": len(tokenizer) + 2, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {"hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BlipConfig(
        text_config=text | {"intermediate_size": 40, "max_position_embeddings": 50},
        vision_config=vision | {"image_size": 32, "patch_size": 8, "initializer_range": 0.3, "layer_norm_eps": 1e-3},
        image_text_hidden_size=12,
    )
    twin = cls(config).eval()
    for parameter in twin.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    twin.save_pretrained(tmp_path, max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, is_eval=True)
    assert type(model) is registry.get_model_class(arch)
    image = torch.randn(2, 3, 32, 32)
    seen = twin.vision_model(image).last_hidden_state
    close(model.visual_encoder(image), seen)
    ids, mask = model.tokenize(TEXTS)
    if hasattr(twin, "text_encoder"):
        states = twin.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        close(model.text_encoder(ids, mask, context=model.text_encoder.project_kv(seen))[0], states)
    if hasattr(twin, "text_decoder"):
        logits = twin.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).logits
        close(model.text_decoder(ids, mask, context=model.text_decoder.bert.project_kv(seen))[0], logits)
