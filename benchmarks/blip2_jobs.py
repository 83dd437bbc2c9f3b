"""Jobs of throughput.py: BLIP-2's models at full or tiny sizes, transformers' models with the same weights, and pairs
of functions that do the same work.

`arguments` are the command line's. Frozen parts are built in the measured precision, on the device.
"""

import argparse
import copy
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flops
import torch
import torch.nn.functional as F
from blip import TEXTS
from measure import Job, Watched
from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.convert.folders import adapter_of, hf_model
from lavis_lite.models.batches import Texts, padded, selected, stack_texts
from lavis_lite.models.blip2.base import PRECISIONS
from lavis_lite.models.blip2.llm_tokenizer import Batch
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.decoding import GenerationConfig
from lavis_lite.nn.llm import LLMAdapter, Prefix
from lavis_lite.nn.llm_sources import PACKAGED, WEIGHT_FILES
from lavis_lite.nn.losses import IGNORED

LANGUAGE_MODELS = {"opt": ("opt-2.7b", "tiny_opt"), "t5": ("flan-t5-xl", "tiny_t5")}
"""Packaged sizes, and the packaged tiny model whose tokenizer (and, with --tiny, sizes) are taken."""
PARTS = ("stage1", *LANGUAGE_MODELS)
FULL = {"qformer": {"vocab_size": 30523}}
TINY = {
    "vit_model": "eva_tiny",
    "qformer": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128},
}
NUM_BEAMS = 5
NUM_CANDIDATES = 64


def build(arch: str, arguments: argparse.Namespace, **settings: Any) -> Any:
    """Build one of our models with random weights on its device, with frozen parts in the measured precision."""
    sizes = dict(TINY if arguments.tiny else FULL)
    if arguments.depth is not None:
        sizes["vit"] = {"depth": arguments.depth}
    with torch.device(arguments.device):
        return registry.get_model_class(arch)(
            image_size=arguments.image_size,
            vit_weights="random",
            vit_precision=arguments.dtype,
            tokenizer="shapes",
            **sizes,
            **settings,
        )


