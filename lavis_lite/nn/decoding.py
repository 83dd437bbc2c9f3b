"""Beam search, greedy search and nucleus sampling with a key/value cache, for `bert.py`'s decoder and `llm.py`.

Our own, because results must not change with the version of another library. The rules are those the published BLIP
results were made with: log-probabilities are divided by length^penalty where the length counts the prompt but not the
end token; a text is finished when it has `num_beams` finished beams that no running beam can beat at its present
length. A language model's prompt is embedded, so that only its start token is counted here.

Letters: B texts, K beams, N = B x K rows, L length so far, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.errors import InputError


class Cache(Protocol):
    """What a model keeps of the tokens read so far, N rows; the old object may be used up by both methods."""

    def expand(self, times: int) -> Self:
        """Repeat every row, copies side by side."""

    def select(self, index: Tensor) -> Self:
        """Return these rows (N,), each of the same text as the row it replaces."""


Step = Callable[[Tensor, Any, int], tuple[Tensor, Any]]
"""(new ids (N,T), Cache or None, total length) -> logits of the next token (N,V) and the new Cache."""


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to decode; lengths are in tokens and count the prompt. With `sample` beams count nothing, without it `top_p`
    and `temperature` do not.
    """

    eos_id: int
    pad_id: int
    max_length: int
    min_length: int = 0
    num_beams: int = 1
    num_return: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 1.0
    temperature: float = 1.0
    max_positions: int | None = None
    """Positions of the text transformer, each text's own; the last token needs none, because it is not read."""
    num_uncounted: int = 0
    """Tokens of `max_length` and of the prompt that the caller did not count; messages leave them out."""

    def __post_init__(self) -> None:
        for name in ("max_length", "min_length", "num_beams", "num_return"):
            if not isinstance(getattr(self, name), Integral):
                raise InputError(f"{name} must be a whole number; got {getattr(self, name)!r}")
        for name in ("length_penalty", "repetition_penalty", "top_p", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number; got {value!r}")
        if self.num_beams < 1 or self.num_return < 1:
            raise InputError(
                f"num_beams {self.num_beams} and the number of captions {self.num_return} must be at least 1"
            )
        if not self.sample and self.num_return > self.num_beams:
            raise InputError(
                f"{self.num_return} captions an image need as many beams (num_beams is {self.num_beams}) "
                "or nucleus sampling"
            )
        if self.min_length > self.max_length:
            given = self.max_length - self.num_uncounted
            raise InputError(f"min_length {self.min_length} is above max_length {given}: lower it, or raise max_length")
        if self.max_positions is not None and self.max_length - 1 > self.max_positions:
            raise InputError(
                f"max_length {self.max_length} is more than the text transformer's {self.max_positions} positions "
                f"allow: set it to {self.max_positions + 1} or less"
            )
        if not 0.0 < self.top_p <= 1.0 or self.temperature <= 0.0 or self.repetition_penalty <= 0.0:
            raise InputError(
                f"top_p {self.top_p} must lie in (0, 1], temperature {self.temperature} and "
                f"repetition_penalty {self.repetition_penalty} above 0"
            )


@torch.no_grad()
def decode(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Tensor:
    """Token ids (B x num_return, L'), prompt first, padded behind the end token."""
    if prompt_BL.shape[1] >= config.max_length:
        raise InputError(
            f"the prompt has {prompt_BL.shape[1] - config.num_uncounted} tokens, which leaves nothing to generate "
            f"below max_length {config.max_length - config.num_uncounted}: shorten it, or raise max_length"
        )
    if config.num_beams > 1 and not config.sample:
        return beam_search(step, prompt_BL, config)
    return greedy_or_sample(step, prompt_BL, config)


def process_scores(scores_NV: Tensor, ids_NL: Tensor, config: DecodingConfig) -> Tensor:
    """Forbid the end token below the minimum length and penalise tokens that were used already (CTRL, section 4.1)."""
    if config.repetition_penalty != 1.0:
        used = scores_NV.gather(1, ids_NL)
        used = torch.where(used < 0, used * config.repetition_penalty, used / config.repetition_penalty)
        scores_NV = scores_NV.scatter(1, ids_NL, used)
    if ids_NL.shape[1] < config.min_length:
        scores_NV = scores_NV.index_fill(1, torch.tensor([config.eos_id], device=scores_NV.device), -torch.inf)
    return scores_NV


def greedy_or_sample(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Tensor:
    """The likeliest token at each step, or one drawn from the nucleus."""
    logits, cache = step(prompt_BL, None, prompt_BL.shape[1])
    ids = prompt_BL
    if config.sample and config.num_return > 1:
        logits, cache = logits.repeat_interleave(config.num_return, 0), cache.expand(config.num_return)
        ids = ids.repeat_interleave(config.num_return, 0)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    while True:
        scores = process_scores(logits.float(), ids, config)
        token = sample_nucleus(scores, config.top_p, config.temperature) if config.sample else scores.argmax(-1)
        token = torch.where(running, token, config.pad_id)
        ids = torch.cat([ids, token[:, None]], dim=1)
        running = running & (token != config.eos_id)
        if ids.shape[1] >= config.max_length or not running.any():
            return ids
        logits, cache = step(token[:, None], cache, ids.shape[1])


def sample_nucleus(scores_NV: Tensor, top_p: float, temperature: float) -> Tensor:
    """One token a row (N,) from the smallest set of likeliest tokens whose probability reaches top_p."""
    probabilities, order = (scores_NV / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    drawn = torch.multinomial(probabilities.masked_fill(before >= top_p, 0.0), 1)
    return order.gather(1, drawn).squeeze(1)


def beam_search(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Tensor:
    """The best `num_return` of `num_beams` beams a text."""
    num_texts, beams = len(prompt_BL), config.num_beams
    logits, cache = step(prompt_BL, None, prompt_BL.shape[1])
    logits, cache = logits.repeat_interleave(beams, 0), cache.expand(beams)
    state = _Beams.start(prompt_BL, config)
    while True:
        scores = process_scores(F.log_softmax(logits.float(), dim=-1), state.ids.flatten(0, 1), config)
        row = state.advance(scores.view(num_texts, beams, -1))
        length = state.ids.shape[2]
        if length >= config.max_length or bool(state.done.all()):
            return state.finish()
        cache = cache.select(row)
        logits, cache = step(state.ids[:, :, -1].reshape(-1, 1), cache, length)


@dataclass
class _Beams:
    """The running beams and the best finished ones of every text."""

    config: DecodingConfig
    ids: Tensor  # (B,K,L) running
    scores: Tensor  # (B,K) summed log-probabilities of the running beams
    finished: Tensor  # (B,K,max_length) padded
    finished_scores: Tensor  # (B,K) length-normalised; -inf where the slot is free
    done: Tensor  # (B,)

    @classmethod
    def start(cls, prompt_BL: Tensor, config: DecodingConfig) -> "_Beams":
        shape = (len(prompt_BL), config.num_beams)
        scores = prompt_BL.new_full(shape, -1e9, dtype=torch.float)
        scores[:, 0] = 0.0  # all beams start equal: only the first may be continued at the first step
        return cls(
            config=config,
            ids=prompt_BL[:, None].expand(-1, config.num_beams, -1),
            scores=scores,
            finished=prompt_BL.new_full((*shape, config.max_length), config.pad_id),
            finished_scores=torch.full_like(scores, -torch.inf),
            done=torch.zeros(shape[0], dtype=torch.bool, device=prompt_BL.device),
        )

    def advance(self, log_probs_BKV: Tensor) -> Tensor:
        """Extend every beam by one token; returns the rows (N,) of the cache that the new beams continue."""
        num_texts, beams, vocabulary = log_probs_BKV.shape
        totals = (log_probs_BKV + self.scores[:, :, None]).flatten(1)
        scores, flat = totals.topk(2 * beams, dim=1)
        origin, token = flat // vocabulary, flat % vocabulary
        ended = token == self.config.eos_id
        length = self.ids.shape[2]
        in_beam = torch.arange(2 * beams, device=flat.device) < beams
        candidates = self.ids.gather(1, origin[:, :beams, None].expand(-1, -1, length))
        self._add_finished(candidates, scores[:, :beams].masked_fill(~(ended & in_beam)[:, :beams], -torch.inf))
        attainable = scores[:, 0] / length**self.config.length_penalty
        self.done = self.done | (self.finished_scores[:, -1] >= attainable)
        self.scores, best = scores.masked_fill(ended, -torch.inf).topk(beams, dim=1)
        origin, token = origin.gather(1, best), token.gather(1, best)
        self.ids = torch.cat([self.ids.gather(1, origin[:, :, None].expand(-1, -1, length)), token[:, :, None]], dim=2)
        offset = torch.arange(num_texts, device=flat.device)[:, None] * beams
        return (origin + offset).flatten()

    def _add_finished(self, ids_BKL: Tensor, scores_BK: Tensor, *, end: bool = True) -> None:
        """Keep the best K of the finished beams and these, whose scores are sums; texts that are done take no more."""
        length = ids_BKL.shape[2]
        scores = (scores_BK / length**self.config.length_penalty).masked_fill(self.done[:, None], -torch.inf)
        new = torch.full_like(self.finished, self.config.pad_id)
        new[:, :, :length] = ids_BKL
        if end:
            new[:, :, length] = self.config.eos_id
        merged = torch.cat([self.finished_scores, scores], dim=1)
        self.finished_scores, best = merged.topk(self.config.num_beams, dim=1)
        pool = torch.cat([self.finished, new], dim=1)
        self.finished = pool.gather(1, best[:, :, None].expand(-1, -1, pool.shape[2]))

    def finish(self) -> Tensor:
        """The best beams, (B x num_return, longest)."""
        self._add_finished(self.ids, self.scores, end=False)
        ids = self.finished[:, : self.config.num_return].flatten(0, 1)
        used = (ids != self.config.pad_id).any(dim=0).nonzero()
        return ids[:, : int(used[-1]) + 1 if len(used) else 1]
