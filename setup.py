"""Builds the wheel with the recipes of jobs/recipes inside; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithRecipes(build_py):
    """Copies jobs/recipes/*.yaml to megazh/recipes, where an installed megazh looks for them."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "megazh", ignore_errors=True)  # files of an earlier build
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "megazh" / "recipes"
        target.mkdir(parents=True, exist_ok=True)
        for recipe in sorted((ROOT / "jobs" / "recipes").glob("*.yaml")):
            shutil.copy(recipe, target)


setup(cmdclass={"build_py": BuildWithRecipes})
