"""The model card of a folder, README.md, and its upload to the hub."""

import sys
from dataclasses import dataclass
from pathlib import Path

from lavis_lite.common.errors import InputError

TAGS = {
    "blip_caption": "image-to-text",
    "blip_vqa": "visual-question-answering",
    "blip2_opt": "image-to-text",
    "blip2_t5": "image-to-text",
    "blip2_vicuna": "image-to-text",
    "blip2_llm": "image-to-text",
    "blip2_t5_instruct": "image-text-to-text",
    "blip2_vicuna_instruct": "image-text-to-text",
}
"""The hub's names of what an architecture does."""
TEXT = """---
{front}---

# {name}

`{arch}` of [lavis_lite](https://pypi.org/project/lavis-lite/), written for transformers as `{hf_class}`.
{origin}

## Use

```python
from transformers import AutoProcessor, {hf_class}

processor = AutoProcessor.from_pretrained("{name}")
model = {hf_class}.from_pretrained("{name}")
```

{own_use}
## Before you publish

State the licence of the weights that this model was made from and of the data that it was trained on, what it is meant
for, and how it was tested. This card cannot know these.
"""
GENERATES = """With lavis_lite, which also reads the processors and prompts in this folder:

```bash
lavis-lite {command} photos/ --model {name}{question} --out results.jsonl
```
"""
LOADS = """With lavis_lite, which also reads the processors and prompts in this folder:

```python
from lavis_lite.models import from_pretrained

model = from_pretrained("{name}")
```
"""
SERVED = ("blip2_opt",)
"""Architectures of which vLLM has the class of transformers."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Source of a folder's weights."""

    model_type: str
    checkpoint: str | None = None

    def sentence(self) -> str:
        """Return it in words."""
        if self.checkpoint is None:
            return f"The weights are those of the type `{self.model_type}`."
        return f"The weights are those of `{Path(self.checkpoint).name}`, a model of the type `{self.model_type}`."


def card(name: str, *, arch: str, hf_class: str, origin: Origin) -> str:
    """Return the text of README.md in the folder `name` of the class `hf_class` of transformers."""
    task = TAGS.get(arch)
    front = ["library_name: transformers", *([f"pipeline_tag: {task}"] if task else []), f"tags: [lavis_lite, {arch}]"]
    command = "" if task is None else "caption" if task == "image-to-text" else "ask"
    question = ' --question "what is in the picture?"' if command == "ask" else ""
    return TEXT.format(
        front="".join(f"{line}\n" for line in front),
        name=name,
        arch=arch,
        hf_class=hf_class,
        origin=origin.sentence() + (f" vLLM serves it: `vllm serve {name}`." if arch in SERVED else ""),
        own_use=(GENERATES if command else LOADS).format(command=command, name=name, question=question),
    )


def check_push(repository: str) -> None:
    """Raise InputError for a name that is not a repository's, and without a terminal to ask on."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push {repository}: {error}") from error
    if not sys.stdin.isatty():
        raise InputError("--push: asks before it uploads, and this process has no terminal")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub after a question on the terminal; return the line to print."""
    from huggingface_hub import HfApi

    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    question = f"upload {len(files)} files ({size:,.1f} MiB) to {repository}, as a private repository? [y/N] "
    if input(question).strip().lower() not in ("y", "yes"):
        return "not uploaded"
    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
    return f"uploaded to {repository}"
