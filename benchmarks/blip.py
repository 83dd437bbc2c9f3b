"""Speed of BLIP against transformers' classes and against the plain way of doing the same; ratios in one run.

    python benchmarks/blip.py                     # CPU, BLIP-base's widths at reduced depth
    python benchmarks/blip.py --depth 12 --device cuda --dtype bf16 --batch 32

Weights are random and images synthetic; the tokenizer is the packaged small one. Both sides of a row do the same work
in the same process, alternating; times are medians.
"""

import argparse
import random
from collections.abc import Iterator
from typing import Any

import torch
from measure import Job, Watched, measure, table
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

from lavis_lite.common.registry import registry
from lavis_lite.convert import blip_to_hf
from lavis_lite.nn.momentum import update_momentum

TEXTS = ["a small green triangle left of a large red circle", "there are two shapes a blue square and a red cross"]
NUM_CANDIDATES = 64
NUM_ANSWERS, NUM_RANKED = 3128, 128


def build(arch: str, arguments: argparse.Namespace, **settings: Any) -> Any:
    """Build one of our models at BLIP-base's widths."""
    model = registry.get_model_class(arch)(
        image_size=arguments.image_size,
        vit={"depth": arguments.depth},
        med={"num_layers": arguments.depth, "vocab_size": 30524},
        tokenizer="shapes",
        **settings,
    )
    return model.to(arguments.device).eval()


def hf_captioner(model: Any, arguments: argparse.Namespace) -> nn.Module:
    """Build transformers' captioning model with the same weights."""
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
    theirs = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    theirs.load_state_dict(blip_to_hf(model.state_dict()), strict=False)
    return theirs.to(arguments.device).eval()


def caption_jobs(arguments: argparse.Namespace, image: Tensor) -> Iterator[Job]:
    """Training step without update and beam-3 captions, ours and transformers'."""
    model = build("blip_caption", arguments)
    theirs = hf_captioner(model, arguments)
    texts = [model.prompt + TEXTS[i % 2] for i in range(len(image))]
    ids, mask = model.tokenize(texts, start=model.decoder_start)
    labels = model.labels(ids, len(model.tokenizer(model.prompt).input_ids) - 1)
    prompt, _ = model.tokenize([model.prompt] * len(image), start=model.decoder_start)
    lengths = {"num_beams": 3, "max_length": 20, "min_length": 20}
    ends = {"eos_token_id": model.tokenizer.sep_token_id, "pad_token_id": model.tokenizer.pad_token_id}

    def ours_train() -> None:
        model({"image": image, "text_input": texts})["loss"].backward()
        model.zero_grad()

    def theirs_train() -> None:
        theirs(pixel_values=image, input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        theirs.zero_grad()

    @torch.no_grad()
    def ours_generate() -> list[str]:
        return model.generate({"image": image}, **lengths)

    @torch.no_grad()
    def theirs_generate() -> Tensor:
        states = theirs.vision_model(image).last_hidden_state
        return theirs.text_decoder.generate(input_ids=prompt[:, :-1], encoder_hidden_states=states, **ends, **lengths)

    for what, ours, other in (
        ("captioning, forward and backward", ours_train, theirs_train),
        ("captions, 3 beams of 20 tokens", ours_generate, theirs_generate),
    ):
        sides = {"ours": Watched(ours, model), "theirs": Watched(other, theirs)}
        yield Job(what=what, other="transformers", count=len(image), **sides)


def rerank_job(arguments: argparse.Namespace, image: Tensor) -> Job:
    """Match one image with many texts: keys and values of the image once, or the image repeated for every text."""
    model = build("blip_image_text_matching", arguments)
    ids, mask = model.tokenize([TEXTS[i % 2] for i in range(NUM_CANDIDATES)])
    tokens = model.visual_encoder(image[:1]).detach()

    @torch.no_grad()
    def once() -> Tensor:
        return model.matching_logits(ids, mask, model.project_kv(tokens))

    @torch.no_grad()
    def repeated() -> Tensor:
        return model.matching_logits(ids, mask, model.project_kv(tokens.expand(len(ids), -1, -1)))

    sides = {"ours": Watched(once, model), "theirs": Watched(repeated, model)}
    return Job(what=f"re-ranking {NUM_CANDIDATES} texts of an image", other="image repeated", count=len(ids), **sides)


def rank_job(arguments: argparse.Namespace, image: Tensor) -> Job:
    """Choose each question's answer among NUM_ANSWERS: those of the likeliest first tokens sorted by length, or each
    read from its first token on and padded to the longest of the list.
    """
    model = build("blip_vqa", arguments)
    words = [word for text in TEXTS for word in text.split()]
    draw = random.Random(0)
    lengths = draw.choices([1, 2, 3, 4], [85, 10, 4, 1], k=NUM_ANSWERS)
    answers = [" ".join(draw.choices(words, k=length)) for length in lengths]
    samples = {"image": image, "text_input": [TEXTS[i % 2] for i in range(len(image))]}

    @torch.no_grad()
    def sorted_by_length() -> Tensor:
        order, losses = model.rank_answers(samples, samples["text_input"], answers, NUM_RANKED)
        return order.gather(1, losses.argmin(dim=1, keepdim=True))

    @torch.no_grad()
    def padded() -> Tensor:
        states, mask = model.encode_questions(samples)
        context = model.text_decoder.bert.project_kv(states, mask=mask)
        ids, _ = model.tokenize(answers, start=model.decoder_start)
        start = torch.full((len(image), 1), model.decoder_start, device=ids.device)
        logits, _ = model.text_decoder(start, None, context=context)
        order = logits[:, 0].softmax(dim=-1)[:, ids[:, 1]].topk(NUM_RANKED, dim=1).indices
        loss = model.answer_loss(ids[order].flatten(0, 1), context)
        return order.gather(1, loss.view(len(image), -1).argmin(dim=1, keepdim=True))

    sides = {"ours": Watched(sorted_by_length, model), "theirs": Watched(padded, model)}
    return Job(what=f"ranking {NUM_RANKED} of {NUM_ANSWERS} answers", other="padded", count=len(image), **sides)


def momentum_job(arguments: argparse.Namespace) -> Job:
    """Update the momentum encoders in a few fused calls, or parameter by parameter."""
    model = build("blip_retrieval", arguments, queue_size=64)

    def fused() -> None:
        update_momentum(model.momentum_pairs(), 0.995)

    @torch.no_grad()
    def one_by_one() -> None:
        for online, momentum_encoder in model.momentum_pairs():
            for parameter, copy in zip(online.parameters(), momentum_encoder.parameters(), strict=True):
                copy.copy_(copy * 0.995 + parameter * 0.005)

    sides = {"ours": Watched(fused, model), "theirs": Watched(one_by_one, model)}
    return Job(what="momentum update", other="one by one", count=1, **sides)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--depth", type=int, default=3, help="layers of image encoder and text transformer (base: 12)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def all_jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Iterate over the jobs."""
    image = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    yield from caption_jobs(arguments, image)
    yield rerank_job(arguments, image)
    yield rank_job(arguments, image)
    yield momentum_job(arguments)


def main(argv: list[str] | None = None) -> None:
    """Print one row per comparison."""
    arguments = parse(argv)
    torch.manual_seed(0)
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bf16"):
        for line in table(measure(job, repeats=arguments.repeats) for job in all_jobs(arguments)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
