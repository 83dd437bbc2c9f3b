"""Beam search, greedy search and nucleus sampling with a key/value cache, and their settings.

Independent of transformers, whose results change between versions. The rules are those of the published BLIP results:
a beam's sum of log-probabilities is divided by length^penalty, where the length counts the prompt but not the end
token; a text is finished when it has `num_beams` finished beams that no running beam can beat at its present length.
A language model's prompt is embedded, so that only its start token is counted here.

Letters: B texts, K beams, N = B x K rows, L length so far, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.bounds import MAX_TOKENS, Bounds, check_number
from lavis_lite.common.errors import InputError, InputTypeError
from lavis_lite.nn.few_rows import FewRows
from lavis_lite.nn.sampling import draw

ALIASES = {
    "max_len": "max_length",
    "min_len": "min_length",
    "do_sample": "use_nucleus_sampling",
    "num_return_sequences": "num_captions",
}
"""Other names of settings: LAVIS's in `predict_answers`, and transformers'."""
BOUNDS: dict[str, Bounds] = {
    "max_length": (1, MAX_TOKENS),
    "min_length": (0, MAX_TOKENS),
    "max_new_tokens": (1, MAX_TOKENS),
    "min_new_tokens": (0, MAX_TOKENS),
    "num_beams": (1, 1000),
    "num_captions": (1, 1000),
    "top_p": (1e-6, 1.0),
    "temperature": (1e-6, 1e6),
    "repetition_penalty": (1e-6, 1e6),
    "length_penalty": (-1000.0, 1000.0),
}
"""Least and largest value of each setting; between two integers only whole numbers are allowed."""
READ_EVERY = 8
"""Tokens between two looks at a GPU whether all texts have ended."""


class Watch(Protocol):
    """Follows the texts of one or more calls of `decode`; what a method raises ends the decoding."""

    def token(self, ids_NL: Tensor | None, num_prompt: int) -> None:
        """Take the texts after each token: the `num_prompt` tokens of the prompt come first, padding after the end. A
        beam search, whose texts may change until its end, gives None.
        """
        ...

    def end(self, is_cut: list[bool]) -> None:
        """Take which of the N texts were cut at the greatest length, without an end token."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of generating text; lengths are in tokens.

    What `max_length` and `min_length` count depends on the architecture: BLIP and the Q-Former count `[DEC]` and the
    prompt, a causal language model counts one start token, an encoder-decoder only what it generates.
    `max_new_tokens` and `min_new_tokens` replace them and count, for all architectures, what follows the prompt, the
    end token included.
    """

    max_length: int
    min_length: int = 0
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    num_beams: int = 1
    use_nucleus_sampling: bool = False
    """Sample, one beam per text; `num_beams` is then ignored. Without it `top_p` and `temperature` are."""
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_captions: int = 1
    """Texts per image; with beam search at most `num_beams`."""
    watch: Watch | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            if (value := vars(self)[name]) is not None:
                check_number(name, value, least, most)
        if not self.use_nucleus_sampling and self.num_captions > self.num_beams:
            found = f"num_captions: {self.num_captions} is more than num_beams {self.num_beams}"
            raise InputError(f"{found}; raise num_beams, or set use_nucleus_sampling")

    def changed(self, *unnamed: Any, **changes: Any) -> Self:
        """Return these settings with others in their place; None leaves a setting as it is.

        Settings may be given by the names of LAVIS and transformers (`ALIASES`, `max_new_tokens`).

        Raises:
            InputError: a setting is unknown, given under two names, or out of bounds.
            TypeError: one is given without its name.
        """
        if unnamed:
            raise InputTypeError(f"generation settings are given by name, such as num_beams=3; got {unnamed[0]!r}")
        known = [field.name for field in fields(GenerationConfig)]
        given: dict[str, str] = {}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            setting = ALIASES.get(name, name)
            if setting not in known:
                raise InputError(f"{name}: unknown generation setting; these are {', '.join([*known, *ALIASES])}")
            if value is None:
                continue
            limit = setting.replace("new_tokens", "length")
            if limit in given:
                raise InputError(f"{given[limit]} and {name} are the same setting: give one of them")
            given[limit] = name
            if limit in ("max_length", "min_length"):
                values[limit.replace("length", "new_tokens")] = None
            values[setting] = value
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(GenerationConfig):
    """Generation settings of one model: its tokens and positions; lengths count the prompt."""

    eos_id: int
    pad_id: int
    max_positions: int | None = None
    """Positions of the text transformer; the last token needs none, because it is not read."""
    num_uncounted: int = 0
    """Tokens of `max_length` and of the prompt that the caller did not count; messages leave them out."""
    return_scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None or self.min_new_tokens is not None:
            return  # lengths follow from the prompt: see `resolved`
        given = self.max_length - self.num_uncounted
        if self.min_length > self.max_length:
            raise InputError(f"min_length {self.min_length} is above max_length {given}: lower it, or raise max_length")
        if self.max_positions is not None and self.max_length - 1 > self.max_positions:
            most = self.max_positions + 1 - self.num_uncounted
            raise InputError(f"max_length: the text transformer's positions allow at most {most}, got {given}")

    @classmethod
    def of(cls, generation: GenerationConfig, *, num_uncounted: int = 0, **model: Any) -> Self:
        """Return the settings for a model (`eos_id`, `pad_id` ...) that counts `num_uncounted` tokens more."""
        lengths = {"max_length": generation.max_length + num_uncounted, "num_uncounted": num_uncounted}
        return cls(**{**vars(generation), **lengths, **model})

    def resolved(self, prompt_length: int) -> Self:
        """Return the settings with `max_new_tokens` and `min_new_tokens` as lengths after a prompt of `prompt_length`
        tokens, start token included.
        """
        lengths: dict[str, Any] = {"max_new_tokens": None, "min_new_tokens": None}
        if self.max_new_tokens is not None:
            lengths["max_length"] = prompt_length + self.max_new_tokens
        if self.min_new_tokens is not None:
            lengths["min_length"] = prompt_length + self.min_new_tokens
        return replace(self, **lengths)


ScoredText = tuple[str, float]


class Decoded(NamedTuple):
    """Token ids (N,L), prompt first, padded after the end token, and with `return_scores` the scores (N,).

    A score is the sum of the log-probabilities of the tokens after the prompt, end token included, divided by
    length^length_penalty; the length counts the prompt but not the end token. With beam search it is what ranks the
    beams, repetition penalty included; with greedy search and sampling it is of the model's own probabilities, before
    penalty, temperature and nucleus.
    """

    ids: Tensor
    scores: Tensor | None = None

    def with_scores(self, texts: list[str]) -> list[str | ScoredText]:
        """Return the decoded texts, or with scores pairs (text, score)."""
        return [*texts] if self.scores is None else list(zip(texts, self.scores.tolist(), strict=True))


Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(new ids (N,T), cache or None) -> logits of the next token (N,V) and the new cache.

A cache has N rows: `expand(times)` repeats every row, copies side by side; `select(index)` returns these rows (N,),
each of the same text as the row it replaces. Both may use up the old cache.
"""


