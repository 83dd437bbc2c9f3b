"""InstructBLIP's architectures: the Q-Former reads the instruction as well as the language model does.

Surprising: they are BLIP-2's language models with other defaults; any of those becomes one with `qformer_text_input`.
"""

from typing import Any

from lavis_lite.common.registry import registry
from lavis_lite.models.blip2.llm import Blip2LanguageModel, VicunaText


class InstructModel(Blip2LanguageModel):
    """A language model that is given instructions; long ones lose their beginning."""

    truncation_side = "left"
    generation = Blip2LanguageModel.generation.changed(max_length=256, repetition_penalty=1.5)
    answer_generation = Blip2LanguageModel.answer_generation.changed(repetition_penalty=1.5)

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


@registry.register_model("blip2_vicuna_instruct")
class Blip2VicunaInstruct(VicunaText, InstructModel):
    """With Vicuna."""

    def __init__(self, *, llm_model: str = "lmsys/vicuna-7b-v1.1", **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_t5_instruct")
class Blip2T5Instruct(InstructModel):
    """With Flan-T5."""

    part = "t5"
    model_types = ("t5", "mt5", "umt5")

    def __init__(self, *, t5_model: str = "google/flan-t5-xl", **parts: Any) -> None:
        super().__init__(t5_model, **parts)
