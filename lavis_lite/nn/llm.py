"""One interface to transformers' causal and encoder-decoder language models: losses, generation, candidate losses.

A causal model reads [image queries, text]; of an encoder-decoder the encoder does, and the decoder writes. Inputs are
embeddings, and are read once for all beams and candidates. Note: inputs may be padded anywhere; before generation their
padding moves to the front, so that each sample is read as if it were alone. A frozen model runs in its own precision,
outside autocast.

Letters: B samples, S tokens of input, T tokens of text, M candidates, N rows, E width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from lavis_lite.common.errors import InputError
from lavis_lite.common.precision import without_autocast
from lavis_lite.common.transfer import upload
from lavis_lite.nn.decoding import Decoded, DecodingConfig, GenerationConfig, check_prompt, decode
from lavis_lite.nn.llm_cache import LLMCache
from lavis_lite.nn.llm_sources import forward_parameters
from lavis_lite.nn.lora import embedding_weight
from lavis_lite.nn.losses import IGNORED, NextTokens

STEP_BYTES = 4 << 30
"""Memory for the candidates that are scored at once: each has a copy of its sample's keys and values, 0.5 MB per token
with Vicuna-7B. With it and its inputs' own keys and values (32 samples of 200 tokens: 3.4 GB), 24 GB hold the model.
"""
RELATIVE_POSITIONS = 2048
"""Longest input and text, in tokens, of a model with relative positions and no limit, such as T5: its attention takes
memory with the square of the length. Flan-T5 was tuned with inputs of this length.
"""
BYTES_PER_LOGIT = 12
"""Logits in the model's precision, in float32, and their log-softmax."""


class Prefix(NamedTuple):
    """Inputs that were read once: logits (B,V) of the first token to generate, float32, and the cache."""

    logits: Tensor
    cache: LLMCache