@torch.no_grad()
def decode(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Decoded:
    """Generate `num_captions` texts after each prompt."""
    num_prompt = prompt_BL.shape[1]
    config = config.resolved(num_prompt)
    check_prompt(num_prompt, config)
    has_beams = config.num_beams > 1 and not config.use_nucleus_sampling
    with FewRows() if prompt_BL.device.type == "cpu" else nullcontext():
        decoded = (beam_search if has_beams else greedy_or_sample)(step, prompt_BL, config)
    if config.watch is not None:
        config.watch.end((decoded.ids[:, num_prompt:] != config.eos_id).all(dim=1).tolist())
    return decoded


def check_prompt(num_tokens: int, config: DecodingConfig) -> None:
    """Raise InputError if a prompt leaves no token to generate."""
    if num_tokens >= config.max_length:
        given, most = (length - config.num_uncounted for length in (num_tokens, config.max_length))
        raise InputError(f"the prompt's {given} tokens leave none to generate: raise max_length {most}, or shorten it")


def process_scores(scores_NV: Tensor, ids_NL: Tensor, config: DecodingConfig) -> Tensor:
    """Forbid the end token below the minimum length and penalise tokens that were used already (CTRL, section 4.1)."""
    if config.repetition_penalty != 1.0:
        used = scores_NV.gather(1, ids_NL)
        used = torch.where(used < 0, used * config.repetition_penalty, used / config.repetition_penalty)
        scores_NV = scores_NV.scatter(1, ids_NL, used)
    if ids_NL.shape[1] < config.min_length:
        scores_NV = scores_NV.clone()
        scores_NV[:, config.eos_id] = -torch.inf
    return scores_NV


def may_read(num_written: int, device: torch.device) -> bool:
    """Return whether to look if all texts have ended: on a CPU after each token, else after every `READ_EVERY`-th.

    Reading waits for the device, and tokens after the end change nothing.
    """
    return device.type == "cpu" or num_written % READ_EVERY == 0


def greedy_or_sample(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Decoded:
    """Take the likeliest token at each step, or draw one from the nucleus."""
    logits, cache = step(prompt_BL, None)
    cache = cache.expand(config.num_captions)
    logits, ids = (rows.repeat_interleave(config.num_captions, 0) for rows in (logits, prompt_BL))
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    width = torch.full((), ids.shape[1], device=ids.device)  # up to the last text's end
    sums = torch.zeros(len(ids), device=ids.device)
    lengths = torch.full_like(sums, ids.shape[1])
    while True:
        scores = process_scores(logits.float(), ids, config)
        if config.use_nucleus_sampling:
            token = sample_nucleus(scores, config.top_p, config.temperature)
        else:
            token = scores.argmax(-1)
        if config.return_scores:
            log_probs = F.log_softmax(logits.float(), dim=-1).gather(1, token[:, None])[:, 0]
            sums = sums + torch.where(running, log_probs, 0.0)
        token = torch.where(running, token, config.pad_id)
        ids, width = torch.cat([ids, token[:, None]], dim=1), width + running.any()
        running = running & (token != config.eos_id)
        if config.return_scores:
            lengths = lengths + running
        if config.watch is not None:
            config.watch.token(ids, prompt_BL.shape[1])
        num_written = ids.shape[1] - prompt_BL.shape[1]
        if ids.shape[1] >= config.max_length or (may_read(num_written, ids.device) and not running.any()):
            own_scores = sums / lengths**config.length_penalty if config.return_scores else None
            return Decoded(ids[:, : int(width)], own_scores)
        logits, cache = step(token[:, None], cache)


def sample_nucleus(scores_NV: Tensor, top_p: float, temperature: float) -> Tensor:
    """Draw one token per row (N,) from the smallest set of likeliest tokens whose probability reaches top_p."""
    probabilities, order = (scores_NV / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    drawn = draw(probabilities.masked_fill(before >= top_p, 0.0))
    return order.gather(1, drawn[:, None]).squeeze(1)


def beam_search(step: Step, prompt_BL: Tensor, config: DecodingConfig) -> Decoded:
    """Return the best `num_captions` of `num_beams` beams per text."""
    num_texts, beams = len(prompt_BL), config.num_beams
    logits, cache = step(prompt_BL, None)
    logits, cache = logits.repeat_interleave(beams, 0), cache.expand(beams)
    state = _Beams(prompt_BL, config)
    while True:
        scores = process_scores(F.log_softmax(logits.float(), dim=-1), state.ids.flatten(0, 1), config)
        row = state.advance(scores.view(num_texts, beams, -1))
        if config.watch is not None:
            config.watch.token(None, prompt_BL.shape[1])
        length = state.ids.shape[2]
        num_written = length - prompt_BL.shape[1]
        if length >= config.max_length or (may_read(num_written, state.ids.device) and bool(state.done.all())):
            return state.finish()
        cache = cache.select(row)
        logits, cache = step(state.ids[:, :, -1].reshape(-1, 1), cache)


class _Beams:
    """Running beams and the best finished ones of every text."""

    def __init__(self, prompt_BL: Tensor, config: DecodingConfig) -> None:
        shape = (len(prompt_BL), config.num_beams)
        self.config = config
        self.ids = prompt_BL[:, None].expand(-1, config.num_beams, -1)
        """(B,K,L), of the running beams."""
        self.scores = prompt_BL.new_full(shape, -1e9, dtype=torch.float)
        """(B,K), summed log-probabilities of the running beams."""
        self.scores[:, 0] = 0.0  # all beams start equal: only the first may be continued at the first step
        self.finished = prompt_BL.new_full((*shape, config.max_length), config.pad_id)
        self.finished_scores = torch.full_like(self.scores, -torch.inf)
        """(B,K), length-normalised; -inf where the slot is free."""
        self.done = torch.zeros(shape[0], dtype=torch.bool, device=prompt_BL.device)

    def advance(self, log_probs_BKV: Tensor) -> Tensor:
        """Extend every beam by one token and return the rows (N,) of the cache that the new beams continue."""
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

    def finish(self) -> Decoded:
        """Return the best beams, (B x num_captions, longest)."""
        self._add_finished(self.ids, self.scores, end=False)
        best = slice(self.config.num_captions)
        ids = self.finished[:, best].flatten(0, 1)
        used = (ids != self.config.pad_id).any(dim=0).nonzero()
        ids = ids[:, : int(used[-1]) + 1 if len(used) else 1]
        return Decoded(ids, self.finished_scores[:, best].flatten() if self.config.return_scores else None)
