"""A model zoo with a registry and task runners for the BLIP family.

Importing the package loads neither torch nor transformers: every name below is imported on first use.
"""

from lavis_lite.common.lavis_names import install
from lavis_lite.common.lazy import lazy_names

install()

__version__ = "0.1.0"

_MODULES = {
    "dataset_zoo": "lavis_lite.common.config.zoo",
    "load_dataset": "lavis_lite.datasets.zoo",
    "load_model": "lavis_lite.models.loading",
    "load_model_and_preprocess": "lavis_lite.models.loading",
    "load_preprocess": "lavis_lite.models.loading",
    "model_zoo": "lavis_lite.common.config.zoo",
    "pipeline": "lavis_lite.inference.pipelines",
    "registry": "lavis_lite.common.registry",
}
__all__ = ["__version__", *_MODULES]
__getattr__ = lazy_names(__name__, _MODULES)
