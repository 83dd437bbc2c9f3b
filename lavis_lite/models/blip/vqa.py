"""BLIP question answering: an encoder reads question and image, a decoder generates the answer (BLIP, section 5.3).

The decoder attends to the question's states, not to the image; a batch's answers share their question's keys and
values.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.wording import without_false_spaces
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.blip.caption import decoding_step
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import image_of, integers, ranked_answers, required, text_list, texts_of
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertLMHeadModel, BertModel
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, check_prompt, decode
from lavis_lite.nn.losses import language_modeling_loss_per_text


@registry.register_model("blip_vqa")
class BlipVQA(BlipBase):
    """Answers questions about an image, freely (`generate`) or from a list (`rank`).

    `decoder_sees_padding` reproduces LAVIS's `generate`: the decoder also attends to the padding of the batch's shorter
    questions, so that an answer depends on the other questions of its batch.
    """

    learns_answers: ClassVar[bool] = True
    answer_generation: ClassVar[GenerationConfig] = GenerationConfig(num_beams=3, max_length=10, min_length=1)

    def __init__(self, *, max_txt_len: int = 35, decoder_sees_padding: bool = False, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.decoder_sees_padding = decoder_sees_padding
        config = self.text_config()
        self.text_encoder = BertModel(config)
        self.text_decoder = BertLMHeadModel(self.text_config(context_width=config.hidden_size))

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of the answers, each weighted, summed over a question's answers and averaged over the batch.

        `image` (B,3,H,W), `text_input` list[str] of B questions, `answer` flat list[str], `weight` (sum of
        n_answers), `n_answers` (B).
        """
        states, mask = self.encode_questions(samples)
        n_answers = integers(samples, "n_answers", len(states), "answers of each question", states.device)
        answers = check_answers(samples, int(n_answers.sum()))
        question = torch.arange(len(n_answers), device=states.device).repeat_interleave(n_answers)
        context = self.text_decoder.bert.project_kv(states, mask=mask).select(question)
        loss = self.answer_loss(*self.tokenize(answers, start=self.decoder_start), context)
        weight = torch.as_tensor(samples["weight"], device=loss.device, dtype=loss.dtype)
        return training_output(lm=(weight * loss).sum() / len(states))

    def encode_questions(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the questions' image-grounded states (B,T,E) and their mask (B,T)."""
        image = image_of(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image)), start=self.encoder_start, max_length=self.max_txt_len)
        context = self.text_encoder.project_kv(self.visual_encoder(image))
        return self.text_encoder(ids, mask, context=context)[0], mask

    def answer_loss(self, ids: Tensor, mask: Tensor, context: CrossAttentionKV) -> Tensor:
        """Return the negative (label-smoothed) log-likelihood of each answer, summed over its tokens."""
        logits, _ = self.text_decoder(ids, mask, context=context)
        return language_modeling_loss_per_text(logits, self.labels(ids))

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        *,
        inference_method: str = "rank",
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        **changes: Any,
    ) -> list[str]:
        """Return an answer to each of the B questions, which `{}` in `prompt` stands for.

        `rank` chooses from `answer_list`: the `num_ans_candidates` likeliest by their first token, then the likeliest
        as a whole (BLIP's protocol). `generate` writes freely; `changes` replace settings of `answer_generation`.
        """
        if inference_method not in ("rank", "generate"):
            raise InputError(f"inference_method {inference_method!r} is not one of rank, generate")
        config = self.decoding(self.answer_generation.changed(**changes))
        image = image_of(samples, answering=True)
        if prompt:
            samples = {**samples, "text_input": fill_placeholder(prompt, texts_of(samples, len(image)))}
        states, mask = self.encode_questions(samples)
        if inference_method == "generate":
            return self.generate_answers(states, None if self.decoder_sees_padding else mask, config)
        answer_list = ranked_answers(answer_list, num_ans_candidates)
        context = self.text_decoder.bert.project_kv(states, mask=mask)
        order, loss = self.rank_answers(context, answer_list, min(num_ans_candidates, len(answer_list)))
        best = order.gather(1, loss.argmin(dim=1, keepdim=True)).squeeze(1)
        return [answer_list[i] for i in best.tolist()]

    def check_predict_answers(
        self,
        samples: dict[str, Any],
        *,
        inference_method: str = "rank",
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        **changes: Any,
    ) -> None:
        config = self.decoding(self.answer_generation.changed(**changes))
        questions = texts_of(samples, len(image_of(samples)))
        if prompt:
            fill_placeholder(prompt, questions)
        if inference_method == "generate":
            check_prompt(1, config.resolved(1))
        else:
            ranked_answers(answer_list, num_ans_candidates)

    def generate_answers(self, states: Tensor, mask: Tensor | None, config: DecodingConfig) -> list[str]:
        """Generate answers given the questions' states (B,T,E); `mask` (B,T) is 1 where one counts, None for all."""
        context = self.text_decoder.bert.project_kv(states, mask=mask)
        start = torch.full((len(states), 1), self.decoder_start, device=states.device)
        ids, _ = decode(decoding_step(self.text_decoder, context), start, config)
        return [without_false_spaces(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def rank_answers(self, context: CrossAttentionKV, answer_list: list[str], k: int) -> tuple[Tensor, Tensor]:
        """Return the k candidates (B,k) with the likeliest first tokens of each question, and their losses (B,k)."""
        ids, mask = self.tokenize(answer_list, start=self.decoder_start)
        num_questions = context.num_rows
        start = torch.full((num_questions, 1), self.decoder_start, device=ids.device)
        logits, _ = self.text_decoder(start, torch.ones_like(start), context=context)
        order = logits[:, 0].softmax(dim=-1)[:, ids[:, 1]].topk(k, dim=1).indices
        loss = self.answer_loss(ids[order].flatten(0, 1), mask[order].flatten(0, 1), context)
        return order, loss.view(num_questions, k)


def fill_placeholder(prompt: str, questions: list[str]) -> list[str]:
    """Return each question inside the prompt. InputError unless the prompt has one `{}`."""
    if prompt.count("{}") != 1:
        raise InputError(f"prompt: must have one '{{}}', for the question; got {prompt!r}")
    return [prompt.replace("{}", question) for question in questions]


def check_answers(samples: dict[str, Any], expected: int) -> list[str]:
    """Return the flat answers, of which there must be as many as `n_answers` says."""
    answers = required(samples, "answer", "the answers of all questions, one list")
    weights = required(samples, "weight", "the weight of each answer")
    if not len(answers) == len(weights) == expected:
        raise InputError(
            f"samples['n_answers']: {expected} in all, but there are {len(answers)} answers and {len(weights)} weights"
        )
    return text_list(answers, expected, "answer")
