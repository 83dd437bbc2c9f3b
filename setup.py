"""The package's metadata and dependencies: lower bounds here, the exact versions tested in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="lavis-lite",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "lavis_lite" / "__init__.py").read_text())[1],
    description="A model zoo with a registry and task runners for the BLIP family",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    author="the lavis_lite authors",
    python_requires=">=3.11",
    packages=find_packages(include=["lavis_lite", "lavis_lite.*"]),
    package_data={"lavis_lite": ["configs/**/*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "timm>=1.0.9",
        "omegaconf>=2.3",
        "PyYAML>=6.0",
        "filelock>=3.13",
        "fairscale>=0.4.13",
        "decord>=0.6.0; platform_machine == 'x86_64' or platform_machine == 'AMD64'",
        "pycocotools>=2.0.7",
        "pycocoevalcap>=1.2",
        "webdataset>=0.2.86",
        "tensorboard>=2.16",
        "tqdm>=4.60",
        "numpy>=1.26",
        "pillow>=10.1",
        "safetensors>=0.4.3",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "peft>=0.17",
            "bitsandbytes>=0.46",
            "ruff>=0.6",
        ],
        "lora": ["peft>=0.17"],
        "quantization": ["bitsandbytes>=0.46", "accelerate>=1.0"],
        "lemmatizer": ["spacy>=3.7"],
    },
    entry_points={
        "console_scripts": [
            "lavis-lite = lavis_lite.cli.__main__:main",
            "lavis-lite-train = lavis_lite.cli.main:train_main",
            "lavis-lite-evaluate = lavis_lite.cli.main:evaluate_main",
            "lavis-lite-convert = lavis_lite.convert.__main__:main",
        ]
    },
)
