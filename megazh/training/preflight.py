"""The checks before anything starts: one list, used by a start, a dry run and `megazh plan`.

They start no process and write nothing. All refusals are found together, each a line with its remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megazh.errors import Collector, MegazhError, UsageError
from megazh.run.folder import RunFolder
from megazh.settings import COMMAND_LINE, Settings
from megazh.training.checkpoint_list import newest_good
from megazh.training.checks import conversations, data, exported, fit, hf, initial, place, resume, trackers
from megazh.training.checks.course import with_first_warmup
from megazh.training.job import Case, Devices, Job, Request, Task
from megazh.training.live import given_on_command_line, with_changes
from megazh.training.recipe import Device, Recipe, read_recipe, run_recipe
from megazh.training.recipe_files import recipe_path

DEMO = {Task.PRETRAIN: "demo", Task.NORMAL: "demo_sft", Task.LONG_CONTEXT: "demo_long"}
"""Recipe that is taken without -c, -g, or with -i."""
BIG = {
    Task.PRETRAIN: "qwen0.5b_6x3090",
    Task.NORMAL: "sft_qwen0.5b_6x3090",
    Task.LONG_CONTEXT: "longlora_qwen0.5b_6x3090",
}
"""Recipe that is taken with -g."""

Check = Callable[[Case], Iterator[str]]

PLACE: tuple[Check, ...] = (place.run_folder, place.inputs, trackers.packages)
"""What the command line names is there, and what it would write is in nobody's way."""

FIT: tuple[Check, ...] = (fit.length, fit.layout, fit.dtypes, fit.memory, exported.model)
"""The recipe works, and fits the devices."""

DATA: tuple[Check, ...] = (
    data.manifest, data.tokenizers, data.vocabulary, data.epochs, data.validation, conversations.lengths,
    exported.tokenizer,
)  # fmt: skip
"""The data is there, and fits the model and the length of the run."""

RUN: tuple[Check, ...] = (resume.same_run, initial.initial_checkpoint, place.disk)
"""The run folder's own run is the same one, the weights to begin with fit, and the disk holds its checkpoints."""

CHECKS = (*PLACE, *FIT, *DATA, *RUN)
"""All checks of a start and of a dry run of `-t ds_pp`."""

CHECKS_OF = {"ds_pp": CHECKS, "hf": (*PLACE, fit.length, hf.packages, hf.keys, fit.layout, hf.memory, *DATA, *RUN)}
"""All checks of a start and of a dry run, by engine."""

WITHOUT_DEVICES = (*PLACE, fit.length, *DATA)
"""Those that can be made where the devices could not be chosen, which refuses the run already."""


def requested_case(request: Request) -> Case:
    """Read the recipe of a request; its devices are still to be chosen.

    Raises:
        MegazhError: the recipe or its settings cannot work.
    """
    if request.inputs is not None and not request.inputs:
        raise UsageError("-i: expected files or folders of text")
    for setting in request.settings:
        if "offload" in setting.partition("=")[0]:
            raise UsageError(f"{setting}: {hf.NO_OFFLOAD}; leave it out")
    name = request.recipe or (DEMO if request.gpus is None or request.inputs else BIG)[request.task]
    prepared = None
    if request.inputs:
        prepared = Path("data_index") / (request.run.name if request.run else name_of(request.inputs[0]))
    own_name = prepared.name if prepared else re.sub(r"\.ya?ml$", "", Path(name).name)
    run = RunFolder(request.run or Path("runs") / own_name)
    found = Collector()
    with found.collecting():
        recipe, settings = read_recipe(recipe_path(name), request.settings)
        anew = run.given_anew(given_on_command_line(settings))
        recipe = with_changes(_from_checkpoint(recipe, run), run.changes(), anew)
        recipe = with_first_warmup(recipe, run)
    if found.errors:  # what can be checked without a recipe
        for check in (lambda: place.check_run_folder(run, request), lambda: place.check_inputs(request)):
            with found.collecting():
                check()
        found.raise_all()
    nowhere = Devices(recipe.parallel.device, recipe.parallel.num_gpus or 1, None)
    if prepared is None:
        return Case(request, recipe, settings, run, Path(recipe.data.manifest).parent, nowhere)
    if settings.origin("data.manifest") == COMMAND_LINE:
        raise UsageError("-i makes a manifest of its own, and data.manifest names another; give one of them")
    manifest = recipe.data.model_copy(update={"manifest": str(prepared / "mixture.yaml"), "stories": None})
    return Case(request, recipe.model_copy(update={"data": manifest}), settings, run, prepared, nowhere)


