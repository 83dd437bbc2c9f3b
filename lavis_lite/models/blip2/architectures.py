"""The registered architectures of BLIP-2 with a language model; InstructBLIP's Q-Former reads the prompt too."""

from typing import Any

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import SettingError
from lavis_lite.common.registry import registry
from lavis_lite.models.blip2.families import ANY, OPT, T5, VICUNA, instruct
from lavis_lite.models.blip2.llm import Blip2LLM


@registry.register_model("blip2_opt")
class Blip2OPT(Blip2LLM, family=OPT):
    """With OPT, whose texts begin with `</s>` and end with a line break.

    `cut_prompts` repeats LAVIS's `generate` and `predict_answers`: of a prompt, `</s>` included, only the first
    `max_txt_len` tokens are read.
    """

    def __init__(self, *, opt_model: str = OPT.source, cut_prompts: bool = False, **parts: Any) -> None:
        super().__init__(opt_model, **parts)
        self.prompt_limit = self.max_txt_len if cut_prompts else None


@registry.register_model("blip2_t5")
class Blip2T5(Blip2LLM, family=T5):
    """With Flan-T5."""

    def __init__(self, *, t5_model: str = T5.source, **parts: Any) -> None:
        super().__init__(t5_model, **parts)


@registry.register_model("blip2_vicuna")
class Blip2Vicuna(Blip2LLM, family=VICUNA):
    """With Vicuna, whose texts begin and end with `</s>`; `[PAD]` is added to its vocabulary."""

    def __init__(self, *, llm_model: str = VICUNA.source, **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_llm")
class Blip2AnyLLM(Blip2LLM, family=ANY):
    """With any causal or encoder-decoder language model of transformers, and its tokenizer's own special tokens."""

    def __init__(self, *, llm_model: str, **parts: Any) -> None:
        super().__init__(llm_model, **parts)


class Blip2Instruct(Blip2LLM):
    """InstructBLIP: prompts are instructions, which the Q-Former reads too."""

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
class Blip2VicunaInstruct(Blip2Instruct, family=instruct(VICUNA)):
    """With Vicuna."""

    def __init__(self, *, llm_model: str = VICUNA.source, **parts: Any) -> None:
        super().__init__(llm_model, **parts)


@registry.register_model("blip2_t5_instruct")
class Blip2T5Instruct(Blip2Instruct, family=instruct(T5)):
    """With Flan-T5.

    `few_shot_prob` and `num_few_shot_examples` are keys of LAVIS: no dataset, there or here, gives such examples, so
    only a probability of 0 is accepted.
    """

    def __init__(
        self, *, t5_model: str = T5.source, few_shot_prob: float = 0.0, num_few_shot_examples: int = 0, **parts: Any
    ) -> None:
        if few_shot_prob != 0:
            problem = f"must be 0, got {few_shot_prob}: no few-shot examples are given; leave it out"
            raise SettingError("model.few_shot_prob", problem)
        check_number("model.num_few_shot_examples", num_few_shot_examples, 0, 10**6)
        super().__init__(t5_model, **parts)
