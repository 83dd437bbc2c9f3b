"""Train a tiny language model on the texts of `shapes` alone, without pictures, for BLIP-2's quickstart.

A document holds a few captions of one scene and questions about it with their answers, some of them repeated. A model
that has learned to continue such documents can use its context, and BLIP-2 needs no more of a frozen one. The
repetitions matter: without them a model this small does not learn to copy (of a caption of two objects in its context
it keeps the relation no better than by chance). Writes a folder that `opt_model`, `t5_model` and `llm_model` take.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import Adafactor, PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from lavis_lite.common.registry import registry
from lavis_lite.datasets.shapes.instructions import as_plain_text
from lavis_lite.nn.llm_loading import load_language_model

QUESTION = "Question: {} Answer: {}"
SHORT_QUESTION = "Question: {} Short answer:"


def documents(sections: dict[str, Any]) -> list[list[tuple[str, str | None]]]:
    """Return the texts of each training image: (caption, None) and (question, answer)."""
    texts: dict[str, list[tuple[str, str | None]]] = {}
    for name, section in sections.items():
        dataset = registry.get_builder_class(name)(**section).build(["train"])["train"]
        for record in dataset.annotation:
            text, answer = as_plain_text(record)
            texts.setdefault(record["image"], []).append((text.lower(), answer))
    return list(texts.values())


def write(entry: tuple[str, str | None], end: str = "") -> str:
    """Return a caption, or a question with its answer, as text."""
    text, answer = entry
    return (text if answer is None else QUESTION.format(text, answer)) + end


def draw_lines(entries: list[tuple[str, str | None]], rng: random.Random) -> list[tuple[str, str | None]]:
    """Draw eight lines from two captions and two questions, with repetitions."""
    captions = [entry for entry in entries if entry[1] is None]
    questions = [entry for entry in entries if entry[1] is not None]
    kinds = [rng.sample(kind, min(2, len(kind))) for kind in (captions, questions) if kind]
    return [rng.choice(rng.choices(kinds, weights=(7, 3)[: len(kinds)])[0]) for _ in range(8)]


def decoder_batch(tokenizer: PreTrainedTokenizerBase, chosen: list[Any], rng: random.Random) -> dict[str, Tensor]:
    """Return whole documents, one entry per line; every token is predicted."""
    texts = ["".join(write(entry, "\n") for entry in draw_lines(entries, rng)) for entries in chosen]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def encoder_decoder_batch(
    tokenizer: PreTrainedTokenizerBase, chosen: list[Any], rng: random.Random
) -> dict[str, Tensor]:
    """Return some lines of a document, then a question or the beginning of a caption (perhaps empty); its answer, or
    the rest of the caption, is predicted.
    """
    inputs, outputs = [], []
    for entries in chosen:
        (text, answer), *others = draw_lines(entries, rng)
        context = "".join(write(entry, "\n") for entry in others[: rng.randint(1, 4)])
        words = text.split()
        cut = rng.randint(0, len(words) // 2)
        prompt = " ".join(words[:cut]) if answer is None else SHORT_QUESTION.format(text)
        inputs.append(context + prompt)
        outputs.append(" ".join(words[cut:]) if answer is None else answer)
    settings = {"padding": True, "truncation": True, "return_tensors": "pt"}
    batch = tokenizer(inputs, max_length=128, **settings)
    labels = tokenizer(outputs, max_length=32, **settings)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
    }


def batches(all_documents: list[Any], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Yield random batches of documents without end."""
    while True:
        yield rng.sample(all_documents, size)


def optimizer_of(model: PreTrainedModel, lr: float | None) -> torch.optim.Optimizer:
    """Return AdamW, or for T5 Adafactor, whose steps are relative to the weights, as T5 was trained: its embeddings are
    large and its position biases small, and with AdamW it needs many times as many steps to learn to copy.
    """
    if model.config.is_encoder_decoder:
        return Adafactor(model.parameters(), lr=lr or 3e-2, scale_parameter=True, relative_step=False)
    return torch.optim.AdamW(model.parameters(), lr=lr or 2e-3, weight_decay=0.05)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[Any], args: Any) -> None:
    """Train with warm-up and cosine decay; print the loss every 100 steps."""
    rng = random.Random(args.seed)
    make = encoder_decoder_batch if model.config.is_encoder_decoder else decoder_batch
    tokenizer.padding_side = "right"
    optimizer = optimizer_of(model, args.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    model.train()
    started, total = time.perf_counter(), 0.0
    for step, chosen in zip(range(1, args.steps + 1), batches(texts, args.batch_size, rng), strict=False):
        loss = model(**make(tokenizer, chosen, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total += float(loss.detach())
        if step % 100 == 0 or step == args.steps:
            done = step % 100 or 100
            print(
                f"step {step}/{args.steps}  loss {total / done:.3f}  {time.perf_counter() - started:.0f} s", flush=True
            )
            total = 0.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packaged tiny model (tiny_opt, tiny_t5, tiny_vicuna) or a folder")
    parser.add_argument("--texts", required=True, metavar="YAML", help="its section `datasets` names the texts")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="peak learning rate; default 2e-3, for an encoder-decoder 3e-2")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    sections = OmegaConf.to_container(OmegaConf.load(args.texts))["datasets"]
    train(model, tokenizer, documents(sections), args)
    tokenizer.save_pretrained(args.out)
    model.eval().save_pretrained(args.out)  # its weights last: with them, the folder is complete
    print(f"language model in {args.out}")


if __name__ == "__main__":
    main()
