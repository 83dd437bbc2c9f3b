"""Models by name and type: `load_model_and_preprocess("blip_caption", "base_coco")`. Importing this loads no torch."""

from lavis_lite.common.lavis_names import MODEL_CLASSES, places
from lavis_lite.common.lazy import lazy_names

_LOADING = "lavis_lite.models.loading"
__all__ = ["from_pretrained", "load_model", "load_model_and_preprocess", "load_preprocess", "model_zoo"]
__getattr__ = lazy_names(
    __name__,
    {name: _LOADING for name in __all__} | {"model_zoo": "lavis_lite.common.config.zoo"} | places(MODEL_CLASSES),
)
