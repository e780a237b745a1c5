"""Imports between the packages of megazh go in one direction, from the command line down to files and errors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MEGAZH = Path(__file__).parents[1] / "megazh"
# Lowest first: a package may import from packages on lines above its own. Modules of the first line may import one
# another; packages that share any other line may not.
ORDER = [
    ["console", "errors", "writing", "caches", "files", "progress", "program", "config", "settings", "tensor_file"],
    ["corpus", "demo"],
    ["tokenizer"],
    ["conversation"],
    ["index"],
    ["kernels"],
    ["model"],
    ["exchange"],
    ["run"],
    ["pipeline"],
    ["training"],
    ["prefs"],
    ["finetune"],
    ["evaluation"],
    ["cluster"],
    ["cli"],
]
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages} | {"megazh": -1}


def forbidden_imports(root: Path) -> list[str]:
    """Imports below the package `root` that break `ORDER`, as `FILE:LINE: PACKAGE imports PACKAGE`."""
    return [
        f"{path.relative_to(root.parent)}:{line}: {own} imports {imported}"
        for path in sorted(root.rglob("*.py"))
        for own in [top_package(path.relative_to(root).with_suffix("").parts)]
        for line, imported in imports(path, root)
        if not allowed(own, imported)
    ]


def allowed(own: str, imported: str) -> bool:
    """Whether a module of the package `own` may import from the package `imported`."""
    if own == imported:
        return True
    return imported in RANK and (RANK[imported] < RANK[own] or RANK[imported] == RANK[own] == 0)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and top package of each import of `root` in a file, also in functions and under TYPE_CHECKING."""
    package = path.relative_to(root.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parent, *([node.module] if node.module else [])])
            # In `from megazh import files` the package is the imported name.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == root.name else [module]
        for name in names:
            top, *below = name.split(".")
            if top == root.name:
                yield node.lineno, top_package(tuple(below))


def top_package(parts: tuple[str, ...]) -> str:
    """The package or module directly below megazh; `megazh` for its `__init__.py`, `cli` for its `__main__.py`."""
    name = parts[0] if parts else "megazh"
    return {"__main__": "cli", "__init__": "megazh", "__version__": "megazh"}.get(name, name)


def test_imports_go_in_one_direction() -> None:
    assert forbidden_imports(MEGAZH) == []


def test_every_package_has_its_place() -> None:
    found = {path.stem for path in MEGAZH.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == RANK.keys() - {"megazh"}


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("index/build.py", "import os\nimport megazh.cli.options\n", ["index/build.py:2: index imports cli"]),
        (
            "files.py",
            "def read():\n    from megazh.training.recipe import Recipe\n",
            ["files.py:2: files imports training"],
        ),
        (
            "model/deep/er.py",
            "if TYPE_CHECKING:\n    from megazh import pipeline, errors\n",
            ["model/deep/er.py:2: model imports pipeline"],
        ),
        ("tokenizer/train.py", "from ..index import format\n", ["tokenizer/train.py:1: tokenizer imports index"]),
        ("tokenizer/train.py", "from .. import index\n", ["tokenizer/train.py:1: tokenizer imports index"]),
        ("corpus/a.py", "from megazh.demo.stories import write_stories\n", ["corpus/a.py:1: corpus imports demo"]),
        ("demo/a.py", "from megazh.corpus import reader\n", ["demo/a.py:1: demo imports corpus"]),
        ("run/a.py", "from megazh.unheard import of\n", ["run/a.py:1: run imports unheard"]),
        ("cluster/launchers/a.py", "from megazh.cli import main\n", ["cluster/launchers/a.py:1: cluster imports cli"]),
        ("cluster/launchers/a.py", "from megazh.cluster import gpus\nfrom . import local\nimport megazhx.cli\n", []),
        ("cli/a.py", "import torch, megazh.training.loop as loop\nfrom megazh import __version__\n", []),
        ("__init__.py", "from megazh.errors import UsageError\n", ["__init__.py:1: megazh imports errors"]),
        ("settings.py", "from megazh.config import Config\n", []),
        ("__main__.py", "from megazh.cli import main\n", []),
    ],
)
def test_an_import_in_the_wrong_direction_is_named(tmp_path: Path, name: str, text: str, found: list[str]) -> None:
    path = tmp_path / "megazh" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert forbidden_imports(tmp_path / "megazh") == [f"megazh/{line}" for line in found]
