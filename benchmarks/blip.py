"""How fast BLIP is here, against transformers' classes and against the plain way of doing the same; ratios in one run.

    python benchmarks/blip.py                     # CPU, BLIP-base's widths at reduced depth
    python benchmarks/blip.py --depth 12 --device cuda --dtype bf16 --batch 32

Weights are random and images synthetic; the tokenizer is the packaged small one. Both sides of a row do the same work
in the same process, alternating; a row gives the median seconds of each and their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

from lavis_lite.common.registry import registry
from lavis_lite.convert import blip_to_hf
from lavis_lite.nn.momentum import update_momentum

TEXTS = ["a small green triangle left of a large red circle", "there are two shapes a blue square and a red cross"]


def median_seconds(functions: list[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Each function's median time, the functions taking turns; the first round warms up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


def build(arch: str, arguments: argparse.Namespace, **settings: Any) -> Any:
    """One of our models at BLIP-base's widths."""
    model = registry.get_model_class(arch)(
        image_size=arguments.image_size,
        vit={"depth": arguments.depth},
        med={"num_layers": arguments.depth, "vocab_size": 30524},
        tokenizer="shapes",
        **settings,
    )
    return model.to(arguments.device).eval()


def hf_twin(model: Any, arguments: argparse.Namespace) -> nn.Module:
    """transformers' captioning model with the same weights."""
    tokenizer = model.tokenizer
    text = {
        "vocab_size": 30524,
        "num_attention_heads": 12,
        "num_hidden_layers": arguments.depth,
        "bos_token_id": model.decoder_start,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "label_smoothing": 0.1,
    }
    vision = {"image_size": arguments.image_size, "num_hidden_layers": arguments.depth, "layer_norm_eps": 1e-6}
    twin = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    twin.load_state_dict(blip_to_hf(model.state_dict()), strict=False)
    return twin.to(arguments.device).eval()


def caption_rows(arguments: argparse.Namespace, image: Tensor) -> list[tuple[str, str, list[Callable[[], Any]]]]:
    """Training step and beam-3 captions, ours and transformers'."""
    model = build("blip_caption", arguments)
    twin = hf_twin(model, arguments)
    texts = [model.prompt + TEXTS[i % 2] for i in range(len(image))]
    ids, mask = model.tokenize(texts, start=model.decoder_start)
    labels = model.labels(ids, model.prompt_length(model.prompt))
    prompt, _ = model.tokenize([model.prompt] * len(image), start=model.decoder_start)
    lengths = {"num_beams": 3, "max_length": 20, "min_length": 20}
    ends = {"eos_token_id": model.tokenizer.sep_token_id, "pad_token_id": model.tokenizer.pad_token_id}

    def ours_train() -> None:
        model({"image": image, "text_input": texts})["loss"].backward()
        model.zero_grad()

    def theirs_train() -> None:
        twin(pixel_values=image, input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        twin.zero_grad()

    @torch.no_grad()
    def ours_generate() -> None:
        model.generate({"image": image}, **lengths)

    @torch.no_grad()
    def theirs_generate() -> None:
        states = twin.vision_model(image).last_hidden_state
        twin.text_decoder.generate(input_ids=prompt[:, :-1], encoder_hidden_states=states, **ends, **lengths)

    return [
        ("captioning, forward and backward", "transformers", [ours_train, theirs_train]),
        ("captions, 3 beams of 20 tokens", "transformers", [ours_generate, theirs_generate]),
    ]


def rerank_row(arguments: argparse.Namespace, image: Tensor) -> tuple[str, str, list[Callable[[], Any]]]:
    """Match one image with 64 texts: keys and values of the image once, or the image repeated for every text."""
    model = build("blip_image_text_matching", arguments)
    ids, mask = model.tokenize([TEXTS[i % 2] for i in range(64)])
    tokens = model.visual_encoder(image[:1]).detach()

    @torch.no_grad()
    def once() -> None:
        model.matching_logits(ids, mask, model.text_encoder.project_kv(tokens))

    @torch.no_grad()
    def repeated() -> None:
        model.matching_logits(ids, mask, model.text_encoder.project_kv(tokens.expand(len(ids), -1, -1)))

    return "re-ranking 64 texts of an image", "image repeated", [once, repeated]


def momentum_row(arguments: argparse.Namespace) -> tuple[str, str, list[Callable[[], Any]]]:
    """Move a momentum twin in a few fused calls, or parameter by parameter."""
    model = build("blip_retrieval", arguments, queue_size=64)

    @torch.no_grad()
    def one_by_one() -> None:
        for online, twin in model.momentum_pairs():
            for parameter, copy in zip(online.parameters(), twin.parameters(), strict=True):
                copy.copy_(copy * 0.995 + parameter * 0.005)

    return "momentum update", "one by one", [lambda: update_momentum(model.momentum_pairs(), 0.995), one_by_one]


def main() -> None:
    """Print one row a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--depth", type=int, default=3, help="layers of image encoder and text transformer (base: 12)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    rows = [*caption_rows(arguments, image), rerank_row(arguments, image), momentum_row(arguments)]
    print(f"{'what':<36}{'ours (s)':>10}{'other (s)':>11}{'ratio':>7}   other")
    for what, other, functions in rows:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bf16"):
            ours, theirs = median_seconds(functions, arguments.repeats, arguments.device)
        print(f"{what:<36}{ours:>10.3f}{theirs:>11.3f}{theirs / ours:>7.2f}   {other}")


if __name__ == "__main__":
    main()
