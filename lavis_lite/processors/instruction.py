"""LAVIS's instruction templates as a text processor, draw for draw and string for string.

Note: only questions and empty texts become instructions, captions are cleaned as `blip_caption` does, and all is
in lower case. The templates (configs/prompts/lavis_*.yaml) are X-InstructBLIP's; InstructBLIP's own are filled by the
datasets, whose YAMLs name them under `instructions`.
"""

import random
import re

from lavis_lite.common.bounds import one_of
from lavis_lite.common.config.files import load_yaml
from lavis_lite.common.config.zoo import CONFIGS
from lavis_lite.common.registry import registry
from lavis_lite.processors.text import BlipCaptionProcessor, TextProcessor

TASKS = ("caption", "qa", "classification", "eval")
MODALITIES = ("image", "video")
VOWEL_SOUND = re.compile(r"[aeiou]|heir|hono|hour|honest|x-ray", re.IGNORECASE)
"""Beginnings of names that take "an". LAVIS goes by the letter, and by CMU's pronouncing dictionary where installed."""


@registry.register_processor("blip_instruction")
class BlipInstructionProcessor(TextProcessor):
    """`qa`: a question inside a drawn template. `caption`, `classification`: a drawn template for an empty text, the
    cleaned caption or "this is a <name>" for another. `eval`: the prompt for an empty text, else the cleaned text.

    `prompt` is put before templates. Drawn with `random`, anew at each call.
    """

    def __init__(
        self, *, prompt: str = "", max_words: int = 50, modality: str = "image", task: str = "caption"
    ) -> None:
        super().__init__(max_words=max_words)
        self.prompt, self.task = prompt, one_of("task", task, TASKS)
        self.clean = BlipCaptionProcessor(max_words=max_words)
        file = CONFIGS / "prompts" / f"lavis_{one_of('modality', modality, MODALITIES)}_{task}.yaml"
        self.templates: list[str] = [] if task == "eval" else load_yaml(file)["train"]

    def __call__(self, text: str) -> str:
        if self.task == "eval":
            return self.clean(text) if text else self.prompt
        if text and self.task == "caption":
            return self.clean(text).strip()
        if text and self.task == "classification":
            article = "an" if VOWEL_SOUND.match(text) else "a"
            return f"{random.choice(('', 'this is ', 'it is '))}{article} {text}".lower().strip()
        question = random.choice(self.templates).replace("{question}", text).replace("??", "?")
        return (self.prompt + question).lower().strip()
