"""Weights as a lazy mapping: every kind of source, what is wrong with a folder, and how little is held at once."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lavis_lite.common import checkpoint
from lavis_lite.common.sources import folders, weights
from lavis_lite.common.sources.weights import LazyState, open_state
from lavis_lite.convert.folders import write_folder
from lavis_lite.models import load_model

STATE = {f"layers.{i}.weight": torch.full((3, 4), float(i)) for i in range(6)}


def write_shards(folder: Path, count: int = 3, *, suffix: str = "safetensors") -> Path:
    """STATE in that many files of a Hugging Face folder, with their index."""
    folder.mkdir()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names, index = list(STATE), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        shard = {name: STATE[name] for name in names[i::count]}
        save_file(shard, folder / file) if suffix == "safetensors" else torch.save(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def single(folder: Path, *, suffix: str) -> Path:
    folder.mkdir()
    if suffix == "safetensors":
        save_file(STATE, folder / "model.safetensors")
    else:
        torch.save(STATE, folder / "pytorch_model.bin")
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "pth": lambda place: checkpoint.save({"model": STATE, "epoch": 3}, place / "x.pth"),
    "folder": lambda place: single(place / "hf", suffix="safetensors"),
    "old folder": lambda place: single(place / "hf", suffix="bin"),
    "shards": lambda place: write_shards(place / "hf"),
    "old shards": lambda place: write_shards(place / "hf", suffix="bin"),
}


class Stack(nn.Module):
    """A model with the parameters of STATE."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(6))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_has_the_same_weights(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path)
    state = open_state(source)
    assert state.keys() == STATE.keys()
    torch.testing.assert_close(dict(state), STATE, rtol=0, atol=0)
    model = Stack()
    assert checkpoint.load_into(model, state, source=source) == ([], [])
    torch.testing.assert_close(dict(model.state_dict()), STATE, rtol=0, atol=0)


def test_extra_file_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "hf")
    save_file({"temp": torch.tensor(0.5)}, folder / folders.EXTRA_FILE)
    state = open_state(folder)
    assert state.keys() == {*STATE, "temp"}
    assert float(state["temp"]) == 0.5


def test_damaged_folders(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "hf")
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors"):
        open_state(folder)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 .*00002-of-00003"):
        open_state(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json.*weight_map"):
        open_state(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"other.*model\.safetensors "):
        open_state(tmp_path / "other")


def test_a_lazy_state_is_a_mapping() -> None:
    state = LazyState.of(STATE)
    first, *_, last = STATE
    del state[first]
    assert first not in state
    assert first in STATE
    state["new"] = torch.ones(1)
    assert state.pop("new").tolist() == [1]
    renamed = state.renamed(lambda name: None if name == last else f"x.{name}")
    assert set(renamed) == {f"x.{name}" for name in STATE} - {f"x.{first}", f"x.{last}"}
    with pytest.raises(KeyError, match="absent"):
        state["absent"]
    assert len(LazyState.of(renamed)) == 4


def test_adapted_state_keeps_only_new_tensors() -> None:
    reads = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return STATE[name].clone()

    state = LazyState({name: lambda name=name: read(name) for name in STATE})
    first, second, *_ = STATE

    def adapt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"renamed": tensors[first], "doubled": tensors[second] * 2}

    adapted = state.adapted(adapt)
    reads.clear()
    assert adapted["doubled"].tolist() == (STATE[second] * 2).tolist()
    assert reads == []
    assert adapted["renamed"].tolist() == STATE[first].tolist()
    assert reads == [first]
    assert adapted.keys() == {"renamed", "doubled"}


