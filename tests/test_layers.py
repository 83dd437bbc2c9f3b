"""Properties of layers, for drawn trees: merging, origin of a key, options, and bases of packaged YAMLs.

Hypothesis draws the cases from fixed seeds, so every run tries the same ones.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_lite.common.config import zoo
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import (
    ConfigError,
    KeyPath,
    Layer,
    load_with_bases,
    load_yaml,
    merge,
    merge_layers,
    origin,
    parse_options,
    resolve,
)
from lavis_lite.common.registry import registry

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["x", "001", "a b", ""])
KEYS = st.sampled_from(["a", "b", "c", "d_processor", "name"])
LEAVES = SCALARS | st.lists(SCALARS, max_size=2)
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3), lambda inner: st.dictionaries(KEYS, inner | LEAVES, max_size=3)
)
draws = settings(max_examples=150, derandomize=True, database=None, deadline=None)


def leaves(tree: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key path whose value is not a mapping with keys, and its value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@draws
@given(base=TREES, over=TREES)
def test_the_later_layer_wins_and_no_layer_is_changed(base: dict[str, Any], over: dict[str, Any]) -> None:
    copies = copy.deepcopy((base, over))
    merged = merge(base, over)
    assert (base, over) == copies
    assert set(merged) == set(base) | set(over)
    for path, value in leaves(over):
        if value != {}:
            assert at(merged, path) == value
    for key in base.keys() - over.keys():
        assert merged[key] == base[key]


@draws
@given(tree=TREES)
def test_an_empty_layer_and_the_same_layer_again_change_nothing(tree: dict[str, Any]) -> None:
    assert merge(tree, {}) == merge({}, tree) == merge(tree, tree) == tree


@draws
@given(base=TREES, over=TREES)
def test_lists_replace_lists(base: dict[str, Any], over: dict[str, Any]) -> None:
    base, over = {**base, "list": [1, 2, 3]}, {**over, "list": ["one"]}
    assert merge(base, over)["list"] == ["one"]


@draws
@given(trees=st.lists(TREES, min_size=3, max_size=3))
def test_merging_is_associative_where_no_value_replaces_a_mapping(trees: list[dict[str, Any]]) -> None:
    """A value over a mapping deletes its keys, and another `name` deletes a processor's: then the grouping matters."""
    drawn = [without_names(tree) for tree in trees]
    first, second, third = drawn
    if not all(agree(one, other) for one in drawn for other in drawn):
        return
    assert merge(merge(first, second), third) == merge(first, merge(second, third))


def without_names(tree: Any) -> Any:
    return {k: without_names(v) for k, v in tree.items() if k != "name"} if isinstance(tree, dict) else tree


def agree(one: Any, other: Any) -> bool:
    """Whether every key that both have is a mapping in both or in neither."""
    if isinstance(one, dict) != isinstance(other, dict):
        return False
    return not isinstance(one, dict) or all(agree(one[key], other[key]) for key in one.keys() & other.keys())


def test_a_value_between_two_mappings_deletes_the_keys_of_the_first() -> None:
    layers = [Layer(name, {"a": value}) for name, value in zip("xyz", ({"b": 1}, None, {"c": 2}), strict=True)]
    assert merge_layers(layers) == {"a": {"c": 2}}


@draws
@given(trees=st.lists(TREES, min_size=1, max_size=4))
def test_the_origin_of_a_key_is_the_last_layer_that_sets_it(trees: list[dict[str, Any]]) -> None:
    layers = [Layer(f"{number}.yaml", tree) for number, tree in enumerate(trees)]
    merged = merge_layers(layers)
    for path, value in leaves(merged):
        own = next(layer for layer in layers if layer.source == origin(layers, path))
        assert value == {} or at(own.tree, path) == value
        for later in layers[layers.index(own) + 1 :]:
            with pytest.raises((KeyError, TypeError)):
                at(later.tree, path)


