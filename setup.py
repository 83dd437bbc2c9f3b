"""The metadata is in pyproject.toml; this file adds the recipes to the package, as `lavis_lite/recipes`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies `projects/` into the package that is built; an editable installation reads it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lavis_lite", "recipes")
            shutil.copytree(Path(__file__).with_name("projects"), target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
