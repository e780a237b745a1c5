"""The recipe files that come with megazh: `jobs/recipes` in a checkout, `megazh/recipes` in an installed wheel."""

import os
import re
from pathlib import Path

from megazh.errors import UsageError

_CHECKOUT = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
_INSTALLED = Path(__file__).resolve().parents[1] / "recipes"


def recipes_folder() -> Path:
    """The folder of the recipes, relative to the current folder where it lies below it."""
    folder = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED
    relative = Path(os.path.relpath(folder))
    return folder if ".." in relative.parts else relative


def recipe_names() -> list[str]:
    """Names of the recipes; files that begin with `_` are made to be included, and are left out."""
    return sorted(file.stem for file in recipes_folder().glob("*.yaml") if not file.stem.startswith("_"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, given by its path or by the name of one that comes with megazh.

    Raises:
        UsageError: there is no recipe of that name; names those that there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    found = recipes_folder() / f"{name}.yaml"
    if not found.exists():
        known = ", ".join(recipe_names())
        raise UsageError(
            f"recipe '{name}': not in {recipes_folder()}; give one of {known}, or the path of a .yaml file"
        )
    return found


def recipe_title(name: str) -> str:
    """The first sentence of the comment at the top of a recipe; empty without one."""
    comment = []
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").strip())
    return re.split(r"(?<=\.) ", " ".join(comment))[0]
