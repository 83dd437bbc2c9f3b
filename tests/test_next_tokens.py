"""Language-model losses: scores of the vocabulary only where a token is predicted, with the loss of all of them."""

from typing import Any

import cli_helpers
import pytest
import torch
from torch import Tensor, nn

from lavis_lite.models import load_model
from lavis_lite.nn.losses import IGNORED

TEXTS = ["a picture of a dog", "a picture of two large dogs on a red square"]
STEP = {"epoch": 0, "iters": 0, "num_iters_per_epoch": 10}
ANSWERS = {"answer": ["a dog", "no", "yes"], "weight": torch.tensor([0.5, 1.0, 2.0]), "n_answers": torch.tensor([1, 2])}
CASES: dict[str, dict[str, Any]] = {"caption": {}, "pretrain": STEP, "vqa_rank": ANSWERS}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return (load_model("blip2", "tiny") if name == "blip2" else cli_helpers.build(name, image_size=48)).eval()


def samples(name: str) -> dict[str, Any]:
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return {"image": image, "text_input": TEXTS, **CASES.get(name, {})}


def rows_scored(head: nn.Module) -> list[int]:
    """The numbers of states whose scores a head computes, call after call."""
    rows: list[int] = []
    head.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:-1].numel()))
    return rows


def losses_of_all(logits: Tensor, labels: Tensor) -> Tensor:
    """Each text's label-smoothed losses (B,T-1), 0 where there is no label, from the scores at every position."""
    log_probs = logits[:, :-1].log_softmax(dim=-1)
    wanted = labels[:, 1:]
    own = log_probs.gather(2, wanted.clamp(min=0)[:, :, None])[:, :, 0]
    return -(0.9 * own + 0.1 * log_probs.mean(dim=-1)).masked_fill(wanted == IGNORED, 0.0)


@pytest.mark.parametrize("name", list(CASES))
def test_only_predicted_tokens_are_scored_and_the_loss_stays(name: str) -> None:
    model = tiny(name)
    rows = rows_scored(model.text_decoder.cls)
    output = model(samples(name))
    parts = output.intermediate_output
    losses = losses_of_all(parts.decoder_output.logits, parts.decoder_labels)
    num_labels = int((parts.decoder_labels[:, 1:] != IGNORED).sum())
    assert rows == [num_labels, parts.decoder_labels.numel()]  # of the loss; of the outputs, when they are read
    assert num_labels < parts.decoder_labels.numel()
    expected = losses.sum() / num_labels
    if name == "vqa_rank":
        expected = (ANSWERS["weight"] * losses.sum(dim=1)).sum() / len(TEXTS)
    torch.testing.assert_close(output["loss_lm"], expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["caption", "vqa_rank"])
def test_gradients_are_those_of_all_positions(name: str) -> None:
    model = tiny(name)
    output = model(samples(name))
    output.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if name == "caption":
        parts = model(samples(name)).intermediate_output
        losses = losses_of_all(parts.decoder_output.logits, parts.decoder_labels)
        (losses.sum() / (parts.decoder_labels[:, 1:] != IGNORED).sum()).backward()
    else:
        states, mask = model.encode_questions(samples(name))
        context = model.text_decoder.bert.project_kv(states, mask=mask).select(torch.tensor([0, 1, 1]))
        ids, counted = model.tokenize(ANSWERS["answer"], start=model.decoder_start)
        logits = model.text_decoder(ids, counted, context=context)[0]
        losses = losses_of_all(logits, model.labels(ids)).sum(dim=1)
        ((ANSWERS["weight"] * losses).sum() / len(TEXTS)).backward()
    for key, own in gradients.items():
        expected = dict(model.named_parameters())[key].grad
        assert expected is not None
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_the_q_former_scores_predicted_tokens_only() -> None:
    model = tiny("blip2")
    rows = rows_scored(model.Qformer.cls)
    output = model(samples("blip2"))
    ids, mask = model.tokenize(TEXTS, max_length=model.max_txt_len)
    assert rows == [int(mask[:, 1:].sum())]
    ids[:, 0] = model.decoder_start
    context = model.project_kv(model.encode_image(samples("blip2")["image"]))
    _, cache = model.Qformer(model.query_tokens, context=context)
    logits = model.Qformer.logits(model.Qformer(None, ids, mask, past=cache)[0])
    labels = model.labels(ids)
    expected = losses_of_all(logits, labels).sum() / (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(output["loss_lm"], expected.detach(), rtol=1e-6, atol=1e-6)
