"""The entry point by which lmms-eval finds the adapter (group `lmms_eval.models`). Importing it loads no torch."""

from typing import Any

MODEL_ID = "lavis_lite"


def manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model `lavis_lite`; its class is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path="lavis_lite.integrations.lmms_eval.LavisLite")
