"""Record what tiny trainings and every tiny model compute, and compare a later revision with the record, bit for bit.

Run `python tests/identical.py record FILE` before a change that must not alter results, and `python tests/identical.py
compare FILE` after it, on the same machine: kernels differ between CPUs. The script needs only train.py and the public
API, so one copy serves both revisions (`--root` names the checkout). `--only TEXT` selects entries by name.

Recorded per training: the loss, its parts and the norm of the gradients of the first 20 steps, the metrics of every
evaluation, the checksum of the trained weights. Per model type `tiny`: its outputs for fixed images and texts.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", LAVIS_LITE_OFFLINE="1")

import numpy as np
import torch
import yaml
from tiny_trainings import ASK, RUN, SHAPES, SIZES, TRAININGS
from torch.optim.optimizer import register_optimizer_step_pre_hook

QUICKSTART = {  # of its chain, the language models are the untrained ones
    "blip": ["pretrain", "caption", "vqa", "retrieval"],
    "blip2": ["stage1", "stage2_opt", "stage2_t5", "caption", "vqa", "retrieval"],
    "instructblip": ["instruct", "instruct_unaware"],
}


def checksum(state: dict[str, Any]) -> str:
    """SHA-256 of names, types and bytes of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def gradient_norms() -> Iterator[list[float]]:
    """Collect the norm of all gradients before each optimizer step."""
    norms: list[float] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))))

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield norms
    finally:
        handle.remove()


