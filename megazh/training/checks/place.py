"""Whether what the command line names is there, and the run folder is free and its disk large enough."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import find_sources
from megazh.errors import DataError, UsageError
from megazh.pipeline.memory import checkpoint_bytes
from megazh.pipeline.work import Work
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.training.checkpoint_list import list_checkpoints, unfinished_bytes
from megazh.training.checks.resume import is_complete, steps_done
from megazh.training.job import Case, Request
from megazh.training.recipe import Recipe
from megazh.training.retention import keep_rule
from megazh.training.stages import work_of
from megazh.writing import check_writable, free_bytes

_MADE_FIRST = {".lock", DESCRIPTION, "logs"}
"""Files of a run that may be there before its config.yaml; besides them its copy of the tokenizer."""


def run_folder(case: Case) -> Iterator[str]:
    """The run folder is new, or holds a run and nothing else."""
    complete = False
    with contextlib.suppress(DataError):  # a damaged checkpoint, which other checks name
        complete = is_complete(case.run, case.recipe)
    check_run_folder(case.run, case.request, complete)
    yield from ()


def inputs(case: Case) -> Iterator[str]:
    """Each of `-i` names files of text."""
    check_inputs(case.request)
    yield from ()


def check_run_folder(run: RunFolder, request: Request, complete: bool = False) -> None:
    """Refuse a run folder that cannot be one, or that holds something else. Raises UsageError.

    `complete`: whether the run is, so that nothing has to be written to describe it.
    """
    path = run.path
    name = f"-r {request.run}" if request.run is not None else str(path)
    another = "give a folder of its own, such as -r runs/NAME"
    if path.resolve() == Path.cwd():
        raise UsageError(f"{name}: a run cannot use the current folder; {another}")
    above = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if above.is_symlink() and not above.exists():
        raise UsageError(f"{name}: {above} is a link to nothing; {another}")
    if not above.is_dir():
        raise UsageError(f"{name}: {above} is a file, not a folder; {another}")
    if not complete:
        check_writable(path, another, name)
    if run.exists and not (path / DESCRIPTION).exists():
        raise UsageError(f"{name}: holds a {run.config.name}, and no run ({DESCRIPTION} is missing); {another}")
    if not path.is_dir() or run.exists:
        return
    foreign = sorted(
        file.name for file in path.iterdir() if file.name not in _MADE_FIRST and not file.name.startswith("tokenizer.")
    )
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UsageError(f"{name}: holds {foreign[0]}{others}, and no run ({run.config.name} is missing); {another}")


def check_inputs(request: Request) -> None:
    """Refuse `-i` that names no file of text. Raises UsageError, and DataError for a file that cannot be read."""
    for given in request.inputs or ():
        if not given.strip():
            raise UsageError("-i '': expected the name of a file or folder of text")
    if request.inputs:
        find_sources(request.inputs, read=ReadOptions(request.text_key, encoding=request.encoding))


def disk(case: Case) -> Iterator[str]:
    """The disk of the run folder holds the checkpoints that will be kept."""
    job = case.job
    done = steps_done(job.run) or 0
    to_come = checkpoints_to_come(job.recipe, done)
    if not to_come:
        return
    space = space_of(job.recipe, work_of(job.recipe, job.layout, job.precision))
    size = space.bytes_each
    path = job.run.path.absolute()
    free = free_bytes(path)
    if free is None:
        return
    free += unfinished_bytes(job.run.checkpoints)  # which the start removes
    new = min(to_come, max(1, space.number - len(list_checkpoints(job.run.checkpoints))))
    if size * new <= free:
        return
    fitting = int(free // size)
    needs = (
        f"{new} checkpoint{'s' if new > 1 else ''} of {_size(size)} need {_size(size * new)}, and the disk of "
        f"{job.run.path} has {_size(free)} free"
    )
    if fitting < min(2, new):
        message = f"{needs}, which holds {fitting or 'none'}; free some, or choose a run folder on another disk with -r"
        if not case.request.dry_run:
            raise UsageError(message)
        yield f"warning: {message}; a start will refuse that"  # where it starts, the disk may be another one
        return
    yield case.settings.with_places(
        f"warning: {needs}, which holds {fitting}: saves will fail once it is full; keep fewer with "
        f"{_fewer(job.recipe, done, fitting)}, or choose another disk with -r"
    )


def _fewer(recipe: Recipe, done: int, fitting: int) -> str:
    """Setting with which no more than `fitting` checkpoints are on disk at a time."""
    keep, steps = recipe.checkpoint, recipe.course.steps
    if keep.keep_every:
        every = -(-steps // max(fitting - keep.keep_last - keep.keep_best - 1, 1))
        return f"checkpoint.keep_every={every} or more"
    if fitting > 1 + keep.keep_best:
        return f"checkpoint.keep_last={fitting - 1 - keep.keep_best}"
    return "checkpoint.keep_last=1 checkpoint.keep_best=false"


@dataclass(frozen=True)
class CheckpointSpace:
    """Space that the checkpoints of a whole run take."""

    number: int
    """Largest number of checkpoints on disk at a time, the one being written included."""
    bytes_each: float

    def describe(self) -> str:
        """Such as `4 of 7.0 GB, 27.9 GB`."""
        return f"{self.number} of {_size(self.bytes_each)}, {_size(self.number * self.bytes_each)}"


def space_of(recipe: Recipe, work: Work) -> CheckpointSpace:
    """The space of a run's checkpoints, from shapes and the keep rules of its recipe."""
    rule = keep_rule(recipe)
    validated = bool(recipe.evaluation.validate_every)
    number = rule.most_kept(checkpoints_to_come(recipe, 0), recipe.course.steps, validated)
    return CheckpointSpace(number, checkpoint_bytes(work))


def checkpoints_to_come(recipe: Recipe, done: int) -> int:
    """The number of checkpoints that a run still writes, the last one included."""
    every, steps = recipe.checkpoint.checkpoint_every, recipe.course.steps
    if done >= steps:
        return 0
    return ((steps - 1) // every - done // every if every else 0) + 1


def _size(size: float) -> str:
    scale, unit = next((pair for pair in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= pair[0]), (1e3, "kB"))
    return f"{size / scale:.1f} {unit}"
