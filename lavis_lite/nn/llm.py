"""Language models of transformers behind one face: losses, generation and candidate losses from embedded inputs.

A causal model reads [image queries, text]; an encoder-decoder's encoder does, and its decoder writes. Generation goes
through `decoding.py`, so that results do not depend on transformers' version, and reads the inputs once for all beams
and candidates. Surprising: inputs may be padded anywhere; before a text is written their padding moves to the front,
so that each sample is read as if it were alone. A frozen model runs in its own precision, outside autocast.

Letters: B samples, S tokens of input, T tokens of text, M candidates, N rows, E width, V vocabulary.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lavis_lite.common.errors import InputError
from lavis_lite.nn.decoding import Decoded, DecodingConfig, GenerationConfig, decode
from lavis_lite.nn.llm_loading import load_language_model
from lavis_lite.nn.llm_sources import has_weights, language_model_config
from lavis_lite.nn.losses import IGNORED

__all__ = ["LanguageModel", "Prefix", "has_weights", "language_model_config", "load_language_model"]

STEP_BYTES = 4 << 30
"""Memory for the candidates that are scored at once: each has a copy of its sample's keys and values, 0.5 MB a token
with Vicuna-7B. With it and its inputs' own keys and values (32 samples of 200 tokens: 3.4 GB), 24 GB hold the model.
"""
RELATIVE_POSITIONS = 2048
"""Longest input and text, in tokens, of a model whose positions are relative and unlimited, such as T5:
its attention takes memory with the square of the length. Flan-T5 was tuned with inputs of this length.
"""
BYTES_PER_LOGIT = 12
"""Logits in the model's precision, in float32, and their log-softmax."""


@dataclass(frozen=True)
class LanguageModelCache:
    """What a language model has read: its keys and values, and which tokens count.

    `mask` is (N,S), of everything read by a causal model or by the encoder; `encoder` (N,S,E) are the encoder's states.
    """

    past: Any
    mask: Tensor
    encoder: Tensor | None = None

    def expand(self, times: int) -> Self:
        """Every row repeated, copies side by side; this cache stays as it is."""
        return self.rows(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(times))

    def rows(self, index: Tensor) -> Self:
        """A cache of these rows, of which one may come up several times; this cache stays as it is."""
        past = copy.deepcopy(self.past, {id(tensor): tensor for tensor in self._tensors()})  # selecting copies them
        past.reorder_cache(index)
        encoder = None if self.encoder is None else self.encoder[index]
        return replace(self, past=past, mask=self.mask[index], encoder=encoder)

    @property
    def row_bytes(self) -> int:
        """What one row takes."""
        encoder = () if self.encoder is None else (self.encoder,)
        return sum(tensor.nbytes for tensor in (*self._tensors(), *encoder)) // len(self.mask)

    def _tensors(self) -> Iterator[Tensor]:
        past = self.past
        parts = (past.self_attention_cache, past.cross_attention_cache) if _has_two_parts(past) else (past,)
        for layer in (layer for part in parts for layer in part.layers):
            for value in vars(layer).values():  # linear attention has dictionaries of its states
                values = value.values() if isinstance(value, dict) else (value,)
                yield from (one for one in values if isinstance(one, Tensor))

    def select(self, index: Tensor) -> Self:
        """These rows, each of the same sample as the row it replaces, in place: inputs need no reordering."""
        past = self.past.self_attention_cache if _has_two_parts(self.past) else self.past
        past.reorder_cache(index)
        return self


@dataclass(frozen=True)
class Prefix:
    """Inputs that were read once: logits (B,V) of the first token to write, float32, and the cache."""

    logits: Tensor
    cache: LanguageModelCache


def _has_two_parts(past: Any) -> bool:
    """Whether there are keys and values of what is written, and of what the encoder read."""
    return isinstance(past, EncoderDecoderCache)


def _contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With the last tokens' states cut out of all, a frozen output layer would be copied once a sample."""
    return (args[0].contiguous(), *args[1:])


