"""Folders and hub ids that nobody vouches for: no code of theirs runs, nothing outside them is read, and
LAVIS_LITE_OFFLINE keeps every loader off the network.
"""

import json
import os
import pickle
import shutil
import socket
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, OPTConfig, OPTForCausalLM
from transformers.utils import sentencepiece_model_pb2_new

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import MissingFileError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download, weights
from lavis_lite.common.sources.weights import open_state
from lavis_lite.datasets.storage import locate
from lavis_lite.datasets.templates import load_templates
from lavis_lite.models import from_pretrained, load_model
from lavis_lite.models.clip_ranker import RankerConfig, load_ranker
from lavis_lite.models.tokenizers import load_tokenizer
from lavis_lite.nn.llm_loading import load_language_model
from lavis_lite.nn.llm_sources import is_composite, load_llm_tokenizer, read_config

FOLDERS = Path(__file__).parent / "reference" / "tiny_hf"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that hostile code would make; nothing may ask the user either, who might answer yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of a folder was run"


def with_code(source: Path, target: Path, ran: Path, *, mapping: dict[str, Any], file: str, **changes: Any) -> Path:
    """A copy of a folder whose `file` names code of its own."""
    shutil.copytree(source, target)
    (target / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    content = json.loads((target / file).read_text()) | {"auto_map": mapping} | changes
    (target / file).write_text(json.dumps(content))
    return target


# code


@pytest.mark.parametrize("load", [load_tokenizer, load_llm_tokenizer])
def test_a_tokenizer_s_code_is_not_run(tmp_path: Path, ran: Path, load: Callable[[str], Any]) -> None:
    mapping = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    file, changes = "tokenizer_config.json", {"tokenizer_class": "Evil"}
    folder = with_code(FOLDERS / "bert", tmp_path / "t", ran, mapping=mapping, file=file, **changes)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(ValueError, match=r"auto_map") as caught:
        load(str(folder))
    assert "trust_remote_code" not in str(caught.value)


def test_a_known_tokenizer_with_code_beside_it_is_loaded_without(tmp_path: Path, ran: Path) -> None:
    mapping = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    folder = with_code(FOLDERS / "bert", tmp_path / "t", ran, mapping=mapping, file="tokenizer_config.json")
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(FOLDERS / "bert")).get_vocab()


def test_a_language_model_s_code_is_not_run(tmp_path: Path, ran: Path) -> None:
    mapping = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder = with_code(FOLDERS / "opt", tmp_path / "known", ran, mapping=mapping, file="config.json")
    model, _ = load_language_model(folder, dtype=torch.float32)
    assert isinstance(model, OPTForCausalLM)
    changes = {"model_type": "evil", "architectures": ["Evil"]}
    folder = with_code(FOLDERS / "opt", tmp_path / "unknown", ran, mapping=mapping, file="config.json", **changes)
    with pytest.raises(ValueError, match="model_type 'evil'"):
        load_language_model(folder, dtype=torch.float32)


