"""BLIP-2 with a language model: what the queries saw in an image begins a text that the model goes on with
(BLIP-2, section 3.2).

One implementation for all: the architectures differ in names and in what stands around a text. Surprising: the
language model is frozen, without dropout, and runs in its own precision; a prompt that asks for an answer is never
cut; lengths that a caller gives to `generate` count, as published, one start token for a causal model and none for an
encoder-decoder; `class_losses` of Vicuna are means over all positions, as published, and of all others sums.

Letters: B samples, C candidates of a sample, T text tokens.
"""

from itertools import takewhile
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip2.llm_base import LanguageModelBase
from lavis_lite.models.blip2.prompts import (
    class_prompts,
    generation_prompts,
    lemmatize,
    question_prompts,
    split_caption,
    without_prompt,
)
from lavis_lite.models.blip2.ranking import (
    Candidates,
    candidate_lists,
    candidate_rows,
    segment_widths,
    stacked,
)
from lavis_lite.models.inputs import (
    image_of,
    ranked_answers,
    require_labels,
    required,
    text_list,
    texts_of,
    whole_number,
)
from lavis_lite.nn.losses import IGNORED


class Batch(NamedTuple):
    """Training texts as tensors: what the language model reads behind the queries, and the labels (B,T).

    An encoder-decoder learns to write the labels; a causal model's are those of what it reads.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Blip2LanguageModel(LanguageModelBase):
    """What the architectures do: learn captions and answers, write them, choose among answers."""

    reports_num_labels = True

    def forward(self, samples: dict[str, Any]) -> Output:
        """Language-model loss of `text_output` given `image` and `text_input`, or of `text_input`, a caption.

        A caption begins with the model's `prompt`, which is not learned; an encoder-decoder without one reads the
        caption's first words and learns the others.
        """
        count = len(image_of(samples, video=True))
        required(samples, "text_input", "captions, or questions with their text_output")
        if "text_output" in samples:
            asked = question_prompts(samples, self.question_template(samples), count)
            answers = texts_of(samples, count, "text_output")
            batch = self.answer_batch(asked, answers)
        else:
            asked = [self.prompt] * count
            batch = self.caption_batch(texts_of(samples, count))
        loss = self.lm.loss(*self.joined(self.see(samples, asked), batch.ids, batch.mask), batch.labels)
        num_labels = (batch.labels != IGNORED).sum()
        return Output({"loss": loss, "loss_lm": loss.detach(), "num_labels": num_labels})

    def question_template(self, samples: dict[str, Any]) -> str | list[str]:
        """What goes around questions: the samples' `prompt`, else the model's; "" for one without a gap for them."""
        prompt = samples.get("prompt", self.prompt)
        return prompt if all("{}" in text for text in text_list(prompt, len(samples["image"]), "prompt")) else ""

    def answer_batch(self, asked: list[str], answers: list[str]) -> Batch:
        """Texts that are read, and others that are learned."""
        read = self.coder.inputs(asked, max_length=self.max_txt_len)
        if self.lm.is_encoder_decoder:
            written = self.coder.outputs(answers, max_length=self.max_output_txt_len)
            return Batch(*self.pad(read), self.labels_of(*self.pad(written)))
        room = max(self.max_output_txt_len - len(self.coder.before), 0)
        written = self.coder.continuations(answers, max_length=room)
        require_labels(list(map(len, written)), answers)
        return self.causal_batch([r + w for r, w in zip(read, written, strict=True)], list(map(len, read)))

    def caption_batch(self, captions: list[str]) -> Batch:
        """Captions that are learned but for their beginning: the prompt or, for an encoder-decoder without one, a few
        words.
        """
        bare = [without_prompt(caption, self.prompt) for caption in captions]
        if self.lm.is_encoder_decoder:
            parts = [(self.prompt, caption) if self.prompt else split_caption(caption) for caption in bare]
            return self.answer_batch(*map(list, zip(*parts, strict=True)))
        before, prompt = list(self.coder.before), self.prompt.strip()
        given = self.coder.inputs([prompt])[0] if prompt else []
        if len(given) >= self.max_txt_len:
            raise InputError(f"prompt {prompt!r} takes all of max_txt_len={self.max_txt_len} tokens: shorten it")
        texts = [f"{prompt} {caption}".strip() for caption in bare]
        rows = self.coder.outputs(texts, max_length=self.max_txt_len - len(before))
        rows = [before + row for row in rows]
        num_given = [num_shared(row, given) for row in rows]
        require_labels([len(row) - number for row, number in zip(rows, num_given, strict=True)], captions)
        return self.causal_batch(rows, num_given)

    def causal_batch(self, rows: list[list[int]], num_given: list[int]) -> Batch:
        """Whole texts, of which the first tokens are given and have no labels."""
        ids, mask = self.pad(rows)
        labels = self.labels_of(ids, mask)
        given = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(num_given, device=ids.device)[:, None]
        return Batch(ids, mask, labels.masked_fill(given, IGNORED))

    def labels_of(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The ids as labels; padding has none."""
        return ids.masked_fill(mask == 0, IGNORED)

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """What the language model writes about each `image` (B,3,H,W), `num_captions` for each in turn.

        `samples["prompt"]`, one string or one a sample, replaces the model's. Lengths are in tokens without the
        prompt; a causal model's count one start token.
        """
        prompts = generation_prompts(samples, self.prompt, len(image_of(samples, video=True, answering=True)))
        num_uncounted = int(self.lm.is_encoder_decoder)
        config = self.lm.decoding(
            max_length=whole_number(max_length, "max_length") + num_uncounted,
            num_uncounted=num_uncounted,
            min_length=min_length,
            num_beams=num_beams,
            num_return=num_captions,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
        )
        return self.coder.decode(self.lm.generate(*self.asked(samples, prompts, max_length=self.prompt_limit), config))

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        length_penalty: float = -1.0,
    ) -> list[str]:
        """One answer to each question (`text_input`), which stands in the gap of `prompt`, e.g. "Question: {} Answer:";
        without it in that of the samples' `prompt`, else of the model's.

        `generate` writes at most `max_len` tokens by beam search; `rank` picks from `answer_list` the likeliest of the
        `num_ans_candidates` answers whose first tokens are likeliest. A length penalty of -1 favours short answers
        (BLIP-2, section 4.1).
        """
        if inference_method not in ("rank", "generate"):
            raise InputError(f"inference_method {inference_method!r} is not one of rank, generate")
        count = len(image_of(samples, video=True, answering=True))
        prompts = question_prompts(samples, prompt or self.question_template(samples), count)
        if inference_method == "rank":
            answer_list = ranked_answers(answer_list, num_ans_candidates)
            order, losses = self.rank_answers(samples, prompts, answer_list, num_ans_candidates)
            best = order.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1)
            answers = [answer_list[i] for i in best.tolist()]
        else:
            config = self.lm.decoding(
                max_length=whole_number(max_len, "max_len") + 1,
                num_uncounted=1,
                min_length=min_len,
                num_beams=num_beams,
                length_penalty=length_penalty,
                repetition_penalty=self.answer_repetition_penalty,
            )
            answers = self.coder.decode(
                self.lm.generate(*self.asked(samples, prompts, max_length=self.prompt_limit), config)
            )
        return lemmatize(answers) if self.apply_lemmatizer or samples.get("apply_lemmatizer") else answers

    @torch.no_grad()
    def rank_answers(
        self, samples: dict[str, Any], prompts: list[str], answer_list: list[str], k: int
    ) -> tuple[Tensor, Tensor]:
        """The k candidates of each question by their first token's probability, and the negative log-likelihood of
        each, with an end token where `class_losses` have one: indices (B,k), (B,k).
        """
        ids, mask = self.pad(self.coder.continuations(answer_list, end=not self.bare_candidates))
        prefix = self.lm.prefix(*self.asked(samples, prompts))
        logits, num_shared = prefix.logits, len(self.coder.before) if self.coder.keeps_end else 0
        if num_shared:  # a token that begins every answer, as BART's, tells them not apart
            shared = ids[:1, :num_shared].expand(len(logits), -1)
            logits = self.lm.extend(prefix.cache.expand(1), shared)[0][:, -1]
        order = logits[:, ids[:, num_shared]].topk(min(k, len(answer_list)), dim=1).indices
        return order, self.lm.candidate_losses(prefix, ids[order], mask[order])

    def predict_class(
        self, samples: dict[str, Any], candidates: Candidates, n_segments: int = 1
    ) -> Tensor | list[list[int]]:
        """Indices of the candidates, likeliest first, by `class_losses`: (B,C), or a list a sample if not all have
        the same number of candidates.
        """
        order = self.class_losses(samples, candidates, n_segments).argsort(dim=-1, stable=True)
        lengths = [len(own) for own in candidates] if not isinstance(candidates[0], str) else []
        if len(set(lengths)) < 2:
            return order
        return [row[:length] for row, length in zip(order.tolist(), lengths, strict=True)]

    @torch.no_grad()
    def class_losses(
        self, samples: dict[str, Any], candidates: Candidates, n_segments: int = 1, *, divided: bool = True
    ) -> Tensor:
        """The loss of each candidate as the answer: (B,C); the likeliest has the lowest.

        `candidates` are those of all samples, or a list a sample: C is then the longest list's length, and the loss is
        inf where a sample has fewer. What is asked is `prompt` (one, or one a sample; default the model's) with
        `text_input` in its gaps, or `text_input` alone where there is no prompt; `context`, `history` and `caption`
        are put before it. Image and prompt are read once for all candidates.

        Normalisation: the negative log-likelihood summed over a candidate's tokens, end token included, not divided by
        its length. Vicuna's, as published, has no end token and is divided by the number of positions: those of image
        and prompt, and those of the sample's longest candidate less one. `n_segments` above 1, which saved memory in
        the original and serves here to repeat its results only, changes Vicuna's divisor: it is the longest candidate
        of the segment that counts and, with one list for all, the longest prompt of the batch. Such losses do not
        compare well; without segments no loss depends on the rest of the batch. `divided=False` leaves Vicuna's sums as
        they are too, which compares them between samples.

        Raises:
            ValueError: candidates that are none, empty or longer than `max_output_txt_len`; numbers of images, prompts
                and lists that differ; a prompt longer than the language model's context.
        """
        count = len(image_of(samples, video=True, answering=True))
        lists = candidate_lists(candidates, count)
        whole_number(n_segments, "n_segments")
        default = self.question_template(samples) if "text_input" in samples else self.prompt
        prompts = class_prompts(samples, default, count)
        rows = candidate_rows(self.coder, lists, limit=self.max_output_txt_len, end=not self.bare_candidates)
        widths = segment_widths(rows, n_segments)
        embeds, mask = self.asked(samples, prompts)
        ids, counts = (part.view(*widths.shape, -1) for part in self.pad(stacked(rows)))
        losses = self.lm.candidate_losses(self.lm.prefix(embeds, mask), ids, counts)
        if not self.bare_candidates or not divided:
            return losses
        num_read = mask.sum(dim=1, keepdim=True)
        if n_segments > 1 and len(lists) == 1:
            num_read = num_read.amax()
        return losses / (num_read + widths.to(mask.device) - 1)


