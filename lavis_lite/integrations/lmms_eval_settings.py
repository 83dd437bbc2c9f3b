"""lmms-eval's `generation_kwargs` as settings of `GenerationConfig`, and its stop texts. Does not import lmms-eval.

Settings that a task leaves out are the model's own, as in every other call of `generate`; so a task without `num_beams`
is decoded with the model's beams.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import did_you_mean

SAME_NAMES = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
STOPS = ("until", "stop_sequences")
WITHOUT_EFFECT = ("image_aspect_ratio", "visual_cot", "skip_special_tokens", "seed", "max_agentic_steps")
"""Keys of lmms-eval's own tasks that concern other models: image layouts, image generation, special tokens in outputs.
The seed is the command's `--seed`."""


class Generation(NamedTuple):
    """Settings of `generate` and `predict_answers`, sorted by name, and the texts at which an output ends."""

    settings: tuple[tuple[str, Any], ...]
    stops: tuple[str, ...]

    @classmethod
    def of(cls, generation_kwargs: Mapping[str, Any]) -> "Generation":
        """Return the settings of a request. None is a setting that is left out.

        Outputs are sampled if `do_sample` is true, or a temperature above 0 is given without it; without sampling
        `temperature`, `top_p` and `top_k` have no effect. A temperature of 0 is never sampled.

        Raises:
            InputError: an unknown setting, `top_k` with sampling, or stop texts that are not texts.
        """
        given = {name: value for name, value in generation_kwargs.items() if value is not None}
        known = (*SAME_NAMES, *SAMPLING, *STOPS, *WITHOUT_EFFECT)
        for name in given:
            if name not in known:
                raise InputError(f"generation_kwargs.{name}: unknown setting. {did_you_mean(name, known)}")
        settings = {name: given[name] for name in SAME_NAMES if name in given}
        temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0.0)
        if temperature and given.get("do_sample", True):
            settings |= {"use_nucleus_sampling": True, "temperature": float(temperature)}
            if given.get("top_k"):
                raise InputError(
                    f"generation_kwargs.top_k: got {given['top_k']}, but sampling here is by top_p only; set "
                    "--gen_kwargs top_k=0"
                )
            settings |= {"top_p": float(given["top_p"])} if "top_p" in given else {}
        stops = [text for name in STOPS for text in stop_texts(name, given.get(name, []))]
        return cls(tuple(sorted(settings.items())), tuple(stops))

    def cut(self, text: str) -> str:
        """Return the text before the first of the stop texts, stripped."""
        ends = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(ends, default=len(text))].strip()


def stop_texts(name: str, value: str | Sequence[str]) -> list[str]:
    """Return one or several stop texts as a list, without empty ones. InputError for other values."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"generation_kwargs.{name}: must be a text or a list of texts, got {value!r}")
    return [text for text in texts if text]
