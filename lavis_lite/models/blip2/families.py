"""The language models of BLIP-2's and InstructBLIP's architectures, as a table.

Note: InstructBLIP's architectures are BLIP-2's with other defaults and prompts that lose their beginning; any
architecture becomes one with `qformer_text_input`.
"""

from dataclasses import dataclass, replace

from lavis_lite.nn.decoding import GenerationConfig

GENERATION = GenerationConfig(num_beams=5, max_length=30, min_length=1)
ANSWER_GENERATION = GenerationConfig(num_beams=5, max_length=10, min_length=1, length_penalty=-1.0)
"""A length penalty of -1 favours short answers (BLIP-2, section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class LLMFamily:
    """An architecture's use of its language model."""

    prefix: str
    """`<prefix>_model` is the language model and its setting; `<prefix>_proj` projects queries to its width."""
    source: str = ""
    """Default of the setting: a hub id."""
    model_types: tuple[str, ...] = ()
    """transformers' model types that the architecture takes; empty: any."""
    end_text: str | None = None
    """Text that ends an output, in place of the tokenizer's end token."""
    starts_with_end: bool = False
    """The end token begins a text too."""
    pad_token: str | None = None
    """Padding token that is added to the vocabulary."""
    score_without_eos: bool = False
    """Score candidates without end token, by the mean over all positions of image, prompt and longest candidate."""
    truncation_side: str = "right"
    """Side at which prompts are cut, also for the Q-Former."""
    generation: GenerationConfig = GENERATION
    """Defaults of `generate`."""
    answer_generation: GenerationConfig = ANSWER_GENERATION
    """Defaults of `predict_answers`."""


OPT = LLMFamily(prefix="opt", source="facebook/opt-2.7b", model_types=("opt",), end_text="\n")
T5 = LLMFamily(prefix="t5", source="google/flan-t5-xl", model_types=("t5", "mt5", "umt5"))
VICUNA = LLMFamily(
    prefix="llm",
    source="lmsys/vicuna-7b-v1.1",
    model_types=("llama",),
    starts_with_end=True,
    pad_token="[PAD]",
    score_without_eos=True,
)
ANY = LLMFamily(prefix="llm")


def instruct(family: LLMFamily) -> LLMFamily:
    """Return InstructBLIP's variant of a family."""
    return replace(
        family,
        truncation_side="left",
        generation=family.generation.changed(max_length=256, repetition_penalty=1.5),
        answer_generation=family.answer_generation.changed(repetition_penalty=1.5),
    )