def build_with_llm(part: str, arguments: argparse.Namespace) -> Any:
    """Build `blip2_opt` or `blip2_t5`."""
    sizes, tokenizer = LANGUAGE_MODELS[part]
    names = ("num_hidden_layers",) if part == "opt" else ("num_layers", "num_decoder_layers")
    depth = {} if arguments.depth is None else dict.fromkeys(names, arguments.depth)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "llm")
        shutil.copytree(PACKAGED / tokenizer, source, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
        if not arguments.tiny:
            shutil.copy(PACKAGED / sizes / "config.json", source)
        settings = {f"{part}_model": str(source), "llm": depth, "llm_precision": arguments.dtype}
        return build(f"blip2_{part}", arguments, **settings)


def build_hf(model: Any, arch: str) -> Any:
    """Build transformers' model with our tensors, frozen."""
    config = adapter_of(model, arch=arch).config(model, arch=arch)
    if hasattr(model, "lm"):
        config.image_token_index = config.text_config.vocab_size - 1  # not in any text here
    return hf_model(model, config, model.state_dict(), arch=arch).requires_grad_(False)


def training_step(model: nn.Module, loss: Callable[[], Tensor], arguments: argparse.Namespace) -> Watched:
    """Return a training step: forward, backward, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=arguments.device == "cuda")
    model.train()

    def step() -> Tensor:
        with autocast(arguments):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return Watched(step, model, optimizer=optimizer)


def answering(model: nn.Module, answer: Callable[[], Any], arguments: argparse.Namespace | None = None) -> Watched:
    """Return a call without gradients, under autocast if `arguments` are given."""
    model.eval()

    @torch.no_grad()
    def run() -> Any:
        with nullcontext() if arguments is None else autocast(arguments):
            return answer()

    return Watched(run, model)


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    """Return the precision in which trained parts compute."""
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bf16")


def stage1_jobs(arguments: argparse.Namespace, image: Tensor) -> Iterator[Job]:
    """Compare the image encoder with transformers', and the first stage's training step and re-ranking with computing
    the image's keys and values for every pair.
    """
    model = build("blip2", arguments)
    hf = build_hf(model, "blip2").to(PRECISIONS[arguments.dtype])
    yield Job(
        what="image encoder",
        other="transformers",
        ours=answering(model, partial(model.encode_image, image), arguments),
        theirs=answering(hf, partial(hf.vision_model, image.to(hf.dtype))),
        count=len(image),
        flops=flops.image_encoder(model.visual_encoder).forward,
    )
    texts = synthetic_texts(arguments)
    ids, mask = model.tokenize(texts, max_length=model.max_txt_len)
    samples = {"image": image, "text_input": texts}
    ours, theirs = (
        training_step(side, partial(loss_of, side, samples), arguments) for side in (model, recomputing(model))
    )
    yield Job(
        what="stage 1, training step",
        other="keys and values a pair",
        ours=ours,
        theirs=theirs,
        count=len(image),
        flops=flops.stage1_step(model, ids.shape[1]),
    )
    with torch.no_grad():
        tokens = model.encode_image(image[:1])
    ids, mask = (part[:1].expand(NUM_CANDIDATES, -1) for part in padded((ids, mask)))

    def score(num_images: int) -> Tensor:
        return model.matching_logits(ids, mask, model.Qformer.project_kv(tokens.expand(num_images, -1, -1)))

    yield Job(
        what=f"re-ranking {NUM_CANDIDATES} texts of an image",
        other="keys and values a pair",
        ours=answering(model, partial(score, 1), arguments),
        theirs=answering(model, partial(score, NUM_CANDIDATES), arguments),
        count=NUM_CANDIDATES,
    )


def loss_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return our loss of a sample dict."""
    return model(inputs).loss


def recomputing(model: Any) -> Any:
    """Return our first stage with the same weights, which computes an image's keys and values for every pair."""
    plain = copy.copy(model)
    plain.pair_logits = partial(logits_of_pairs, plain)
    return plain


def logits_of_pairs(
    model: Any, tokens: Tensor, context: CrossAttentionKV, texts: Texts, negatives: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the matching logits of three sets of pairs, each with its own images' tokens."""
    negative_image, negative_text = negatives
    ids, mask = stack_texts(texts, texts, selected(texts, negative_text))
    images = model.Qformer.project_kv(torch.cat([tokens, tokens[negative_image], tokens]))
    return model.matching_logits(ids, mask, images)


def llm_jobs(part: str, arguments: argparse.Namespace, image: Tensor) -> Iterator[Job]:
    """Compare the second stage's training step and captions with transformers', and the captions of a causal language
    model also with reading the inputs for every beam.
    """
    model = build_with_llm(part, arguments)
    name = LANGUAGE_MODELS[part][arguments.tiny]
    hf = build_hf(model, f"blip2_{part}")
    train_like(hf, model)
    samples, inputs = stage2_inputs(model, hf, image, synthetic_texts(arguments))
    num_labels = inputs["labels"].shape[1]
    num_text = inputs["input_ids"].shape[1] - model.query_tokens.shape[1]
    yield Job(
        what=f"stage 2 {name}, training step",
        other="transformers",
        ours=training_step(model, partial(loss_of, model, samples), arguments),
        theirs=training_step(hf, lambda: hf(**inputs).loss, arguments),
        count=len(image),
        flops=flops.stage2_step(model, num_text, num_labels if model.lm.is_encoder_decoder else num_text),
    )
    hf.to(PRECISIONS[arguments.dtype])
    yield captions_job(name, model, hf, image, arguments)
    if not model.lm.is_encoder_decoder:
        yield prefix_job(name, model, image, arguments)


def train_like(hf: Any, model: Any) -> None:
    """Give transformers' model its own weights in the parts that ours trains."""
    trained = [hf.qformer, hf.language_projection, hf.vision_model.post_layernorm]
    for parameter in (hf.query_tokens, *(p for part in trained for p in part.parameters())):
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


def stage2_inputs(model: Any, hf: Any, image: Tensor, texts: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same training batch for our model and transformers': captions, of which an encoder-decoder reads one
    half and generates the other.
    """
    if model.lm.is_encoder_decoder:
        words = [text.split() for text in texts]
        read = [" ".join(text[: len(text) // 2]) for text in words]
        written = [" ".join(text[len(text) // 2 :]) for text in words]
        samples = {"image": image, "text_input": read, "text_output": written}
        texts_batch = model.llm_tokenizer.answer_batch(read, written)
    else:
        samples = {"image": image, "text_input": texts}
        texts_batch = model.llm_tokenizer.caption_batch(texts, model.prompt)
    batch = Batch(*(tensor.to(image.device) for tensor in texts_batch))
    inputs = image_inputs(model, hf, image, batch.ids, batch.mask)
    num_unlabelled = 0 if model.lm.is_encoder_decoder else inputs["input_ids"].shape[1] - batch.ids.shape[1]
    return samples, {**inputs, "labels": F.pad(batch.labels, (num_unlabelled, 0), value=IGNORED)}


def image_inputs(model: Any, hf: Any, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the inputs of transformers' model: placeholders for the queries, then the text."""
    num_queries = model.query_tokens.shape[1]
    return {
        "pixel_values": image,
        "input_ids": F.pad(ids, (num_queries, 0), value=hf.config.image_token_index),
        "attention_mask": F.pad(mask, (num_queries, 0), value=1),
    }


def captions_job(name: str, model: Any, hf: Any, image: Tensor, arguments: argparse.Namespace) -> Job:
    """Compare captions of a fixed length by beam search, without prompt."""
    num_tokens = arguments.tokens
    length = num_tokens if model.lm.is_encoder_decoder else num_tokens + 1  # see `generate`
    ids, mask = model.pad(model.llm_tokenizer.inputs([""] * len(image)))
    inputs = image_inputs(model, hf, image.to(hf.dtype), ids, mask)

    def theirs() -> list[str]:
        written = hf.generate(
            **inputs, num_beams=NUM_BEAMS, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
        )
        return model.llm_tokenizer.tokenizer.batch_decode(written, skip_special_tokens=True)

    def ours() -> list[str]:
        return model.generate({"image": image}, num_beams=NUM_BEAMS, max_length=length, min_length=num_tokens + 1)

    return Job(
        what=f"captions {name}, {num_tokens} tokens",
        other="transformers",
        ours=answering(model, ours, arguments),
        theirs=answering(hf, theirs),
        count=len(image),
    )


def prefix_job(name: str, model: Any, image: Tensor, arguments: argparse.Namespace) -> Job:
    """Compare the language model's part of captioning."""
    length = arguments.tokens + 1
    config = model.lm.decoding(GenerationConfig(num_beams=NUM_BEAMS, max_length=length, min_length=length))
    with torch.no_grad(), autocast(arguments):
        embeds, mask = model.prompt_embeds({"image": image}, [""] * len(image))
    plain = copy.copy(model.lm)  # of the same weights
    plain.prefix = partial(prefix_of_every_beam, model.lm)
    ours, theirs = (answering(model, partial(lm.generate, embeds, mask, config), arguments) for lm in (model.lm, plain))
    return Job(
        what=f"beams {name}, {arguments.tokens} tokens",
        other="inputs read by every beam",
        ours=ours,
        theirs=theirs,
        count=len(image),
    )


def prefix_of_every_beam(lm: LLMAdapter, embeds: Tensor, mask: Tensor) -> Prefix:
    """Return the result of `lm.prefix` after reading the inputs once per beam."""
    prefix = lm.prefix(embeds.repeat_interleave(NUM_BEAMS, 0), mask.repeat_interleave(NUM_BEAMS, 0))
    first = torch.arange(len(mask), device=mask.device) * NUM_BEAMS
    return Prefix(prefix.logits[first], replace(prefix.cache.select(first), mask=mask))


def synthetic_texts(arguments: argparse.Namespace) -> list[str]:
    """Return texts of `--words` words, one per image."""
    words = " ".join(TEXTS).split()
    return [" ".join(words[(i + j) % len(words)] for j in range(arguments.words)) for i in range(arguments.batch)]


def all_jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Iterate over the jobs of the chosen parts, with one model at a time in memory."""
    side = arguments.image_size
    image = torch.randn(arguments.batch, 3, side, side, device=arguments.device)
    for part in arguments.parts:
        yield from stage1_jobs(arguments, image) if part == "stage1" else llm_jobs(part, arguments, image)
        gc.collect()  # models with reference cycles
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
