"""InstructBLIP against transformers' own classes for images and videos: recorded weights of the original, written as a
folder, which transformers loads with its processor.

Tolerance: 1e-4 relative to the largest value, float32; generated ids are equal. transformers counts the prompt in a
causal model's lengths and repetition penalty, and the end token in the length that beams are divided by: new tokens are
counted here, and nothing is penalised.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference_blip2 import language_model
from reference_case import Case, close
from test_hf_blip2 import their_text, theirs
from torch import Tensor

from lavis_lite.models import from_pretrained
from lavis_lite.nn.decoding import GenerationConfig

NAMES = ["blip2_t5_instruct__a", "blip2_vicuna_instruct__a"]
PROMPTS = ["Question: what color is the star? Short answer:", "a photo of"]
ANSWERS = ["a red square above a blue circle", "the black cat"]
NUM_FRAMES = 4
"""What transformers' processor of videos always writes tokens for."""


def pixels(model: Any, num_frames: int | None = None) -> Tensor:
    """Two images (2,3,H,W), or videos (2,3,F,H,W)."""
    side, frames = model.visual_encoder.image_size, () if num_frames is None else (num_frames,)
    return torch.randn(2, 3, *frames, side, side, generator=torch.Generator().manual_seed(1))


def their_inputs(processor: Any, prompts: list[str], seen: Tensor, *, side: str) -> dict[str, Tensor]:
    """What transformers' processor makes of the prompts, padded on that side, with image or video tokens in front."""
    processor.tokenizer.padding_side = side
    is_video = seen.dim() == 5
    token = getattr(processor, "image_token" if hasattr(processor, "image_token") else "video_token")
    inputs = processor(text=prompts, padding=True, return_tensors="pt")
    num_tokens = processor.num_query_tokens * (NUM_FRAMES if is_video else 1)
    marks = torch.full((len(prompts), num_tokens), processor.tokenizer.convert_tokens_to_ids(str(token)))
    inputs["input_ids"] = torch.cat([marks, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(marks), inputs["attention_mask"]], dim=1)
    return {"pixel_values": seen.transpose(1, 2) if is_video else seen, **inputs}


def video_twin(twin: Any, processor: Any) -> tuple[Any, Any]:
    """transformers' class and processor of videos with the weights of its class of images."""
    config = twin.config.to_dict()
    settings = {name: config[name] for name in ("vision_config", "qformer_config", "num_query_tokens")}
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    video_config = transformers.InstructBlipVideoConfig(
        **settings, text_config=twin.config.text_config, video_token_index=token
    )
    model = transformers.InstructBlipVideoForConditionalGeneration(video_config).eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # Flan-T5's is not tied
    model.load_state_dict(twin.state_dict())
    processor.tokenizer.video_token = "<image>"
    return model, transformers.InstructBlipVideoProcessor(
        transformers.InstructBlipVideoVideoProcessor(),
        processor.tokenizer,
        processor.qformer_tokenizer,
        num_query_tokens=processor.num_query_tokens,
    )


@torch.no_grad()
def compare(model: Any, twin: Any, processor: Any, seen: Tensor) -> None:
    """Ids and logits of each prompt, with an answer for an encoder-decoder; then what the batch is answered."""
    is_t5, num_seen = model.lm.is_encoder_decoder, model.query_tokens.shape[1] * (NUM_FRAMES if seen.dim() == 5 else 1)
    for i, prompt in enumerate(PROMPTS):
        inputs = their_inputs(processor, [prompt], seen[i : i + 1], side="right")
        assert inputs["input_ids"][:, num_seen:].tolist() == model.llm_tokenizer.inputs([prompt])
        assert inputs["qformer_input_ids"].tolist() == model.tokenize([prompt])[0].tolist()
        embeds, mask = model.prompt_embeds({"image": seen[i : i + 1]}, [prompt])
        assert mask.tolist() == inputs["attention_mask"].tolist()
        if is_t5:
            labels = model.llm_tokenizer.answer_batch([prompt], [ANSWERS[i]]).labels
            logits = twin(**inputs, labels=labels).logits
        else:
            labels = inputs["input_ids"][:, num_seen:]
            logits = twin(**inputs).logits[:, num_seen - 1 : -1]
        close(model.lm.logits(embeds, mask, labels), logits[..., : model.lm.model.config.vocab_size])
    inputs = their_inputs(processor, PROMPTS, seen, side="right" if is_t5 else "left")
    for num_beams in (1, 3, 5):
        compare_generation(model, twin, inputs, seen, num_beams=num_beams, length_penalty=0.0)


def compare_generation(model: Any, twin: Any, inputs: dict[str, Tensor], seen: Tensor, **settings: Any) -> None:
    """Nine new tokens at most, two at least: ids up to the end token are equal."""
    config = model.lm.decoding(GenerationConfig(max_length=10, min_length=3, **settings))
    ours = model.lm.generate(*model.prompt_embeds({"image": seen}, PROMPTS), config).ids[:, 1:].tolist()
    generated = twin.generate(**inputs, max_new_tokens=9, min_new_tokens=2, do_sample=False, **settings)
    skipped = 1 if model.lm.is_encoder_decoder else inputs["input_ids"].shape[1]
    end = model.lm.end_id
    assert [their_text(row, end) for row in ours] == [their_text(row, end) for row in generated[:, skipped:].tolist()]
    assert ours[0] != ours[1]


@pytest.mark.parametrize("name", NAMES)
def test_images(name: str, tmp_path: Path) -> None:
    case = Case(name)
    model = language_model(case)
    twin, processor = theirs(model, case.config["_arch"], tmp_path / "hf")
    assert type(twin) is transformers.InstructBlipForConditionalGeneration
    compare(model, twin, processor, pixels(model))
    again = from_pretrained(tmp_path / "hf", is_eval=True)
    assert type(again) is type(model)
    compare(again, twin, processor, pixels(model))


@pytest.mark.parametrize("name", NAMES)
def test_videos(name: str, tmp_path: Path) -> None:
    """Our model against their video class, and what their folder becomes here."""
    case = Case(name)
    model = language_model(case)
    twin, processor = video_twin(*theirs(model, case.config["_arch"], tmp_path / "images"))
    compare(model, twin, processor, pixels(model, NUM_FRAMES))
    twin.save_pretrained(tmp_path / "videos")
    processor.save_pretrained(tmp_path / "videos")
    again = from_pretrained(tmp_path / "videos", is_eval=True)
    assert type(again) is type(model)
    compare(again, twin, processor, pixels(model, NUM_FRAMES))