def _from_checkpoint(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with a checkpoint as `checkpoint.initial_checkpoint` where that names a run.

    It is the newest one, or the one that `run` was begun with before.
    """
    wanted = recipe.checkpoint.initial_checkpoint
    base = None if wanted is None else RunFolder(Path(wanted))
    if base is None or not base.exists:
        return recipe
    begun = run_recipe(run).checkpoint.initial_checkpoint if run.exists else None
    if begun is None or Path(begun).parent != base.checkpoints:
        newest = newest_good(base.checkpoints)
        if newest is None:
            return recipe  # which a check refuses
        begun = str(newest[0])
    checkpoint = recipe.checkpoint.model_copy(update={"initial_checkpoint": begun})
    return recipe.model_copy(update={"checkpoint": checkpoint})


def name_of(text: str) -> str:
    """`books` of `books.jsonl.gz`, `books/` and `books/*.txt`."""
    for part in reversed(Path(text).parts):
        name = part.split(".")[0]
        if name and not any(wild in part for wild in "*?[") and part not in ("..", "/"):
            return name
    return "text"


def preflight(case: Case, checks: Sequence[Check], found: Collector | None = None) -> Job:
    """Make checks of a case; the job that comes of it carries the warnings as notes. Raises as `warnings_of` does."""
    warnings = warnings_of(case, checks, found)
    return replace(case.job, notes=(*case.job.notes, *warnings))


def warnings_of(case: Case, checks: Sequence[Check], found: Collector | None = None) -> list[str]:
    """Make checks of a case; returns the lines of its warnings.

    Args:
        case: the run to check.
        checks: those to make.
        found: errors that were found before, to be raised with the others.

    Raises:
        MegazhError: what refuses the run, all of it together.
    """
    found = found or Collector()
    warnings: list[str] = []
    for check in checks:
        with found.collecting():
            warnings += check(case)
    found.errors = [_placed(error, case.settings) for error in found.errors]
    found.raise_all()
    return warnings


def _placed(error: MegazhError, settings: Settings) -> MegazhError:
    """The error, naming the places where the settings were written that it is about."""
    return UsageError(settings.with_places(str(error))) if isinstance(error, UsageError) else error


def check_recipe(recipe: Recipe, settings: Settings, path: Path) -> None:
    """Check that the recipe of a file works on the GPUs that it names itself (without `num_gpus`: one per stage).

    Raises:
        MegazhError: the batch, the stages, the dtypes, the memory limit or the warm-up cannot work.
    """
    found = Collector()
    ranks = recipe.parallel.num_gpus or recipe.parallel.pipe_parallel_size
    device = Device.CPU if recipe.parallel.device is Device.CPU else Device.CUDA
    with found.collecting():
        warnings_of(planned_case(recipe, settings, Devices(device, ranks, None)), FIT)
    found.errors = [UsageError(f"{path}: {error}") for error in found.errors]
    found.raise_all()


def planned_case(recipe: Recipe, settings: Settings, devices: Devices, stages: int | None = None) -> Case:
    """The case of a recipe that is only planned, on devices that need not be here."""
    request = Request(stages=stages or recipe.parallel.pipe_parallel_size, num_gpus=devices.ranks)
    folder = Path(recipe.data.manifest).parent
    return Case(request, recipe, settings, RunFolder(Path("runs") / "plan"), folder, devices, planned=True)
