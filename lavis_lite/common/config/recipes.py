"""The recipes of the project by name: `blip/eval/caption_coco` is `projects/blip/eval/caption_coco.yaml`.

The wheel has them in `lavis_lite/recipes`, a clone in `projects/`.
"""

from pathlib import Path

from lavis_lite.common.errors import MissingFileError, did_you_mean

PACKAGE = Path(__file__).parents[2]


def recipes_root() -> Path:
    """Return the folder of the recipes."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "projects"


def recipe_names() -> list[str]:
    """Return the names of all recipes that are run themselves, sorted; files whose name begins with `_` are not."""
    root = recipes_root()
    found = sorted(root.rglob("*.yaml"))
    return [path.relative_to(root).with_suffix("").as_posix() for path in found if not path.name.startswith("_")]


def named_recipe(name: str | Path) -> Path | None:
    """Return the recipe of a name, or of its path in the project; None if no recipe has it."""
    path = Path(name)
    parts = path.with_suffix("").parts
    recipe = recipes_root().joinpath(*parts[parts[:1] == ("projects",) :]).with_suffix(".yaml")
    return recipe if recipe.is_file() and not path.is_absolute() else None


def find_recipe(name: str | Path) -> Path:
    """Return the path of a configuration: `name` itself, or the recipe of that name, which need not exist.

    Raises MissingFileError, with the nearest names, if it is neither a file nor a recipe nor ends with `.yaml`.
    """
    path = Path(name).expanduser()
    found = path if path.is_file() else named_recipe(name)
    if found is not None:
        return found
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        return path
    near = did_you_mean(str(name), recipe_names())
    raise MissingFileError(f"{name}: no such file, nor a recipe of that name. {near}")
