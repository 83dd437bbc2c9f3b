"""The base of processors: callables built from keyword arguments; the constructor's signature is the YAML's schema."""

from collections.abc import Mapping
from typing import Any, Self

from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import did_you_mean


class BaseProcessor:
    """A callable `processor(item) -> item`. Subclasses take keyword-only arguments, each with a default."""

    def __call__(self, item: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Build from a YAML block such as `{name: blip_caption, prompt: "a picture of "}`; `name` is ignored.

        Raises InputError for an unknown argument.
        """
        arguments = {key: value for key, value in (cfg or {}).items() if key != "name"}
        allowed, open_ended = schema_of(cls)
        for key in arguments:
            if key not in allowed and not open_ended:
                raise InputError(f"{cls.__name__} has no argument '{key}'. {did_you_mean(key, allowed)}")
        return cls(**arguments)