class Watch:
    """Counts, whenever a file is opened, which earlier opened files still have tensors alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[tuple[Path, list[weakref.ref[Tensor]]]] = []
        self.most_alive = 0
        self.load = checkpoint.load
        monkeypatch.setattr(checkpoint, "load", self)

    def __call__(self, path: Path, **options: Any) -> dict[str, Any]:
        self.most_alive = max(self.most_alive, sum(any(r() is not None for r in refs) for _, refs in self.opened))
        state = dict(self.load(path, **options))
        self.opened.append((path, [weakref.ref(tensor) for tensor in state.values()]))
        return state


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_one_shard_is_held_at_a_time(tmp_path: Path, watch: Watch) -> None:
    state = open_state(write_shards(tmp_path / "hf", 6))
    model = Stack()
    checkpoint.load_into(model, state, source="x")
    assert len({path for path, _ in watch.opened}) == 6
    assert watch.most_alive == 0
    kept = [open_state(tmp_path / "hf")[name] for name in STATE]
    assert watch.most_alive > 0
    assert len(kept) == 6


def test_memory_map_of_a_large_file_is_renewed(tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WINDOW", 2 * next(iter(STATE.values())).nbytes)
    state = open_state(single(tmp_path / "hf", suffix="safetensors"))
    before = len(watch.opened)
    torch.testing.assert_close(dict(state.items()), STATE, rtol=0, atol=0)
    assert len(watch.opened) - before == 3
    watch.most_alive = 0
    checkpoint.load_into(Stack(), state, source="x")
    assert watch.most_alive == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip_caption", "blip2"])
def test_a_model_is_loaded_shard_by_shard(
    arch: str, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where names are translated and biases split on the way; into another precision, so that all are copied."""
    model = load_model(arch, "tiny")
    folder = write_folder(model, tmp_path / "hf", arch=arch, max_shard_size="1MB")
    other = load_model(arch, "tiny").to(torch.bfloat16)
    load_into = checkpoint.load_into

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.most_alive, watch.opened = 0, []
        return load_into(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_into", watched)
    other.load_weights(str(folder))
    assert len({path for path, _ in watch.opened}) > 3
    assert watch.most_alive == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.to(other.state_dict()[name].dtype)), name


def test_tensors_are_cast_to_the_models_precision() -> None:
    model = Stack().to(torch.bfloat16)
    checkpoint.load_into(model, STATE, source="x")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.layers[5].weight.tolist() == STATE["layers.5.weight"].tolist()


def test_file_with_frozen_parts_only() -> None:
    model = Stack()
    model.layers[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {"layers.0.weight": torch.ones(3, 4), "other": torch.ones(1)}
    with pytest.raises(ValueError, match=r"x\.pth .*Stack.*layers\.0\.weight.*layers\.1\.weight"):
        checkpoint.load_into(model, state, source="x.pth", allow_missing=lambda key: True)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    checkpoint.load_into(model.layers[0], {"weight": torch.ones(3, 4)}, source="x.pth")
    assert model.layers[0].weight.tolist() == torch.ones(3, 4).tolist()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("arch", ["blip_caption", "blip_retrieval", "blip2", "blip2_opt"])
def test_loading_a_complete_file_gives_its_weights_whatever_memory_held(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that are not drawn are filled with NaN here; those of a random language model are drawn."""
    torch.manual_seed(3)
    source = load_model(arch, "tiny", is_eval=True)
    path = checkpoint.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    torch.manual_seed(3)
    expected = tensors(load_model(arch, "tiny", is_eval=True, checkpoint=path))

    def filled(*size: Any, **kwargs: Any) -> Tensor:
        made = torch.full(size if len(size) != 1 or isinstance(size[0], int) else tuple(size[0]), torch.nan)
        return made.to(**{key: value for key, value in kwargs.items() if key in ("dtype", "device") and value})

    monkeypatch.setattr(torch, "empty", filled)
    torch.manual_seed(3)
    loaded = tensors(load_model(arch, "tiny", is_eval=True, checkpoint=path))
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_that_are_not_copied_belong_to_one_model_alone(suffix: str, tmp_path: Path) -> None:
    """A step of one model changes neither the file nor another model; nor two parameters that have one source."""
    path = tmp_path / f"whole.{suffix}"
    state = load_model("blip_caption", "tiny", is_eval=True).state_dict()
    if suffix == "pth":
        checkpoint.save({"model": state}, path)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    content = path.read_bytes()
    first, second = (load_model("blip_caption", "tiny", is_eval=True, checkpoint=path) for _ in range(2))
    before = tensors(second)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert path.read_bytes() == content
    assert (
        first.text_decoder.cls.predictions.decoder.weight is first.text_decoder.bert.embeddings.word_embeddings.weight
    )


def test_two_parameters_of_one_tensor_do_not_share_it() -> None:
    model, tensor = Stack(), torch.ones(3, 4)
    names = list(STATE)
    checkpoint.load_into(model, LazyState({name: lambda: tensor for name in names}), source="x", take=True)
    with torch.no_grad():
        model.layers[0].weight.zero_()
    assert [float(layer.weight.sum()) for layer in model.layers] == [0, *[12] * 5]