def test_a_config_cannot_name_an_attention_of_the_hub(tmp_path: Path, ran: Path) -> None:
    mapping, kernel = {}, {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
    folder = with_code(FOLDERS / "opt", tmp_path / "opt", ran, mapping=mapping, file="config.json", **kernel)
    assert "evil" not in str(read_config(folder)[0]._attn_implementation)


class Hostile:
    """What runs code when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return open, (str(self.ran), "w")


MED = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
SMALL: dict[str, Any] = {"image_size": 48, "tokenizer": "shapes"}
BLIP = {**SMALL, "vit_type": "tiny", "vit": {"width": 24, "depth": 2, "num_heads": 3}, "med": MED, "queue_size": 8}
BLIP2 = {**SMALL, "vit_model": "eva_tiny", "vit_weights": "random", "qformer": MED, "num_query_token": 3}


def start_blip(text: Any = None, **settings: Any) -> None:
    settings |= {} if text is None else {"init_text": str(text)}
    registry.get_model_class("blip_pretrain").from_config({**BLIP, **settings})


def start_blip2(text: Any) -> None:
    registry.get_model_class("blip2").from_config({**BLIP2, "init_text": str(text)})


def small_bert() -> BertConfig:
    """The configuration of a BERT that `BLIP` and `BLIP2` can start from."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vocabulary = load_tokenizer("shapes").vocab_size
    return BertConfig(vocab_size=vocabulary, max_position_embeddings=64, architectures=["BertForMaskedLM"], **sizes)


def hostile_folder(kind: str, target: Path, content: bytes) -> Path:
    """A folder of a model whose weights are those bytes, as a pytorch_model.bin."""
    if kind == "bert":
        small_bert().save_pretrained(target)
    else:
        shutil.copytree(FOLDERS / "opt", target)
        (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(content)
    return target


def pickled(ran: Path, target: Path, *, whole: bool) -> bytes:
    if not whole:
        return pickle.dumps(Hostile(ran), protocol=2)
    torch.save({"a": Hostile(ran)}, target)
    return target.read_bytes()


def load_opt(folder: Path) -> None:
    load_language_model(folder, dtype=torch.float32)


BIN_LOADERS = [("bert", start_blip), ("bert", start_blip2), ("opt", load_opt), ("opt", weights.open_state)]


@pytest.mark.parametrize("whole", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize(("kind", "load"), BIN_LOADERS)
def test_pickled_code_in_a_folder_is_refused(
    tmp_path: Path, ran: Path, kind: str, load: Callable[[Any], Any], whole: bool
) -> None:
    folder = hostile_folder(kind, tmp_path / "model", pickled(ran, tmp_path / "x.bin", whole=whole))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*\bopen\b") as e:
        load(str(folder))
    assert "`weights_only`" not in str(e.value)


def compressed(state: dict[str, Any], target: Path) -> bytes:
    """torch's file with compressed entries."""
    torch.save(state, target)
    with zipfile.ZipFile(target) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target.read_bytes()


def test_compressed_entries_are_refused_before_they_are_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MiB of zeros in some kB."""
    path = tmp_path / "bomb.pth"
    assert len(compressed({"model": {"a": torch.zeros(2**22)}}, path)) < 50_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    for load in (checkpoint.load, weights.open_state):
        with pytest.raises(ValueError, match=r"bomb\.pth .*compressed.*16,77\d,\d{3}"):
            load(path)
    with pytest.raises(ValueError, match="compressed"):
        load_model("blip_caption", "tiny", checkpoint=str(path))


@pytest.mark.parametrize(("kind", "load"), BIN_LOADERS)
def test_compressed_entries_in_a_folder_are_refused(tmp_path: Path, kind: str, load: Callable[[Any], Any]) -> None:
    folder = hostile_folder(kind, tmp_path / "model", compressed({"a": torch.zeros(9)}, tmp_path / "x.bin"))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*compressed"):
        load(str(folder))


# paths


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "..", "a/b.safetensors", 5, None])
@pytest.mark.parametrize(("kind", "load"), BIN_LOADERS)
def test_an_index_names_files_of_its_folder_only(
    tmp_path: Path, kind: str, load: Callable[[Any], Any], shard: Any
) -> None:
    folder = hostile_folder(kind, tmp_path / "model", b"")
    (folder / "pytorch_model.bin").unlink()
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    shard = str(tmp_path / "outside.safetensors") if shard == "/outside.safetensors" else shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(str(folder))


@pytest.mark.parametrize("name", ["..", ".", "../llms/tiny_opt", "../../configs/tokenizers/shapes", "tiny_opt/.."])
def test_packaged_names_are_names_and_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A relative path starts at the working folder, not inside the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    for load in (load_tokenizer, load_llm_tokenizer, load_templates):
        with pytest.raises(FileNotFoundError):
            load(name)


# the network


class Connections(list):
    """Where something tried to connect to."""

    def refuse(self, *arguments: Any, **_: Any) -> Any:
        self.append((arguments, "".join(traceback.format_stack(limit=25))))
        raise OSError("this test has no network")


@pytest.fixture
def connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Connections:
    """Every attempt to reach the network, of which none comes through; and empty caches."""
    tried = Connections()
    monkeypatch.setattr(socket, "getaddrinfo", tried.refuse)
    monkeypatch.setattr(socket, "create_connection", tried.refuse)
    monkeypatch.setattr(socket.socket, "connect", tried.refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path / "data"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tried


URL = "http://nowhere.example/x"
LOADERS: dict[str, Callable[[], Any]] = {
    "tokenizer": lambda: load_tokenizer("nobody/bert"),
    "tokenizer without owner": lambda: load_tokenizer("bert-base-uncased"),
    "language model's tokenizer": lambda: load_llm_tokenizer("nobody/opt"),
    "language model's config": lambda: read_config("nobody/opt"),
    "is it a BLIP-2": lambda: is_composite("nobody/opt"),
    "language model": lambda: load_language_model("nobody/opt", dtype=torch.float32),
    "init_text of BLIP": lambda: start_blip("nobody/bert"),
    "init_text of BLIP-2": lambda: start_blip2("nobody/bert"),
    "init_text's file": lambda: start_blip2(f"{URL}.pth"),
    "init_vit": lambda: start_blip(init_vit="vit_tiny_patch16_224"),
    "timm encoder": lambda: open_state("timm:vit_base_patch16_224"),
    "timm encoder of a tag": lambda: open_state("timm:test_vit.r160_in1k"),
    "hub id": lambda: from_pretrained("nobody/blip"),
    "hub id as checkpoint": lambda: load_model("blip_caption", "tiny", checkpoint="nobody/blip"),
    "URL as checkpoint": lambda: load_model("blip_caption", "tiny", checkpoint=f"{URL}.pth"),
    "published weights": lambda: load_model("blip_caption", "base_coco", tokenizer="shapes"),
    "CLIP of transformers": lambda: load_ranker(RankerConfig(model="nobody/clip")),
    "image encoder of BLIP-2": lambda: load_model("blip2", "tiny", vit_weights=f"{URL}.pth"),
    "weights": lambda: weights.open_state("nobody/blip"),
    "download": lambda: download.fetch(URL),
    "annotations": lambda: locate(f"{URL}.json", "x/y.json", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_offline_no_loader_tries_to_connect(
    name: str, connections: Connections, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    with caplog.at_level("INFO"), pytest.raises(FileNotFoundError):
        LOADERS[name]()
    assert not connections
    assert "asking" not in caplog.text


@pytest.mark.parametrize("name", ["tokenizer", "init_text of BLIP", "download"])
def test_online_they_do(name: str, connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    monkeypatch.delenv("LAVIS_LITE_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises((FileNotFoundError, ConnectionError)):
        LOADERS[name]()
    assert connections


RANKER = "ViT-B-32", "laion2b_s34b_b79k"
UNREACHED: dict[str, Callable[[], Any]] = {
    **{name: LOADERS[name] for name in ("tokenizer", "language model's config", "timm encoder of a tag", "hub id")},
    "timm encoder of a repository": lambda: open_state("timm:hf_hub:nobody/vit"),
    "CLIP of transformers": lambda: load_ranker(RankerConfig(model="nobody/clip")),
    "CLIP of open_clip": lambda: load_ranker(RankerConfig(library="open_clip", model=RANKER[0], weights=RANKER[1])),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_without_network_a_hub_id_fails_at_once(
    name: str, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's library would wait 8 seconds between its requests."""
    if "open_clip" in name:
        pytest.importorskip("open_clip")
    monkeypatch.delenv("LAVIS_LITE_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("requests are repeated"))
    with pytest.raises(MissingFileError, match=r"reached") as caught:
        UNREACHED[name]()
    assert any(word in str(caught.value) for word in ("nobody", "test_vit", RANKER[1])), caught.value


def test_offline_timm_s_weights_come_from_the_caches(
    tmp_path: Path, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    expected = timm.create_model("test_vit").state_dict()
    snapshot = tmp_path / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, snapshot / "model.safetensors")
    found = open_state("timm:test_vit.r160_in1k")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not connections


def test_offline_what_the_hub_s_cache_holds_is_used(
    tmp_path: Path, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    snapshot = tmp_path / "hub" / "models--owner--opt" / "snapshots" / ("0" * 40)
    shutil.copytree(FOLDERS / "opt", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    model, tokenizer = load_language_model("owner/opt", dtype=torch.float32)
    same, _ = load_language_model(FOLDERS / "opt", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert tokenizer.get_vocab() == load_llm_tokenizer(FOLDERS / "opt").get_vocab()
    assert isinstance(read_config("owner/opt")[0], OPTConfig)
    assert not connections


def test_the_recorded_tokenizers_name_no_path() -> None:
    """sentencepiece writes the paths of its input and of its output into the trainer's settings."""
    for path in (FOLDERS / "t5" / "spiece.model", FOLDERS / "llama" / "tokenizer.model"):
        model = sentencepiece_model_pb2_new.ModelProto()
        model.ParseFromString(path.read_bytes())
        assert (list(model.trainer_spec.input), model.trainer_spec.model_prefix) == (["corpus.txt"], "tiny")
        vocabulary = load_llm_tokenizer(str(path.parent)).get_vocab()
        assert all(vocabulary[piece.piece] == number for number, piece in enumerate(model.pieces))
