"""The base of processors: callables built from keyword arguments; the constructor's signature is the YAML's schema."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lavis_lite.common.config.schema import Checker, schema_of


class BaseProcessor:
    """A callable `processor(item) -> item`. Subclasses take keyword-only arguments, each with a default."""

    is_deterministic: ClassVar[bool] = False
    """Whether the same image or video always gives equal tensors; an evaluation then processes it once per batch."""

    def __call__(self, item: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def build(self, **changes: Any) -> Self:
        """Return a processor of this class with other arguments, as in LAVIS; all that are not given are the defaults.

        Raises InputError as `from_config` does.
        """
        return self.from_config(changes)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Build from a YAML block such as `{name: blip_caption, prompt: "a picture of "}`; `name` is ignored.

        Raises InputError for an unknown argument, or one of the wrong type.
        """
        schema, open_ended = schema_of(cls)
        arguments = {key: value for key, value in (cfg or {}).items() if key != "name"}
        return cls(**Checker(()).section(arguments, schema, (cls.__name__,), open_ended=open_ended))