class LLMAdapter:
    """A causal or encoder-decoder model, held without registering it as a submodule.

    `end_id` ends a text and `start_id` begins it: a decoder reads it, a causal model never does, but lengths and the
    repetition penalty count it. `max_positions`, which may be set, limits inputs and text, in tokens.
    """

    def __init__(self, model: PreTrainedModel, *, start_id: int, end_id: int, pad_id: int) -> None:
        self.model = model
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.is_encoder_decoder: bool = model.config.is_encoder_decoder
        self.width: int = embedding_weight(model).shape[1]
        own_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions: int = own_positions or RELATIVE_POSITIONS
        # Pegasus' and Marian's encoders scale embeddings of ids, but not embeddings that they are given
        encoder: Any = model.get_encoder() if self.is_encoder_decoder else None
        self._embedding_scale: float = getattr(encoder, "embed_scale", None) or 1.0
        self._forward_parameters = forward_parameters(type(model))
        self._scored = _Scored()
        model.get_output_embeddings().register_forward_pre_hook(self._scored)

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers, of an encoder-decoder those of both."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of embeddings."""
        return embedding_weight(self.model).dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings (...,E) of ids, scaled as the model scales them."""
        return self.model.get_input_embeddings()(ids).to(ids.device) * self._embedding_scale

    def decoding(self, generation: GenerationConfig, **settings: Any) -> DecodingConfig:
        """Return decoding settings with this model's end and padding tokens; lengths count the start token."""
        return DecodingConfig.of(generation, eos_id=self.end_id, pad_id=self.pad_id, **settings)

    def logits(self, embeds_BSE: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the prediction of each label: (B,T,V), float32.

        A causal model's labels are those of the last T tokens of the input, an encoder-decoder's the text to write.
        -100 is not a label.
        """
        if not self.is_encoder_decoder:
            return self._causal(embeds_BSE, mask_BS, keep=labels_BT.shape[1] + 1)[0][:, :-1]
        return self._written(embeds_BSE, mask_BS, labels_BT)

    def loss(self, embeds_BSE: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the cross-entropy averaged over the labels, at whose positions alone the vocabulary is scored; labels
        as in `logits`, but on the CPU.
        """
        device, num_before = embeds_BSE.device, embeds_BSE.shape[1] - labels_BT.shape[1]
        if self.is_encoder_decoder:
            predicted = NextTokens.at(labels_BT).upload(device)
            with self._scored.only(predicted.positions):
                logits = self._written(embeds_BSE, mask_BS, upload(labels_BT, device))
        else:
            predicted = NextTokens.of(F.pad(labels_BT, (num_before, 0), value=IGNORED)).upload(device)
            with self._scored.only(predicted.positions):
                logits, _ = self._causal(embeds_BSE, mask_BS, keep=0)
        return F.cross_entropy(logits[0], predicted.labels)

    def _written(self, embeds_BSE: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> Tensor:
        """Return an encoder-decoder's prediction of each label: (B,T,V), float32."""
        self.check_length(embeds_BSE.shape[1], labels_BT.shape[1])
        shifted = F.pad(labels_BT[:, :-1], (1, 0), value=self.start_id)
        with self._precision(embeds_BSE.device):
            output = self.model(
                inputs_embeds=embeds_BSE.to(self.dtype),
                attention_mask=mask_BS,
                decoder_input_ids=shifted.masked_fill(shifted == IGNORED, self.pad_id),
                decoder_attention_mask=(labels_BT != IGNORED).long(),
                use_cache=False,
            )
        return output.logits.float()

    @torch.no_grad()
    def generate(self, embeds_BSE: Tensor, mask_BS: Tensor, config: DecodingConfig) -> Decoded:
        """Generate `num_captions` texts after each input, the start token first.

        Raises InputError if inputs and text do not fit the model's context.
        """
        config = self.check_room(embeds_BSE.shape[1], config)
        prefix = self.prefix(embeds_BSE, mask_BS)

        def step(new_ids: Tensor, cache: LLMCache | None) -> tuple[Tensor, LLMCache]:
            if cache is None:
                return prefix.logits, prefix.cache
            logits, cache = self.extend(cache, new_ids)
            return logits[:, -1], cache

        return decode(step, mask_BS.new_full((len(mask_BS), 1), self.start_id), config)

    @torch.no_grad()
    def prefix(self, embeds_BSE: Tensor, mask_BS: Tensor) -> Prefix:
        """Read the inputs. A causal model's padding moves to the front, where it changes no distance."""
        if not self.is_encoder_decoder:
            order = mask_BS.argsort(dim=1, stable=True)
            mask_BS = mask_BS.gather(1, order)
            embeds_BSE = embeds_BSE.gather(1, order[:, :, None].expand_as(embeds_BSE))
            logits, past = self._causal(embeds_BSE, mask_BS, keep=1, use_cache=True)
            return Prefix(logits[:, -1], LLMCache(past, mask_BS))
        self.check_length(embeds_BSE.shape[1])
        with self._precision(embeds_BSE.device):
            encoder = self.model.get_encoder()(inputs_embeds=embeds_BSE.to(self.dtype), attention_mask=mask_BS)
        start = mask_BS.new_full((len(mask_BS), 1), self.start_id)
        cache = LLMCache(None, mask_BS, encoder.last_hidden_state.to(embeds_BSE.device))
        logits, cache = self._decoder(cache, start)
        return Prefix(logits[:, -1], cache)

    @torch.no_grad()
    def extend(self, cache: LLMCache, ids_NT: Tensor) -> tuple[Tensor, LLMCache]:
        """Read more text: logits (N,T,V) after each of its tokens, and the cache, which replaces the one given."""
        if self.is_encoder_decoder:
            return self._decoder(cache, ids_NT)
        mask = F.pad(cache.mask, (0, ids_NT.shape[1]), value=1)
        logits, past = self._causal(self.embed(ids_NT), mask, keep=ids_NT.shape[1], past=cache.past, use_cache=True)
        return logits, replace(cache, past=past, mask=mask)

    @torch.no_grad()
    def candidate_losses(self, prefix: Prefix, ids_BMT: Tensor, mask_BMT: Tensor) -> Tensor:
        """Return the negative log-likelihood of each candidate text after the inputs, summed over its tokens: (B,M),
        inf for one without tokens. Ids and mask with one row are those of all samples.

        The longest are scored first, as many at once as fit into `STEP_BYTES`. Raises InputError if inputs and
        candidates do not fit the model's context.
        """
        num_samples, (num_candidates, longest) = len(prefix.logits), ids_BMT.shape[1:]
        self.check_length(prefix.cache.mask.shape[1], longest - (not self.is_encoder_decoder))
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
        """Return logits of the last `keep` tokens, 0 for all, and the cache; the mask also covers what `past` holds."""
        self.check_length(mask_NS.shape[1])
        settings: dict[str, Any] = {}
        if "position_ids" in self._forward_parameters:
            settings["position_ids"] = (mask_NS.cumsum(1) - 1).clamp(min=0)[:, -embeds_NTE.shape[1] :]
        if "logits_to_keep" in self._forward_parameters:
            settings["logits_to_keep"] = keep
        with self._precision(embeds_NTE.device):
            output = self.model(
                inputs_embeds=embeds_NTE.to(self.dtype),
                attention_mask=mask_NS,
                past_key_values=past,
                use_cache=use_cache,
                **settings,
            )
        return output.logits[:, -keep:].float(), output.past_key_values

    def _decoder(self, cache: LLMCache, ids_NT: Tensor) -> tuple[Tensor, LLMCache]:
        """Return the decoder's logits after these tokens, and the cache."""
        with self._precision(ids_NT.device):
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=cache.encoder),
                attention_mask=cache.mask,
                decoder_input_ids=ids_NT,
                past_key_values=cache.past,
                use_cache=True,
            )
        return output.logits.float(), replace(cache, past=output.past_key_values)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context without autocast for a frozen model."""
        is_trained = all(parameter.requires_grad for parameter in self.model.parameters())
        return contextlib.nullcontext() if is_trained else without_autocast(device)

    def check_room(self, num_inputs: int, config: DecodingConfig) -> DecodingConfig:
        """Return the settings with all lengths; raise InputError if they leave no token to write, or inputs and text do
        not fit the context.
        """
        config = config.resolved(1)
        check_prompt(1, config)
        self.check_length(num_inputs, config.max_length - 1)  # the last token is not read
        return config

    def check_length(self, num_inputs: int, num_written: int = 0) -> None:
        """Raise InputError for more tokens than positions; an encoder-decoder's text has positions of its own."""
        num_tokens = max(num_inputs, num_written) if self.is_encoder_decoder else num_inputs + num_written
        if num_tokens > self.max_positions:
            found = f"the language model's context has {self.max_positions} tokens, image, prompt and text {num_tokens}"
            raise InputError(f"{found}: shorten the prompt or lower the maximum length")


class _Scored:
    """A hook of the output layer: chooses the states that it scores, and makes them contiguous, because with a slice
    the frozen weight is copied once per sample.
    """

    positions: Tensor | None = None

    def __call__(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states_BTE, *more = args
        if self.positions is not None:
            states_BTE = states_BTE.flatten(0, 1).index_select(0, self.positions.to(states_BTE.device))[None]
        return (states_BTE.contiguous(), *more)

    @contextlib.contextmanager
    def only(self, positions_N: Tensor) -> Iterator[None]:
        """In the body, logits are (1,N,V), of these positions of the batch (BxT)."""
        self.positions = positions_N
        try:
            yield
        finally:
            self.positions = None
