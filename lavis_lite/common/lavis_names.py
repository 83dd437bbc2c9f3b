"""Module paths and names of LAVIS, so that code written for it needs another package name only.

`MODULES` says where each name is here. A module of the table has no file: it is made when it is imported, and its names
are looked up on first use, so that importing it loads nothing else.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lavis_lite.common.lazy import lazy_names

PACKAGE = "lavis_lite"
BLIP = {
    "BlipCaption": "models.blip.caption",
    "BlipClassification": "models.blip.classification",
    "BlipFeatureExtractor": "models.blip.matching",
    "BlipITM": "models.blip.matching",
    "BlipNLVR": "models.blip.nlvr",
    "BlipPretrain": "models.blip.pretrain",
    "BlipRetrieval": "models.blip.retrieval",
    "BlipVQA": "models.blip.vqa",
}
BLIP2 = {
    "Blip2ITM": "models.blip2.matching",
    "Blip2OPT": "models.blip2.architectures",
    "Blip2Qformer": "models.blip2.qformer",
    "Blip2T5": "models.blip2.architectures",
    "Blip2T5Instruct": "models.blip2.architectures",
    "Blip2VicunaInstruct": "models.blip2.architectures",
}
MODEL_CLASSES = {"BaseModel": "models.base", **BLIP, **BLIP2}
"""LAVIS's names of model classes, which `lavis_lite.models` has too, and their modules."""
FILES = {"BlipITM": "blip_image_text_matching", "BlipVQA": "blip_vqa", "BlipNLVR": "blip_nlvr"}
FILES2 = {
    **{"Blip2ITM": "blip2_image_text_matching", "Blip2OPT": "blip2_opt", "Blip2Qformer": "blip2_qformer"},
    **{"Blip2T5": "blip2_t5", "Blip2T5Instruct": "blip2_t5_instruct", "Blip2VicunaInstruct": "blip2_vicuna_instruct"},
}
FILES |= {
    **{"BlipCaption": "blip_caption", "BlipClassification": "blip_classification", "BlipPretrain": "blip_pretrain"},
    **{"BlipFeatureExtractor": "blip_feature_extractor", "BlipRetrieval": "blip_retrieval"},
}
OUTPUTS = ("BlipOutput", "BlipOutputWithLogits", "BlipOutputFeatures", "BlipSimilarity", "BlipIntermediateOutput")

MODULES: dict[str, dict[str, str]] = {
    "common.optims": {
        "LinearWarmupStepLRScheduler": "common.optim.LinearWarmupStep",
        "LinearWarmupCosineLRScheduler": "common.optim.LinearWarmupCosine",
        "ConstantLRScheduler": "common.optim.Constant",
    },
    "processors.base_processor": {"BaseProcessor": "processors.base"},
    "processors.blip_processors": {
        "BlipCaptionProcessor": "processors.text",
        "BlipQuestionProcessor": "processors.text",
        "BlipInstructionProcessor": "processors.instruction",
        "BlipImageBaseProcessor": "processors.image.ImageProcessor",
        "BlipImageTrainProcessor": "processors.image",
        "BlipImageEvalProcessor": "processors.image",
        "Blip2ImageTrainProcessor": "processors.image",
    },
    "processors.clip_processors": dict.fromkeys(
        ("ClipImageTrainProcessor", "ClipImageEvalProcessor"), "processors.clip"
    ),
    "processors.alpro_processors": dict.fromkeys(
        ("AlproVideoTrainProcessor", "AlproVideoEvalProcessor"), "processors.video"
    ),
    "datasets.builders": {
        "load_dataset": "datasets.lavis",
        "dataset_zoo": "common.config.zoo",
        "BaseDatasetBuilder": "datasets.lavis",
    },
    "datasets.builders.base_dataset_builder": {"BaseDatasetBuilder": "datasets.lavis"},
    "datasets.datasets": {},
    "datasets.datasets.base_dataset": {"BaseDataset": "datasets.lavis"},
    "tasks.base_task": {"BaseTask": "tasks.lavis"},
    "models.base_model": {"BaseModel": "models.base"},
    "models.blip_models": {},
    "models.blip_models.blip_outputs": dict.fromkeys(OUTPUTS, "models.base.Output"),
    "models.blip2_models": {},
    **{f"models.blip_models.{file}": {name: BLIP[name]} for name, file in FILES.items()},
    "models.blip_models.blip_image_text_matching": {
        "BlipITM": BLIP["BlipITM"],
        "compute_gradcam": "models.blip.gradcam",
    },
    **{f"models.blip2_models.{file}": {name: BLIP2[name]} for name, file in FILES2.items()},
}
"""Modules of LAVIS below the package, and where each of their names is: a module here, with the name if it differs."""


class LavisModules(MetaPathFinder, Loader):
    """Finds and makes the modules of the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of the table; None for any other."""
        package, _, name = fullname.partition(".")
        if package != PACKAGE or name not in MODULES:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MODULES)
        return ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        names = places(MODULES[module.__name__.partition(".")[2]])
        module.__doc__ = "Names of LAVIS; see lavis_lite/common/lavis_names.py."
        module.__dict__.update(__all__=sorted(names), __getattr__=lazy_names(module.__name__, names))


def places(names: Mapping[str, str]) -> dict[str, str]:
    """Return the names with their modules in full, for `lazy_names`."""
    return {name: f"{PACKAGE}.{place}" for name, place in names.items()}


def install() -> None:
    """Let `import` find the modules of the table; once per process."""
    if not any(isinstance(finder, LavisModules) for finder in sys.meta_path):
        sys.meta_path.append(LavisModules())
