"""BLIP-2 with a language model: the queries' states are the first tokens that it reads (BLIP-2, section 3.2).

One class for all architectures, which differ by the table in `families.py`. Note: the language model is frozen, without
dropout, and runs in its own precision. A prompt that asks for an answer is never cut. A causal model's `max_length`
counts a start token, an encoder-decoder's does not, as published. `class_losses` of Vicuna are means over all
positions, as published, and of all others sums.

Letters: B samples, F frames of a video (1 for an image), Q queries, S tokens that the language model reads, T text
tokens, C candidates of a sample, E width.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_TOKENS, check_number
from lavis_lite.common.config.adapters import ADAPTER, lora_settings
from lavis_lite.common.sharding import ShardUnit
from lavis_lite.common.sources import weights
from lavis_lite.common.transfer import upload
from lavis_lite.models.answers import AnswerModel
from lavis_lite.models.base import Output, chosen_weights
from lavis_lite.models.blip2.base import TEXT_PARTS, Blip2Base
from lavis_lite.models.blip2.families import LLMFamily
from lavis_lite.models.blip2.hf import Blip2LLMAdapter
from lavis_lite.models.blip2.llm_checks import check_fit, family_config, llm_dtype, start_id
from lavis_lite.models.blip2.llm_tokenizer import LLMTokenizer
from lavis_lite.models.blip2.prompts import class_prompts, generation_prompts, lemmatize, question_prompts
from lavis_lite.models.blip2.ranking import (
    candidate_rows,
    check_template,
    named_in,
    segment_lengths,
    stacked,
)
from lavis_lite.models.inputs import Candidates, candidate_lists, integers, required, text_list, texts_of
from lavis_lite.nn import lora
from lavis_lite.nn.decoding import Decoded, DecodingConfig, GenerationConfig, ScoredText
from lavis_lite.nn.llm import LLMAdapter
from lavis_lite.nn.llm_loading import load_language_model
from lavis_lite.nn.llm_masks import full_lengths, known_padding
from lavis_lite.nn.llm_sources import has_weights
from lavis_lite.nn.losses import IGNORED

logger = logging.getLogger(__name__)


class Blip2LLM(Blip2Base, AnswerModel):
    """Image encoder, Q-Former and language model: learn captions and answers, generate them, choose among answers.

    `prompt` begins every caption; with a placeholder `{}` it goes around questions instead. `qformer_text_input`: the
    Q-Former reads the prompt too. `llm` overrides the language model's config; `llm_precision` is fp32, bf16, fp16 or
    auto (bf16, but for tiny and for trained models); `llm_quantization` is int8 or int4; `llm_device_map` is auto, or
    maps the language model's modules to devices; `llm_lora` has settings of peft's LoraConfig, or is a folder of peft.
    `format_candidates_prompt` goes around the names between which `predict` chooses; with `predict_with_gen` the model
    writes one of them.
    """

    hf = Blip2LLMAdapter()
    prompt_begins_captions = True
    reports_num_labels = True
    takes_video: ClassVar[bool] = True
    family: ClassVar[LLMFamily]
    generation: ClassVar[GenerationConfig]
    prompt_limit: int | None = None
    """Tokens to which `generate` and `predict_answers` cut prompts before they write; None: they do not."""

    def __init_subclass__(cls, family: LLMFamily | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls.llm_prefix, cls.truncation_side = family, family.prefix, family.truncation_side
            cls.generation, cls.answer_generation = family.generation, family.answer_generation

    def __init__(
        self,
        source: str,
        /,
        *,
        prompt: str = "",
        max_output_txt_len: int | None = None,
        apply_lemmatizer: bool = False,
        qformer_text_input: bool = False,
        llm_precision: str = "auto",
        llm: dict[str, Any] | None = None,
        llm_lora: dict[str, Any] | str | None = None,
        llm_quantization: str | None = None,
        llm_device_map: str | dict[str, Any] | None = None,
        llm_grad_checkpoint: bool = False,
        freeze_llm: bool = True,
        format_candidates_prompt: str = "{}",
        predict_with_gen: bool = False,
        **parts: Any,
    ) -> None:
        if max_output_txt_len is not None:
            check_number("model.max_output_txt_len", max_output_txt_len, 1, MAX_TOKENS)
        family, config, adapters = self.family, family_config(self.family, source, llm), lora_settings(llm_lora)
        dtype = llm_dtype(llm_precision, config, frozen=freeze_llm, lora=adapters)
        super().__init__(qformer_text_input, **parts)
        self.max_output_txt_len = max_output_txt_len or self.max_txt_len
        model, tokenizer = load_language_model(
            source,
            dtype=dtype,
            overrides=llm,
            pad_token=family.pad_token,
            frozen=freeze_llm,
            quantization=llm_quantization,
            lora=adapters,
            grad_checkpoint=llm_grad_checkpoint,
        )
        lengths = {"max_length": self.max_txt_len, "max_output_length": self.max_output_txt_len}
        is_encoder_decoder = config.is_encoder_decoder
        self.llm_tokenizer = LLMTokenizer(tokenizer, family, is_encoder_decoder=is_encoder_decoder, **lengths)
        self.format_candidates_prompt = check_template(format_candidates_prompt)
        self.predict_with_gen = predict_with_gen
        self.prompt, self.apply_lemmatizer, self.qformer_text_input = prompt, apply_lemmatizer, qformer_text_input
        begin, end = start_id(config, self.llm_tokenizer), self.llm_tokenizer.end_id
        self.lm = LLMAdapter(model, start_id=begin, end_id=end, pad_id=self.llm_tokenizer.pad_id)
        self.add_module(f"{family.prefix}_model", model)
        self.add_module(f"{family.prefix}_proj", nn.Linear(self.Qformer.config.hidden_size, self.lm.width))
        self.lm_source, self.adapter, self.llm_device_map = source, (adapters or {}).get(ADAPTER), llm_device_map
        prefix = f"{family.prefix}_model."
        self.sources[prefix] = source if has_weights(source) else None
        frozen = {f"{prefix}{name}" for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self._frozen_llm = frozen if self.sources[prefix] else set()
        self.loaded_separately = () if self.adapter is None else (prefix,)
        self.newly_initialized = (f"{family.prefix}_proj.", "lora_", ".modules_to_save.", ".token_adapter.")
        self.newly_initialized += TEXT_PARTS if qformer_text_input else ()
        self.newly_initialized += () if freeze_llm else (prefix,)

    @property
    def proj(self) -> nn.Module:
        """The projection from the queries' width to the language model's."""
        return self.get_submodule(f"{self.family.prefix}_proj")

    @classmethod
    def from_config(cls, cfg: dict[str, Any], *, device: str | torch.device = "cpu") -> Self:
        """Build the model as `Blip2Base` does; sizes that do not fit are found before the language model is loaded."""
        source = cfg.get(f"{cls.family.prefix}_model", cls.family.source)
        config, chosen = family_config(cls.family, source, cfg.get("llm")), chosen_weights(cfg)
        if chosen is not None:
            place = chosen[1]
            check_fit(weights.open_state(place), config, prefix=cls.family.prefix, source=place, llm=source)
        return super().from_config(cfg, device=device)

    def text_readers(self, samples: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Return them as `BaseModel` does; the Q-Former reads questions, and of captions the prompt only."""
        keys = [key for key in ("text_input", "text_output") if key in samples]
        of_qformer = super().text_readers(samples) if self.qformer_text_input and "text_output" in samples else []
        setting = f"{self.family.prefix}_model"
        return [*((key, setting, self.llm_tokenizer.tokenizer) for key in keys), *of_qformer]

    def was_read(self, name: str, source: str) -> bool:
        """Return whether it is a frozen weight of the language model, which was built from the same folder."""
        return source == self.lm_source and name in self._frozen_llm

    def load_frozen(self, loaded: set[str]) -> None:
        """Load as `Blip2Base` does, and then adapters from a folder of their own, unless the file had them."""
        super().load_frozen(loaded)
        prefix = f"{self.family.prefix}_model."
        if self.sources[prefix] is None and not any(name.startswith(prefix) for name in loaded):
            logger.warning(f"{self.lm_source} has no weights: the language model's are random")
        if self.adapter is not None and not any(".lora_" in name for name in loaded):
            lora.load_adapter(self.lm.model, self.adapter)

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return the state as `BaseModel` does, without buffers of a language model that can be fetched again."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        prefix = f"{self.family.prefix}_model."
        state = super().checkpoint_state_dict()
        return {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith(prefix) or name in trained or not self.is_restorable(name)
        }

    def shard_units(self) -> list[ShardUnit]:
        return [*super().shard_units(), *(ShardUnit(layer, in_autocast=False) for layer in self.lm.layers)]

    # Inputs of the language model

    def image_embeds(self, samples: dict[str, Any], instructions: list[str]) -> Tensor:
        """Return the projected queries of an `image` (B,3,H,W), video (B,3,F,H,W) or features: (B,FxQ,E), frame after
        frame.
        """
        image = self.checked_image(samples)
        frames = image.transpose(1, 2) if image.dim() == 5 else image[:, None]
        num_frames = frames.shape[1]
        context = self.project_kv(self.encode_image(frames.flatten(0, 1)))
        ids = mask = None
        if self.qformer_text_input:
            repeated = [text for text in instructions for _ in range(num_frames)]
            ids, mask = self.tokenize(repeated, max_length=self.max_txt_len)
        return self.proj(self.query_states(context, ids, mask)).view(len(image), -1, self.lm.width)

    def concat_embeds(self, image_BQE: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,S,E) and mask (B,S) of the images and then the text."""
        dtype = self.lm.dtype
        embeds = torch.cat([image_BQE.to(dtype), self.lm.embed(ids_BT).to(dtype)], dim=1)
        return embeds, torch.cat([mask_BT.new_ones(image_BQE.shape[:2]), mask_BT], dim=1)

    def prompt_embeds(
        self, samples: dict[str, Any], prompts: list[str], *, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings and mask of the images and the prompts, cut to `max_length` tokens if it is given."""
        rows = self.llm_tokenizer.inputs(prompts, max_length=max_length)
        return self.concat_embeds(self.image_embeds(samples, prompts), *self.pad(rows))

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B,T) on the model's device."""
        ids, mask = self.llm_tokenizer.pad(rows)
        return self.upload_texts(ids, mask)

    def question_template(self, samples: dict[str, Any]) -> str | list[str]:
        """Return the template of questions: the samples' `prompt`, else the model's; "" for one without `{}`."""
        prompt = samples.get("prompt", self.prompt)
        return prompt if all("{}" in text for text in text_list(prompt, len(samples["image"]), "prompt")) else ""

    # Training

    def forward(self, samples: dict[str, Any]) -> Output:
        """Return the language-model loss of `text_output` given `image` and `text_input`, or of `text_input`, a
        caption.

        A caption begins with the model's `prompt`, which is not learned; an encoder-decoder without one reads the
        caption's first words and learns the others.
        """
        count = len(self.checked_image(samples))
        if "text_output" in samples:
            prompts = question_prompts(samples, self.question_template(samples), count)
            batch = self.llm_tokenizer.answer_batch(prompts, texts_of(samples, count, "text_output"))
        else:
            prompts = [self.prompt] * count
            batch = self.llm_tokenizer.caption_batch(texts_of(samples, count), self.prompt)
        num_labels = (batch.labels != IGNORED).sum()
        if self.lm.is_encoder_decoder:  # else the labels are among the ids
            self.num_text_tokens += int(num_labels)
        ids, mask = self.upload_texts(batch.ids, batch.mask)
        num_labels = upload(num_labels, self.device)
        image = self.image_embeds(samples, prompts)
        masks = (batch.mask, image.shape[1]), (batch.labels != IGNORED, 0)  # a causal model's padding comes last
        with known_padding(full_lengths(*masks) if self.lm.is_encoder_decoder else True, self.device):
            loss = self.lm.loss(*self.concat_embeds(image, ids, mask), batch.labels)
        return Output({"loss": loss, "loss_lm": loss.detach(), "num_labels": num_labels})

    # Generation

    @torch.no_grad()
    def generate(
        self, samples: dict[str, Any], *unnamed: Any, return_scores: bool = False, **changes: Any
    ) -> list[str | ScoredText]:
        """Return generated texts about each `image` (B,3,H,W) or video, `num_captions` for each in turn.

        `samples["prompt"]`, one text or one per sample, replaces the model's. `changes` replace settings of
        `generation`; a causal model's `max_length` counts one start token. With `return_scores` the texts are pairs
        (text, score); see `Decoded`.
        """
        config = self.caption_decoding(*unnamed, return_scores=return_scores, **changes)
        prompts = generation_prompts(samples, self.prompt, len(self.checked_image(samples, answering=True)))
        decoded = self.write(samples, prompts, config)
        return decoded.with_scores(self.llm_tokenizer.decode(decoded.ids))

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        prompts = generation_prompts(samples, self.prompt, len(self.checked_image(samples)))
        self.check_answers(samples, prompts, self.caption_decoding(**changes), None)

    def caption_decoding(self, *unnamed: Any, return_scores: bool = False, **changes: Any) -> DecodingConfig:
        """Return decoding settings of `generation` with changes; a causal model counts the start token itself."""
        generation, num_uncounted = self.generation.changed(*unnamed, **changes), int(self.lm.is_encoder_decoder)
        return self.lm.decoding(generation, num_uncounted=num_uncounted, return_scores=return_scores)

    def write(self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig) -> Decoded:
        """Generate texts after the images and prompts."""
        with known_padding(self.llm_tokenizer.are_equally_long(prompts, self.prompt_limit), self.device):
            return self.lm.generate(*self.prompt_embeds(samples, prompts, max_length=self.prompt_limit), config)

    # Answers

    def finished(self, samples: dict[str, Any], answers: list[str]) -> list[str]:
        return lemmatize(answers) if self.apply_lemmatizer or samples.get("apply_lemmatizer") else answers

    def answer_decoding(self, generation: GenerationConfig) -> DecodingConfig:
        return self.lm.decoding(generation, num_uncounted=1)

    def answer_prompts(self, samples: dict[str, Any], prompt: str) -> list[str]:
        return question_prompts(samples, prompt or self.question_template(samples), len(samples["image"]))

    def check_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig, answers: list[str] | None
    ) -> None:
        image = samples["image"]
        num_inputs = self.query_tokens.shape[1] * (image.shape[2] if image.dim() == 5 else 1)
        limit = self.prompt_limit if answers is None else None
        num_inputs += max(map(len, self.llm_tokenizer.inputs(prompts, max_length=limit)))
        if answers is None:
            self.lm.check_room(num_inputs, config)
        else:
            rows = self.llm_tokenizer.continuations(answers, end=not self.family.score_without_eos)
            self.lm.check_length(num_inputs, max(map(len, rows)) - (not self.lm.is_encoder_decoder))

    def write_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig
    ) -> tuple[list[str], Tensor | None]:
        ids, scores = self.write(samples, prompts, config)
        return self.llm_tokenizer.decode(ids), scores

    # Choice between candidates

    @torch.no_grad()
    def rank_answers(
        self, samples: dict[str, Any], prompts: list[str], answers: list[str], k: int
    ) -> tuple[Tensor, Tensor]:
        """Rank as `AnswerModel` does; the answers have an end token where `class_losses` have one."""
        tokenizer = self.llm_tokenizer
        ids, mask = self.pad(tokenizer.continuations(answers, end=not self.family.score_without_eos))
        with known_padding(tokenizer.are_equally_long(prompts), self.device):
            prefix = self.lm.prefix(*self.prompt_embeds(samples, prompts))
            logits, num_common = prefix.logits, len(tokenizer.prefix_ids) if tokenizer.is_encoder_decoder else 0
            if num_common:  # every answer begins with the same token, as BART's do: compare the one after it
                common = ids[:1, :num_common].expand(len(logits), -1)
                every = torch.arange(len(logits), device=logits.device)
                logits = self.lm.extend(prefix.cache.rows(every), common)[0][:, -1]
            order = logits[:, ids[:, num_common]].topk(min(k, len(answers)), dim=1).indices
            return order, self.lm.candidate_losses(prefix, ids[order], mask[order])

    def predict_class(
        self, samples: dict[str, Any], candidates: Candidates, n_segments: int = 1
    ) -> Tensor | list[list[int]]:
        """Return the indices of the candidates, likeliest first, by `class_losses`: (B,C), or a list per sample if the
        numbers of candidates differ.
        """
        order = self.class_losses(samples, candidates, n_segments).argsort(dim=-1, stable=True)
        lengths = [len(own) for own in candidates] if not isinstance(candidates[0], str) else []
        if len(set(lengths)) < 2:
            return order
        return [row[:length] for row, length in zip(order.tolist(), lengths, strict=True)]

    @torch.no_grad()
    def predict(self, samples: dict[str, Any], *, n_segments: int = 1, **changes: Any) -> Output:
        """Return `predictions` (B,C), the negative losses of the `candidates` by `class_losses`, and `targets` (B,) if
        the samples have `label`.

        `candidates` are the classes' names, one list or one per sample; a sample with fewer has -inf. With
        `predict_with_gen` `generate` writes, with `changes` of its settings: the first class that the text contains
        has 0, all others -inf.
        """
        count = len(self.checked_image(samples, answering=True))
        lists = candidate_lists(required(samples, "candidates", "the names of the classes"), count)
        lists = [[self.format_candidates_prompt.replace("{}", name) for name in own] for own in lists]
        if self.predict_with_gen:
            predictions = named_in(list(map(str, self.generate(samples, **changes))), lists).to(self.device)
        else:
            predictions = -self.class_losses(samples, lists if len(lists) > 1 else lists[0], n_segments)
        output = Output(predictions=predictions)
        if "label" in samples:
            output["targets"] = integers(samples, "label", count, "the class of each sample", self.device)
        return output

    @torch.no_grad()
    def class_losses(
        self, samples: dict[str, Any], candidates: Candidates, n_segments: int = 1, *, divided: bool = True
    ) -> Tensor:
        """Return the loss of each candidate as the answer: (B,C); the likeliest has the lowest.

        `candidates` are those of all samples, or a list per sample: C is then the longest list's length, and the loss
        is inf where a sample has fewer. The prompt is `prompt` (one, or one per sample; default the model's) with
        `text_input` in its placeholders, or `text_input` alone without a prompt; `context`, `history` and
        `caption` are put before it. Image and prompt are read once for all candidates.

        Normalisation: the negative log-likelihood is summed over a candidate's tokens, end token included, and not
        divided by its length. Vicuna's, as published, has no end token and is divided by the number of positions: those
        of image and prompt, and those of the sample's longest candidate less one. `n_segments` above 1, which saved
        memory in the original and here only repeats its results, changes Vicuna's divisor: the longest candidate of the
        segment counts and, with one list for all, the longest prompt of the batch. Such losses do not compare well;
        without segments no loss depends on the rest of the batch. `divided=False` returns Vicuna's sums too, which
        compare between samples.

        Raises:
            InputError: candidates that are missing, empty or longer than `max_output_txt_len`; numbers of images,
                prompts and lists that differ; a prompt longer than the language model's context.
        """
        count = len(self.checked_image(samples, answering=True))
        lists = candidate_lists(candidates, count)
        default = self.question_template(samples) if "text_input" in samples else self.prompt
        prompts = class_prompts(samples, default, count)
        is_bare = self.family.score_without_eos
        rows = candidate_rows(self.llm_tokenizer, lists, max_length=self.max_output_txt_len, end=not is_bare)
        lengths = segment_lengths(rows, n_segments)
        embeds, mask = self.prompt_embeds(samples, prompts)
        ids, counts = (part.view(*lengths.shape, -1) for part in self.pad(stacked(rows)))
        with known_padding(self.llm_tokenizer.are_equally_long(prompts), self.device):
            losses = self.lm.candidate_losses(self.lm.prefix(embeds, mask), ids, counts)
        if not is_bare or not divided:
            return losses
        num_read = mask.sum(dim=1, keepdim=True)
        if n_segments > 1 and len(lists) == 1:
            num_read = num_read.amax()
        return losses / (num_read + lengths.to(mask.device) - 1)
