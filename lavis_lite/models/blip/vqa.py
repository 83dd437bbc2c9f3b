"""BLIP question answering: an encoder reads question and image, a decoder generates the answer (BLIP, section 5.3).

The decoder attends to the question's states, not to the image; a batch's answers share their question's keys and
values.
"""

import operator
from bisect import bisect_right
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.answers import AnswerModel
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.blip.caption import decoding_step
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import integers, required, texts_of
from lavis_lite.models.tokenizers import tokenize, written_texts
from lavis_lite.nn.attention import CrossAttentionKV, KeyValueCache
from lavis_lite.nn.bert import BertLMHeadModel, BertModel
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, check_prompt, decode
from lavis_lite.nn.llm import BYTES_PER_LOGIT, STEP_BYTES
from lavis_lite.nn.losses import (
    IGNORED,
    NextTokens,
    language_modeling_loss,
    smoothed_loss_per_text,
    smoothed_token_losses,
)


@registry.register_model("blip_vqa")
class BlipVQA(BlipBase, AnswerModel):
    """Answers questions about an image, freely (`generate`) or from a list (`rank`).

    `decoder_sees_padding` reproduces LAVIS's `generate`: the decoder also attends to the padding of the batch's shorter
    questions, so that an answer depends on the other questions of its batch.
    """

    reads_encoded: ClassVar[bool] = True
    learns_answers: ClassVar[bool] = True
    inference_method: ClassVar[str] = "rank"
    answer_generation: ClassVar[GenerationConfig] = GenerationConfig(num_beams=3, max_length=10, min_length=1)

    def __init__(self, *, max_txt_len: int = 35, decoder_sees_padding: bool = False, **parts: Any) -> None:
        super().__init__(max_txt_len=max_txt_len, **parts)
        self.decoder_sees_padding = decoder_sees_padding
        config = self.text_config()
        self.text_encoder = self.adapted(BertModel(config))
        self.text_decoder = self.adapted(BertLMHeadModel(self.text_config(context_width=config.hidden_size)))

    def forward(self, samples: dict[str, Any]) -> Output:
        """Loss of the answers, each weighted, summed over a question's answers and averaged over the batch.

        `image` (B,3,H,W) or videos (B,3,F,H,W), `text_input` list[str] of B questions, `answer` flat list[str],
        `weight` (sum of n_answers), `n_answers` (B).
        """
        states, question_mask = self.encode_questions(samples)
        answers = texts_of(samples, None, "answer")
        question = question_of_answer(samples, len(states), len(answers), states.device)
        weight = required(samples, "weight", "the weight of each answer")
        if len(weight) != len(answers):
            raise InputError(f"samples['weight']: {len(weight)} weights were given for {len(answers)} answers")
        context = self.text_decoder.bert.project_kv(states, mask=question_mask).select(question)
        ids, _, predicted = self.tokenize_to_predict(answers, start=self.decoder_start)
        loss = self.answer_loss(ids, context, predicted)
        weight = torch.as_tensor(weight, device=loss.device, dtype=loss.dtype)

        @torch.no_grad()
        def intermediate_output() -> Output:
            return Output(
                image_embeds=self.encode_image(self.checked_image(samples)),
                encoder_output=Output(last_hidden_state=states),
                decoder_output=Output(logits=self.text_decoder(ids, None, context=context)[0]),
                decoder_labels=self.labels(ids),
            )

        output = training_output(lm=(weight * loss).sum() / len(states))
        return output.later(intermediate_output=intermediate_output)

    def encode_questions(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the questions' image-grounded states (B,T,E) and their mask (B,T), None without padding."""
        image = self.checked_image(samples)
        ids, mask = self.tokenize(texts_of(samples, len(image)), start=self.encoder_start, max_length=self.max_txt_len)
        context = self.text_encoder.project_kv(self.encode_image(image))
        return self.text_encoder(ids, mask, context=context)[0], mask

    def answer_loss(self, ids: Tensor, context: CrossAttentionKV, predicted: NextTokens | None = None) -> Tensor:
        """Return the negative (label-smoothed) log-likelihood of each answer, summed over its tokens: (N,). Padding
        comes after the answers (N,T). Without `predicted`, their tokens, waits for the device.
        """
        predicted = NextTokens.of(self.labels(ids)) if predicted is None else predicted
        states, _ = self.text_decoder.bert(ids, None, context=context, causal=True)
        logits = self.text_decoder.cls(predicted.states(states))
        losses = language_modeling_loss(logits, predicted.labels, reduction="none")
        return predicted.sum_per_text(losses, ids.shape)

    def answer_prompts(self, samples: dict[str, Any], prompt: str) -> list[str]:
        """Return the questions inside the prompt. InputError unless that has one `{}`."""
        questions = texts_of(samples, len(samples["image"]))
        if prompt and prompt.count("{}") != 1:
            raise InputError(f"prompt: must have one '{{}}', for the question; got {prompt!r}")
        return [prompt.replace("{}", question) for question in questions] if prompt else questions

    def check_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig, answers: list[str] | None
    ) -> None:
        if answers is None:
            check_prompt(1, config.resolved(1))

    def write_answers(
        self, samples: dict[str, Any], prompts: list[str], config: DecodingConfig
    ) -> tuple[list[str], Tensor | None]:
        states, mask = self.encode_questions({**samples, "text_input": prompts})
        context = self.text_decoder.bert.project_kv(states, mask=None if self.decoder_sees_padding else mask)
        start = torch.full((len(states), 1), self.decoder_start, device=states.device)
        ids, scores = decode(decoding_step(self.text_decoder, context), start, config)
        return written_texts(self.tokenizer, ids, start.shape[1]), scores

    def rank_answers(
        self, samples: dict[str, Any], prompts: list[str], answers: list[str], k: int
    ) -> tuple[Tensor, Tensor]:
        states, states_mask = self.encode_questions({**samples, "text_input": prompts})
        context = self.text_decoder.bert.project_kv(states, mask=states_mask)
        ids, mask = self.upload_texts(*tokenize(self.tokenizer, answers, start=self.decoder_start))
        start = torch.full((len(prompts), 1), self.decoder_start, device=ids.device)
        logits, cache = self.text_decoder(start, None, context=context)
        order = logits[:, 0].softmax(dim=-1)[:, ids[:, 1]].topk(k, dim=1).indices
        read = DecoderPrefix(logits[:, 0], cache, context)
        return order, candidate_losses(self.text_decoder, read, ids[order], mask[order])