def num_shared(row: list[int], given: list[int]) -> int:
    """Return how many tokens a text begins with that the prompt begins with too: all of the prompt's, unless the
    tokenizer joins its end with the next word.
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(row, given, strict=False)))


class VicunaText:
    """Vicuna's texts, which begin and end with `</s>`; `[PAD]` is added to its vocabulary."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    starts_with_end: ClassVar[bool] = True
    pad_token: ClassVar[str] = "[PAD]"
    bare_candidates: ClassVar[bool] = True


@registry.register_model("blip2_opt")
class Blip2OPT(Blip2LanguageModel):
    """With OPT, whose texts begin with `</s>` and end with a line break.

    `cut_prompts` repeats LAVIS's `generate` and `predict_answers`: of a prompt, `</s>` included, only the first
    `max_txt_len` tokens are read.
    """

    part = "opt"
    model_types = ("opt",)
    end_text = "\n"

    def __init__(self, *, opt_model: str = "facebook/opt-2.7b", cut_prompts: bool = False, **parts: Any) -> None:
        super().__init__(opt_model, **parts)
        self.prompt_limit = self.max_txt_len if cut_prompts else None


@registry.register_model("blip2_t5")
class Blip2T5(Blip2LanguageModel):
    """With Flan-T5."""

    part = "t5"
    model_types = ("t5", "mt5", "umt5")

    def __init__(self, *, t5_model: str = "google/flan-t5-xl", **parts: Any) -> None:
        super().__init__(t5_model, **parts)


@registry.register_model("blip2_vicuna")
class Blip2Vicuna(VicunaText, Blip2LanguageModel):
    """With Vicuna."""

    def __init__(self, *, llm_model: str = "lmsys/vicuna-7b-v1.1", **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_llm")
class Blip2LLM(Blip2LanguageModel):
    """With any causal or encoder-decoder language model of transformers, on its tokenizer's own terms."""

    def __init__(self, *, llm_model: str, **parts: Any) -> None:
        super().__init__(llm_model, **parts)
