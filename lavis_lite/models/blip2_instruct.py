"""InstructBLIP's architectures: the Q-Former reads the instruction as well as the language model does.

Surprising: `predict_class` of Vicuna divides a candidate's loss by the number of all positions, image and padding
included, as the published results did; with `n_segments` above 1 each segment has a denominator of its own.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_lite.models.blip2_llm import Blip2LanguageModel
from lavis_lite.models.blip2_llm_base import image_of
from lavis_lite.models.blip2_prompts import class_prompts
from lavis_lite.registry import registry


class InstructModel(Blip2LanguageModel):
    """A language model that is given instructions; long ones lose their beginning."""

    truncation_side = "left"
    answer_repetition_penalty = 1.5
    mean_class_loss: ClassVar[bool] = False
    """Whether a candidate's loss is divided by the number of positions."""

    def __init__(
        self,
        source: str,
        /,
        *,
        max_txt_len: int = 128,
        max_output_txt_len: int = 256,
        qformer_text_input: bool = True,
        **parts: Any,
    ) -> None:
        super().__init__(
            source,
            max_txt_len=max_txt_len,
            max_output_txt_len=max_output_txt_len,
            qformer_text_input=qformer_text_input,
            **parts,
        )

    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 256,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.5,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """As Blip2LanguageModel's, with the defaults of instructions; `image` may be a video (B,3,F,H,W)."""
        return super().generate(
            samples,
            use_nucleus_sampling=use_nucleus_sampling,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_captions=num_captions,
            temperature=temperature,
        )

    def predict_class(
        self, samples: dict[str, Any], candidates: Sequence[str] | Sequence[Sequence[str]], n_segments: int = 1
    ) -> Tensor | list[list[int]]:
        """Indices of the candidates, likeliest first: (B,C), or a list a sample if each has its own candidates.

        `prompt` (one, or one a sample) may have a gap for `text_input`; `context`, `history` and `caption` are put
        before it. The candidates are scored in `n_segments` parts.
        """
        if isinstance(candidates[0], str):
            return self.class_losses(samples, candidates, n_segments).argsort(dim=-1)
        if len(candidates) != len(image_of(samples)):
            raise ValueError(f"{len(candidates)} lists of candidates were given for {len(image_of(samples))} images")
        ranks = [
            self.class_losses(one_of(samples, row), own, n_segments).argsort(dim=-1)[0].tolist()
            for row, own in enumerate(candidates)
        ]
        return torch.tensor(ranks, device=self.device) if len(set(map(len, ranks))) == 1 else ranks

    @torch.no_grad()
    def class_losses(self, samples: dict[str, Any], candidates: Sequence[str], n_segments: int = 1) -> Tensor:
        """Each candidate's loss (B,C)."""
        if not 1 <= n_segments <= len(candidates):
            raise ValueError(f"n_segments {n_segments} must be from 1 to the number of candidates, {len(candidates)}")
        prompts = class_prompts(samples, self.prompt, len(image_of(samples)))
        embeds, mask = self.asked(samples, prompts)
        prefix = self.lm.prefix(embeds, mask)
        room = self.max_output_txt_len - (0 if self.lm.is_encoder_decoder else len(self.coder.before))
        rows = self.coder.continuations(candidates, max_length=room, end=False)
        size, losses = len(rows) // n_segments, []
        for number in range(n_segments):
            segment = rows[number * size : None if number == n_segments - 1 else (number + 1) * size]
            ids, counts = self.pad(segment)
            loss = self.lm.candidate_losses(prefix, ids[None], counts[None])
            num_positions = embeds.shape[1] + ids.shape[1] - 1
            losses.append(loss / num_positions if self.mean_class_loss else loss)
        return torch.cat(losses, dim=1)


def one_of(samples: dict[str, Any], row: int) -> dict[str, Any]:
    """The samples' one with this index; single strings are for all."""
    return {key: value if isinstance(value, str) else value[row : row + 1] for key, value in samples.items()}


@registry.register_model("blip2_vicuna_instruct")
class Blip2VicunaInstruct(InstructModel):
    """With Vicuna, whose texts begin and end with `</s>`; `[PAD]` is added to its vocabulary."""

    model_types = ("llama",)
    starts_with_end = True
    pad_token = "[PAD]"
    mean_class_loss = True

    def __init__(self, *, llm_model: str = "lmsys/vicuna-7b-v1.1", **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_t5_instruct")
class Blip2T5Instruct(InstructModel):
    """With Flan-T5."""

    part = "t5"
    model_types = ("t5", "mt5", "umt5")

    def __init__(self, *, t5_model: str = "google/flan-t5-xl", **parts: Any) -> None:
        super().__init__(t5_model, **parts)
