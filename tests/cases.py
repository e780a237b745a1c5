"""Cases for the checks before a start, made from the tiny recipe."""

from pathlib import Path
from typing import Any

from made_runs import write_recipe

from megazh.run.folder import RunFolder
from megazh.training.job import Case, Devices, Request
from megazh.training.recipe import Device, read_recipe

GIB = 2**30


def make_case(folder: Path, manifest: Path | None = None, settings: list[str] | None = None, **changes: Any) -> Case:
    """A case of the tiny recipe in `folder`, with the run folder `folder/run`.

    Args:
        folder: an empty folder.
        manifest: the data; None: stories that the run makes.
        settings: `key=value` settings on top.
        changes: keys of the recipe; `devices`, `request` and `planned` replace those of the case.
    """
    own = {name: changes.pop(name) for name in ("devices", "request", "planned") if name in changes}
    recipe, written = read_recipe(write_recipe(folder / "mini.yaml", manifest, **changes), settings or [])
    values = {"devices": on_cpu(), "request": Request(stages=1), **own}
    data = Path(recipe.data.manifest).parent
    return Case(recipe=recipe, settings=written, run=RunFolder(folder / "run"), data_folder=data, **values)


def on_cpu(ranks: int = 1) -> Devices:
    """CPU ranks."""
    return Devices(Device.CPU, ranks, None)


def on_gpus(count: int = 1, gib: float | None = None) -> Devices:
    """GPUs, with this much memory if it is known."""
    memory = None if gib is None else int(gib * GIB)
    return Devices(Device.CUDA, count, tuple(map(str, range(count))), memory=memory)
