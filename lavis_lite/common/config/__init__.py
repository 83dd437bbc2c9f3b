"""Configuration: YAML layers, their check against signatures, and settings that must agree between sections."""

from lavis_lite.common.lazy import lazy_names

_CONFIG = "lavis_lite.common.config.config"
__all__ = ["Config", "ConfigError", "RunConfig"]
__getattr__ = lazy_names(__name__, {name: _CONFIG for name in __all__})