def question_of_answer(samples: dict[str, Any], num_questions: int, num_answers: int, device: torch.device) -> Tensor:
    """Return the index of each answer's question (N,), from the samples' `n_answers` (B,).

    Raises InputError if they are not the numbers of the answers. On a GPU, whose values take a wait to read, the device
    checks that and ends the run.
    """
    n_answers = integers(samples, "n_answers", num_questions, "answers of each question", device)
    if n_answers.device.type != "cpu":
        torch._assert_async(n_answers.sum() == num_answers, "samples['n_answers'] does not add up to the answers")
    elif int(n_answers.sum()) != num_answers:
        found = f"samples['n_answers']: {int(n_answers.sum())} answers in all"
        raise InputError(f"{found}, but samples['answer'] has {num_answers} texts; give the number of each question's")
    ends = n_answers.cumsum(0)
    return torch.bucketize(torch.arange(num_answers, device=device), ends, right=True).clamp(max=num_questions - 1)


class DecoderPrefix(NamedTuple):
    """State of a decoder after `[DEC]`: logits (B,V) of the next token, its cache, and the keys and values of the
    questions.
    """

    logits: Tensor
    cache: KeyValueCache
    context: CrossAttentionKV


def candidate_losses(decoder: BertLMHeadModel, read: DecoderPrefix, ids_BKT: Tensor, mask_BKT: Tensor) -> Tensor:
    """Return the label-smoothed loss of each question's K answers, which begin with `[DEC]`, summed over tokens: (B,K).

    The longest are scored first, with those of the same length and as many as fit into `STEP_BYTES`; `[DEC]` is read
    once per question and an answer's last token is not read.
    """
    lengths, by_length = mask_BKT.sum(dim=2).sort(dim=1, descending=True, stable=True)
    ids, mask = (t.take_along_dim(by_length[:, :, None], dim=1) for t in (ids_BKT, mask_BKT))
    losses = smoothed_token_losses(read.logits, ids[:, :, 1])
    widths = lengths.amax(dim=0).tolist()
    bytes_per_answer = BYTES_PER_LOGIT * read.logits.numel() * widths[0]  # one answer of each question
    at_once, begin = max(1, STEP_BYTES // bytes_per_answer), 0
    while begin < len(widths) and (width := widths[begin]) > 2:
        end = min(begin + at_once, bisect_right(widths, -width, lo=begin, key=operator.neg))
        rows, counted = (t[:, begin:end, :width].flatten(0, 1) for t in (ids, mask))
        past = read.cache.repeat(end - begin)
        logits, _ = decoder(rows[:, 1:-1], None, context=read.context, past=past)  # padding is read last
        labels = rows[:, 2:].masked_fill(counted[:, 2:] == 0, IGNORED)
        losses[:, begin:end] += smoothed_loss_per_text(logits, labels).view(len(losses), -1)
        begin = end
    return torch.empty_like(losses).scatter_(1, by_length, losses)