class LanguageModel:
    """The face of a causal or encoder-decoder model. It holds the model, of which it is no part.

    `end_id` ends a text and `start_id` stands before it (for a decoder; a causal model never reads it, but lengths and
    the repetition penalty count it). `max_positions` limits inputs and text, in tokens; it may be set.
    """

    def __init__(self, model: PreTrainedModel, *, start_id: int, end_id: int, pad_id: int) -> None:
        self.model = model
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.is_encoder_decoder: bool = model.config.is_encoder_decoder
        self.width: int = model.get_input_embeddings().weight.shape[1]
        own_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions: int = own_positions or RELATIVE_POSITIONS
        encoder = model.get_encoder() if self.is_encoder_decoder else None  # Pegasus's and Marian's scale ids only
        self._embedding_scale: float = getattr(encoder, "embed_scale", None) or 1.0
        self._accepted = frozenset(inspect.signature(model.forward).parameters)  # names only: these can be pickled
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)

    @property
    def dtype(self) -> torch.dtype:
        """What embeddings are given in."""
        return self.model.get_input_embeddings().weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (...,E) of ids, as the model makes them of ids itself."""
        return self.model.get_input_embeddings()(ids) * self._embedding_scale

    def decoding(self, generation: GenerationConfig, **settings: Any) -> DecodingConfig:
        """Return decoding settings with this model's end and padding tokens; lengths count the start token."""
        return DecodingConfig.of(generation, eos_id=self.end_id, pad_id=self.pad_id, **settings)

    def logits(self, embeds_BSE: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> Tensor:
        """What the model predicts for each label: (B,T,V), float32.

        For a causal model the labels are those of the last T tokens of the input; for an encoder-decoder, what is
        written about the input. -100 is no label.
        """
        num_labels = labels_BT.shape[1]
        if not self.is_encoder_decoder:
            return self._causal(embeds_BSE, mask_BS, keep=num_labels + 1)[0][:, :-1]
        self._check_length(embeds_BSE.shape[1], num_labels)
        before = F.pad(labels_BT[:, :-1], (1, 0), value=self.start_id)
        with self._own_precision(embeds_BSE):
            output = self.model(
                inputs_embeds=embeds_BSE.to(self.dtype),
                attention_mask=mask_BS,
                decoder_input_ids=before.masked_fill(before == IGNORED, self.pad_id),
                decoder_attention_mask=(labels_BT != IGNORED).long(),
                use_cache=False,
            )
        return output.logits.float()

    def loss(self, embeds_BSE: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy averaged over the labels that count."""
        logits = self.logits(embeds_BSE, mask_BS, labels_BT)
        return F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def generate(self, embeds_BSE: Tensor, mask_BS: Tensor, config: DecodingConfig) -> Decoded:
        """Generate `num_captions` texts after each input, the start token first.

        Raises ValueError if inputs and text do not fit the model's context.
        """
        config = config.resolved(1)
        self._check_length(embeds_BSE.shape[1], config.max_length - 1)  # the last token is not read
        prefix = self.prefix(embeds_BSE, mask_BS)

        def step(new_ids: Tensor, cache: LanguageModelCache | None, length: int) -> tuple[Tensor, LanguageModelCache]:
            if cache is None:
                return prefix.logits, prefix.cache
            logits, cache = self.extend(cache, new_ids)
            return logits[:, -1], cache

        return decode(step, mask_BS.new_full((len(mask_BS), 1), self.start_id), config)

    @torch.no_grad()
    def prefix(self, embeds_BSE: Tensor, mask_BS: Tensor) -> Prefix:
        """Read the inputs. A causal model's padding moves to the front: behind it all distances are as without it."""
        if not self.is_encoder_decoder:
            order = mask_BS.argsort(dim=1, stable=True)
            mask_BS = mask_BS.gather(1, order)
            embeds_BSE = embeds_BSE.gather(1, order[:, :, None].expand_as(embeds_BSE))
            logits, past = self._causal(embeds_BSE, mask_BS, keep=1, use_cache=True)
            return Prefix(logits[:, -1], LanguageModelCache(past, mask_BS))
        self._check_length(embeds_BSE.shape[1])
        with self._own_precision(embeds_BSE):
            encoder = self.model.get_encoder()(inputs_embeds=embeds_BSE.to(self.dtype), attention_mask=mask_BS)
        start = mask_BS.new_full((len(mask_BS), 1), self.start_id)
        logits, past = self._decoder(start, None, mask_BS, encoder.last_hidden_state)
        return Prefix(logits[:, -1], LanguageModelCache(past, mask_BS, encoder.last_hidden_state))

    @torch.no_grad()
    def extend(self, cache: LanguageModelCache, ids_NT: Tensor) -> tuple[Tensor, LanguageModelCache]:
        """Read more text: logits (N,T,V) behind each of its tokens, and the cache, which is used up."""
        if self.is_encoder_decoder:
            logits, past = self._decoder(ids_NT, cache.past, cache.mask, cache.encoder)
            return logits, replace(cache, past=past)
        mask = torch.cat([cache.mask, torch.ones_like(ids_NT)], dim=1)
        num_tokens = ids_NT.shape[1]
        logits, past = self._causal(self.embed(ids_NT), mask, keep=num_tokens, past=cache.past, use_cache=True)
        return logits, replace(cache, past=past, mask=mask)

    @torch.no_grad()
    def candidate_losses(self, prefix: Prefix, ids_BMT: Tensor, mask_BMT: Tensor) -> Tensor:
        """Negative log-likelihood of each candidate text behind the inputs, summed over its tokens: (B,M), inf for one
        without tokens. Ids and mask of one sample are those of all.

        The longest are scored first, as many at once as `STEP_BYTES` hold. Raises ValueError if inputs and candidates
        do not fit the model's context.
        """
        num_samples, (num_candidates, longest) = len(prefix.logits), ids_BMT.shape[1:]
        self._check_length(prefix.cache.mask.shape[1], longest - (not self.is_encoder_decoder))
        ids_BMT, mask_BMT = (t.expand(num_samples, -1, -1) for t in (ids_BMT, mask_BMT))
        first = -F.log_softmax(prefix.logits, dim=-1).gather(1, ids_BMT[:, :, 0])
        losses = first.masked_fill(mask_BMT[:, :, 0] == 0, torch.inf).flatten()
        ids, labels = ids_BMT.flatten(0, 1), ids_BMT.masked_fill(mask_BMT == 0, IGNORED).flatten(0, 1)
        lengths, order = mask_BMT.sum(dim=2).flatten().sort(descending=True, stable=True)
        widths = lengths[lengths > 1].tolist()  # a text of one token needs no further reading
        row_bytes = 2 * prefix.cache.row_bytes  # the copy, and what it grows to
        at_once = max(1, STEP_BYTES // (row_bytes + BYTES_PER_LOGIT * prefix.logits.shape[1] * longest))
        for begin in range(0, len(widths), at_once):
            rows, width = order[begin : min(begin + at_once, len(widths))], widths[begin]
            logits, _ = self.extend(prefix.cache.rows(rows // num_candidates), ids[rows, : width - 1])
            wanted = labels[rows, 1:width].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="none")
            losses[rows] += loss.view(len(rows), -1).sum(dim=1)
        return losses.view(num_samples, num_candidates)

    def _causal(
        self, embeds_NTE: Tensor, mask_NS: Tensor, *, keep: int, past: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits of the last `keep` tokens and the cache; the mask covers what the cache holds too."""
        self._check_length(mask_NS.shape[1])
        settings: dict[str, Any] = {}
        if "position_ids" in self._accepted:
            settings["position_ids"] = (mask_NS.cumsum(1) - 1).clamp(min=0)[:, -embeds_NTE.shape[1] :]
        if "logits_to_keep" in self._accepted:
            settings["logits_to_keep"] = keep
        with self._own_precision(embeds_NTE):
            output = self.model(
                inputs_embeds=embeds_NTE.to(self.dtype),
                attention_mask=mask_NS,
                past_key_values=past,
                use_cache=use_cache,
                **settings,
            )
        return output.logits[:, -keep:].float(), output.past_key_values

    def _decoder(self, ids_NT: Tensor, past: Any, mask_NS: Tensor, encoder_NSE: Tensor) -> tuple[Tensor, Any]:
        """Logits and cache of the decoder behind these tokens."""
        with self._own_precision(encoder_NSE):
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_NSE),
                attention_mask=mask_NS,
                decoder_input_ids=ids_NT,
                past_key_values=past,
                use_cache=True,
            )
        return output.logits.float(), output.past_key_values

    @contextlib.contextmanager
    def _own_precision(self, like: Tensor) -> Iterator[None]:
        """No autocast around a frozen model."""
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            yield
            return
        with torch.autocast(like.device.type, enabled=False):
            yield

    def _check_length(self, num_inputs: int, num_written: int = 0) -> None:
        """ValueError if that is too much; what an encoder-decoder writes has positions of its own."""
        num_tokens = max(num_inputs, num_written) if self.is_encoder_decoder else num_inputs + num_written
        if num_tokens > self.max_positions:
            raise InputError(
                f"image, prompt and text to write take {num_tokens} tokens, but the language model's context has "
                f"{self.max_positions}: shorten the prompt or lower the maximum length"
            )
