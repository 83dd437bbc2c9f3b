"""Settings of generation on the page, as arguments of `generate` and of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lavis_lite.common.bounds import one_of

Method = Literal["as the model's own", "beam search", "sampling"]
METHODS: tuple[Method, ...] = ("as the model's own", "beam search", "sampling")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings of the page. Lengths of 0, and all others but `seed` with the model's own method, are not used."""

    method: str = METHODS[0]
    num_beams: int = 3
    top_p: float = 0.9
    temperature: float = 1.0
    min_length: int = 0
    max_length: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)

    @property
    def samples(self) -> bool:
        """Return whether texts are sampled."""
        return self.method == "sampling"

    def arguments(self) -> dict[str, Any]:
        """Return the settings of `generate`."""
        found: dict[str, Any] = {}
        if self.method == "beam search":
            found["num_beams"] = int(self.num_beams)
        if self.samples:
            found |= {"use_nucleus_sampling": True, "top_p": self.top_p, "temperature": self.temperature}
        lengths = {"min_length": int(self.min_length), "max_length": int(self.max_length)}
        return found | {name: value for name, value in lengths.items() if value}
