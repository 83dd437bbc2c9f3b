"""The registry: lazy imports, names used twice, unknown names."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lavis_lite.common.errors import did_you_mean
from lavis_lite.common.registry import Registry, RegistryError, registry

KINDS = ("model", "processor", "builder", "task", "runner", "lr_scheduler")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `zoo_of_tests` with a registry and one module, which registers `Ant` as 'ant'."""
    folder = tmp_path / "zoo_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("from lavis_lite.registry import Registry\nr = Registry({'model': __name__})\n")
    (folder / "ant.py").write_text("from zoo_of_tests import r\n@r.register_model('ant')\nclass Ant: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo_of_tests"]:
        del sys.modules[name]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_packages_loads_neither_torch_nor_transformers():
    code = (
        "import sys, lavis_lite, lavis_lite.registry, lavis_lite.models, lavis_lite.datasets, lavis_lite.processors\n"
        "from lavis_lite.models import model_zoo\nfrom lavis_lite import dataset_zoo\n"
        "str(model_zoo), list(dataset_zoo)\n"
        "heavy = ('torch', 'transformers', 'timm', 'omegaconf', 'numpy', 'pydantic')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_first_look_up_imports_the_package(package: Path):
    import zoo_of_tests

    assert "zoo_of_tests.ant" not in sys.modules
    assert zoo_of_tests.r.list_models() == ["ant"]
    assert zoo_of_tests.r.get_model_class("ant").__name__ == "Ant"


def test_a_module_that_fails_to_import_is_reported_each_time(package: Path):
    (package / "bee.py").write_text("import a_module_that_is_not_there\n")
    import zoo_of_tests

    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            zoo_of_tests.r.get_model_class("ant")


def test_sub_packages_are_imported(package: Path):
    (package / "deep").mkdir()
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "bee.py").write_text(
        "from zoo_of_tests import r\nr.register_model('bee')(type('Bee', (), {}))\n"
    )
    import zoo_of_tests

    assert zoo_of_tests.r.list_models() == ["ant", "bee"]


def test_another_class_under_a_used_name_names_both():
    r = Registry({"model": "lavis_lite.nn"})
    first = r.register_model("twice")(type("First", (), {}))
    with pytest.raises(KeyError, match=r"'twice' is taken by .*First.*Second"):
        r.register_model("twice")(type("Second", (), {}))
    assert r.get_model_class("twice") is first


def test_the_same_class_defined_again_replaces_the_old_one():
    r = Registry({"model": "lavis_lite.nn"})
    classes = [type("Same", (), {}) for _ in range(2)]
    for cls in classes:
        r.register_model("same")(cls)
    assert r.get_model_class("same") is classes[1]


def test_decorator_without_a_name_says_how_to_write_it():
    with pytest.raises(TypeError, match=r"@registry.register_task\('name'\)"):
        registry.register_task(type("NotAName", (), {}))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_class_without_its_kinds_base_is_refused(kind: str):
    register = getattr(registry, f"register_{kind}")
    with pytest.raises(TypeError, match=rf"{kind} 'stray': .*Stray must derive from lavis_lite\.\w+\.\w+\.\w+"):
        register("stray")(type("Stray", (), {}))
    assert "stray" not in registry.tables[kind].names()


def test_bases_exist():
    for name in filter(None, (table.base for table in registry.tables.values())):
        module, _, cls = name.rpartition(".")
        assert isinstance(vars(import_module(module))[cls], type)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lists_its_classes_and_finds_them(kind: str):
    names = getattr(registry, f"list_{kind}s")()
    assert names == sorted(names)
    assert names, f"no {kind} is registered"
    for name in names:
        assert callable(getattr(registry, f"get_{kind}_class")(name))


def test_a_finder_makes_classes_at_their_first_look_up():
    r, made = Registry({"model": "lavis_lite.nn"}), []

    def find(name: str) -> type | None:
        made.append(name)
        return type(name, (), {}) if name == "found" else None

    r.tables["model"].add_finder(lambda: ["found", "registered"], find)
    own = r.register_model("registered")(type("Registered", (), {}))
    assert r.list_models() == ["found", "registered"]
    assert r.get_model_class("found") is r.get_model_class("found")
    assert r.get_model_class("registered") is own
    assert made == ["registered", "found"]
    with pytest.raises(KeyError, match="Did you mean 'found'"):
        r.get_model_class("fund")


def test_datasets_are_builders():
    assert registry.list_datasets() == registry.list_builders()


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError) as caught:
        registry.get_model_class("blip_captoin")
    assert str(caught.value).startswith("unknown model 'blip_captoin'. Did you mean 'blip_caption'")
    assert isinstance(caught.value, RegistryError)


def test_did_you_mean_lists_what_there_is_when_nothing_is_near():
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."
    assert did_you_mean("zzz", []) == "None is known."
    assert did_you_mean("zzz", map(str, range(20)), limit=3) == "Known: 0, 1, 10 and 17 more."
