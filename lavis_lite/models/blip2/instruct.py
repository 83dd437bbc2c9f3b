"""InstructBLIP's architectures: the Q-Former reads the instruction as well as the language model does.

Surprising: they are BLIP-2's language models with other defaults; any of those becomes one with `qformer_text_input`.
"""

from typing import Any

from lavis_lite.common.registry import registry
from lavis_lite.models.blip2.llm import Blip2LanguageModel, VicunaText


class InstructModel(Blip2LanguageModel):
    """A language model that is given instructions; long ones lose their beginning."""

    truncation_side = "left"
    answer_repetition_penalty = 1.5

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


@registry.register_model("blip2_vicuna_instruct")
class Blip2VicunaInstruct(VicunaText, InstructModel):
    """With Vicuna."""

    def __init__(self, *, llm_model: str = "lmsys/vicuna-7b-v1.1", **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_t5_instruct")
class Blip2T5Instruct(InstructModel):
    """With Flan-T5."""

    llm_prefix = "t5"
    model_types = ("t5", "mt5", "umt5")

    def __init__(self, *, t5_model: str = "google/flan-t5-xl", **parts: Any) -> None:
        super().__init__(t5_model, **parts)