@draws
@given(trees=st.lists(TREES, min_size=1, max_size=3))
def test_files_with_bases_are_layers(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bases")
    for number, tree in enumerate(trees):
        base = {"_base_": f"{number - 1}.yaml"} if number else {}
        (folder / f"{number}.yaml").write_text(yaml.safe_dump({"expected": tree, **base}))
    layers = load_with_bases(folder / f"{len(trees) - 1}.yaml")
    assert [Path(layer.source).stem for layer in layers] == [str(number) for number in range(len(trees))]
    assert merge_layers(layers) == merge_layers([Layer("", {"expected": tree}) for tree in trees])


@draws
@given(tree=TREES)
def test_options_parse_back(tree: dict[str, Any]) -> None:
    """Each value of a tree written as an option in YAML: all of them are the tree again."""
    tree = {"expected": {"z": 1, **tree}}
    options = [f"{'.'.join(path)}={one_line(value)}" for path, value in leaves(tree)]
    layer = parse_options(options)
    assert layer.tree == tree
    assert layer.raw == {path: one_line(value) for path, value in leaves(tree)}


def one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


# Packaged YAMLs


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packaged YAMLs of its own: two datasets and two types of a model, one from the other."""
    for name in ("shapes_caption", "shapes_vqa"):
        registry.get_builder_class(name)  # made of the package's own YAML, as long as its folder is known
    for kind in ("models", "datasets"):
        monkeypatch.setattr(getattr(zoo, f"{kind.removesuffix('s')}_zoo"), "folder", tmp_path / kind)
    files = {
        "datasets/shapes_caption/default.yaml": "datasets: {shapes_caption: {num_train: 9, num_val: 5}}",
        "datasets/shapes_vqa/default.yaml": "_base_: ../shapes_caption/default.yaml\n"
        "datasets: {shapes_vqa: {num_val: 4}}",
        "datasets/shapes_vqa/same.yaml": "_base_: default.yaml\ndatasets: {shapes_vqa: }",
        "models/blip_caption/tiny.yaml": "model: {image_size: 48, vit_type: tiny, tokenizer: shapes}\n"
        "preprocess: {vis_processor: {eval: {name: blip_image_eval}}}",
        "models/blip_caption/large.yaml": "_base_: tiny.yaml\nmodel: {image_size: 64}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_packaged_dataset_inherits_from_one_of_another_name(packaged: Path) -> None:
    assert zoo.packaged_dataset("shapes_vqa") == zoo.packaged_dataset("shapes_vqa", "same")
    assert zoo.packaged_dataset("shapes_vqa") == {"num_train": 9, "num_val": 4}
    (packaged / "project.yaml").write_text(
        "model: {arch: blip_caption, model_type: large}\nrun: {task: captioning}\n"
        "datasets: {mine: {builder: shapes_vqa}, shapes_caption: }\n"
    )
    cfg = Config.from_file(packaged / "project.yaml")
    assert [(body["num_train"], body["num_val"]) for body in cfg.datasets.values()] == [(9, 4), (9, 5)]
    assert (cfg.model["image_size"], cfg.model["model_type"], cfg.model["vit_type"]) == (64, "large", "tiny")
    assert cfg.preprocess["vis_processor"]["eval"]["image_size"] == 64


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("datasets/shapes_caption/default.yaml", "datasets: {shapes_caption: {num_trian: 9}}"),
        ("models/blip_caption/tiny.yaml", "model: {image_sise: 48}"),
    ],
)
def test_a_mistake_in_a_base_names_its_file(name: str, text: str, packaged: Path) -> None:
    (packaged / name).write_text(text)
    (packaged / "project.yaml").write_text(
        "model: {arch: blip_caption, model_type: large}\ndatasets: {shapes_vqa: }\nrun: {task: vqa}\n"
    )
    key = next(part for part in ("num_trian", "image_sise") if part in text)
    with pytest.raises(ConfigError, match=rf"{name.partition('/')[2]}: .*{key}: .*Did you mean"):
        Config.from_file(packaged / "project.yaml")


def test_a_packaged_dataset_has_the_name_of_its_folder(packaged: Path) -> None:
    (packaged / "datasets/shapes_vqa/same.yaml").write_text("datasets: {shapes_caption: {}}")
    with pytest.raises(ConfigError, match=r"shapes_vqa/same\.yaml: datasets: .*shapes_vqa.*shapes_caption"):
        zoo.packaged_dataset("shapes_vqa", "same")


def test_every_packaged_yaml_resolves_as_it_is_written() -> None:
    for name, types in zoo.dataset_zoo:
        for dataset_type in types:
            assert isinstance(zoo.packaged_dataset(name, dataset_type), dict)
    for arch, types in zoo.model_zoo:
        for model_type in types:
            assert resolve(zoo.model_layers(arch, model_type))["model"]["model_type"] == model_type
            assert load_yaml(zoo.model_zoo.path(arch, model_type))