def call(script: Path, *argv: str) -> None:
    """Run a script in this process; its output is shown where it fails."""
    before, sys.argv = sys.argv, [str(script), *argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{argv}: exit code {end.code}\n{said.getvalue()[-3000:]}") from end
    finally:
        sys.argv = before
        for handler in list(logging.getLogger().handlers):
            logging.getLogger().removeHandler(handler)


def training(root: Path, job: Path, *argv: str) -> dict[str, Any]:
    """Train once; the numbers of its log."""
    with gradient_norms() as norms:
        call(root / "train.py", *argv)
    rows = [json.loads(line) for line in (job / "log.txt").read_text().splitlines()]
    times = ("_per_s", "time", "eta", "seconds", "memory", "resident", "data_wait", "mfu")
    steps = [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows if "loss" in row]
    evaluations = [
        {key: row.get(key) for key in ("split", "step", "metrics")}
        for row in rows
        if "metrics" in row and "split" in row
    ]
    saved = torch.load(job / "checkpoint_last.pth", weights_only=False)["model"]
    results = {
        path.name: json.loads(path.read_text()) for path in sorted((job / "result").glob("*.json")) if path.is_file()
    }
    return {
        "steps": steps,
        "gradient norms": norms,
        "evaluations": evaluations,
        "results": hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest(),
        "weights": checksum(saved),
    }


def tiny_training(root: Path, folder: Path, name: str) -> dict[str, Any]:
    """One of TRAININGS."""
    model, datasets, run = TRAININGS[name]
    own = datasets if isinstance(datasets, dict) else {key: {} for key in datasets}
    recipe = {
        "model": {**SIZES, **model},
        "datasets": {f"shapes_{name}": {**SHAPES, **fields} for name, fields in own.items()},
        "run": {**RUN, **run, "output_dir": str(folder)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return training(root, folder / name, "--cfg-path", str(path), "--job-id", name)


def quickstart_step(root: Path, folder: Path, family: str, name: str) -> dict[str, Any]:
    """The first steps of a recipe of the quickstart, on the weights of the one before it."""
    os.chdir(folder)
    options = ["run.max_iters=20", "run.log_freq=1", "run.batch_size_train=8", "run.num_workers=0"]
    recipe = root / "projects" / family / "quickstart" / f"{name}.yaml"
    options += [f"model.{llm}_model=tiny_{llm}" for llm in ("opt", "t5") if f"{llm}_model" in _with_bases(recipe)]
    output = "output/quickstart" + ("" if family == "blip" else f"_{family}")
    return training(root, folder / output / name, "--cfg-path", str(recipe), "--options", *options)


def _with_bases(path: Path) -> str:
    text = path.read_text()
    base = yaml.safe_load(text).get("_base_")
    return text + (_with_bases(path.parent / base) if base else "")


def images(count: int) -> list[Any]:
    """Pictures of random blocks."""
    from PIL import Image

    blocks = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((80, 60), Image.Resampling.NEAREST) for block in blocks]


def plain(value: Any) -> Any:
    """Tensors as checksums, everything else as JSON has it."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return checksum({"": torch.as_tensor(value)})
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "__dict__"):
        return plain(vars(value))
    return value


def answers(model: Any, samples: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the model can be asked, by name."""
    question = {**samples, "prompt": ASK}
    if hasattr(model, "generate"):
        yield "generate", lambda: model.generate(samples)
        yield "sample", lambda: model.generate(samples, use_nucleus_sampling=True, num_captions=2)
        yield "beams", lambda: model.generate(samples, num_beams=4, num_captions=2, max_length=9, min_length=3)
        yield "greedy", lambda: model.generate(samples, num_beams=1, repetition_penalty=1.3)
    if hasattr(model, "predict_answers"):
        for method in ("rank", "generate"):
            known = {"answer_list": ["red", "a blue circle", "two"], "num_ans_candidates": 2}
            own = known if method == "rank" else {}
            yield method, lambda method=method, own=own: model.predict_answers(question, inference_method=method, **own)
    if hasattr(model, "predict_class"):
        yield "predict_class", lambda: model.predict_class(question, ["red", "a blue circle", "two"])
    if hasattr(model, "extract_features"):
        for mode in ("image", "text", "multimodal"):
            yield mode, lambda mode=mode: model.extract_features(samples, mode=mode)
    if "image_text_matching" in type(model).__name__.lower() or type(model).__name__.endswith("ITM"):
        for head in ("itc", "itm"):
            yield head, lambda head=head: model(samples, match_head=head)


def tiny_model(arch: str) -> dict[str, Any]:
    """The answers of a model with seeded random weights."""
    from lavis_lite.models import load_model_and_preprocess

    torch.manual_seed(0)
    more = {"num_classes": 3} if arch == "blip_classification" else {}
    model, vis, text = load_model_and_preprocess(arch, "tiny", is_eval=True, device="cpu", **more)
    pixels = torch.stack([vis["eval"](image) for image in images(3)])
    texts = [text["eval"](each) for each in ("what is it", "a red circle beside a cross", "how many?")]
    samples = {"image": pixels, "text_input": texts}
    found: dict[str, Any] = {"weights": checksum(model.state_dict())}
    for name, ask in answers(model, samples):
        torch.manual_seed(1)
        with torch.no_grad():
            found[name] = plain(ask())
    return found


def entries(root: Path, folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All that is recorded, in an order in which each finds what it needs."""
    for name in TRAININGS:
        yield f"tiny {name}", lambda name=name: tiny_training(root, folder, name)
    for family, names in QUICKSTART.items():
        for name in names:
            yield (
                f"quickstart {family}/{name}",
                lambda family=family, name=name: quickstart_step(root, folder, family, name),
            )
    for path in sorted(root.glob("lavis_lite/configs/models/*/tiny.yaml")):
        yield f"model {path.parent.name}", lambda arch=path.parent.name: tiny_model(arch)


def differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """Where two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{where} / {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where} [{i}]")
    elif old != new:
        yield f"{where}: {str(old)[:60]} -> {str(new)[:60]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout (this one)")
    parser.add_argument("--only", default="", help="run the entries whose names contain this text")
    args = parser.parse_args()
    root, file = args.root.resolve(), args.file.resolve()
    sys.path.insert(0, str(root))
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["LAVIS_LITE_DATA"] = f"{name}/data"
        for entry, run in entries(root, Path(name)):
            if args.only in entry:
                print(entry, flush=True)
                try:
                    found[entry] = run()
                except Exception as error:
                    found[entry] = {"error": str(error)}
                    print(f"  {str(error)[-1500:]}", file=sys.stderr)
        os.chdir(root)
    found = json.loads(json.dumps(found))
    if args.action == "record":
        known = json.loads(file.read_text()) if args.only and file.is_file() else {}
        file.write_text(json.dumps(known | found, indent=1))
        print(f"{len(found)} entries in {file}")
        return
    old = {entry: value for entry, value in json.loads(file.read_text()).items() if args.only in entry}
    lines = [line for entry in sorted({*old, *found}) for line in differences(old.get(entry), found.get(entry), entry)]
    print("\n".join(lines) or f"{len(found)} entries are equal")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
