"""Whether a run folder that holds a run already may go on as this job, and what changes if it does.

To compare something else on resume, add a function to `_COMPARISONS`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megazh.errors import Collector, UsageError
from megazh.run.folder import ANOTHER_RUN, DESCRIPTION, RunFolder
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    check_identity,
    list_checkpoints,
    named_checkpoint,
    newest_good,
    read_manifest,
)
from megazh.training.checks.course import check_course, describe_curve
from megazh.training.job import Case, Job, with_dtypes
from megazh.training.live import describe as describe_set
from megazh.training.live import given_on_command_line
from megazh.training.recipe import Recipe, Resume, differing_keys, run_recipe


def same_run(case: Case) -> Iterator[str]:
    """The run folder is new, or holds the same run; yields the settings that change."""
    job = case.job
    check_resume(job)
    yield from describe_changes(job)
    given = given_on_command_line(case.settings)
    yield from describe_set(job.run.changes(), given, job.run.given_anew(given), steps_done(job.run) or 0)


def check_resume(job: Job) -> None:
    """Check that a run that exists already may be resumed as this job.

    Raises:
        MegazhError: a length below what is done, another dtype, model, seed or batch so far, a learning rate that would
            bend; all that differs, each with both values. Or a checkpoint that is asked for cannot be used.
    """
    found = Collector()
    for compare in _COMPARISONS:
        with found.collecting():
            compare(job, found)
    found.raise_all()


def steps_done(run: RunFolder) -> int | None:
    """Optimizer steps of the newest whole checkpoint of a run; None without one."""
    newest = newest_good(run.checkpoints)
    return newest[1].step if newest else None


def is_complete(run: RunFolder, recipe: Recipe) -> bool:
    """Whether the run has a checkpoint of the recipe's last step, or of a later one, and has evaluated it."""
    newest = newest_good(run.checkpoints)
    return newest is not None and newest[1].step >= recipe.course.steps and newest[1].complete


def saved_data(run: RunFolder) -> dict[str, str] | None:
    """Fingerprint of the data that the newest whole checkpoint was trained on; None without one."""
    newest = newest_good(run.checkpoints)
    return newest[1].data if newest else None


def _checkpoint_asked_for(job: Job, found: Collector) -> None:
    """`checkpoint.resume` names what can be used."""
    wanted, folder = job.recipe.checkpoint, job.run.checkpoints
    if wanted.resume is Resume.NEVER and (list_checkpoints(folder) or job.run.exists):
        found.add(UsageError(f"{job.run.path}: holds a run already, and resume=never; give another folder with -r"))
    if not isinstance(wanted.resume, Resume):
        path = named_checkpoint(folder, wanted.resume)
        if not (path / MANIFEST).is_file():
            found.add(
                UsageError(
                    f"checkpoint.resume={wanted.resume}: no such checkpoint; expected auto, never, or the path of one "
                    f"(those of this run are in {folder})"
                )
            )
        elif not job.run.exists:
            found.add(
                UsageError(
                    f"checkpoint.resume={wanted.resume}: {job.run.path} holds no run that could be resumed; give its "
                    f"folder with -r, or begin another run with checkpoint.initial_checkpoint={wanted.resume}"
                )
            )
        else:
            check_identity(path, read_manifest(path), job.run.info().run_id)


def _checkpoint(job: Job, found: Collector) -> None:
    """Dtype and length against the newest checkpoint."""
    newest = newest_good(job.run.checkpoints)
    if newest is None:
        return
    path, saved = newest
    if saved.precision != job.precision.compute:
        found.add(
            UsageError(
                f"{path}: was saved in {saved.precision}, and this is {job.precision.compute} (precision.dtype=auto "
                "follows the device); resume in the same, or start another run with -r"
            )
        )
    _length(job, saved, found)


def _length(job: Job, saved: CheckpointManifest, found: Collector) -> None:
    """A length below what is done is refused, of a complete run too: nothing of it can be had."""
    steps = job.recipe.course.steps
    if saved.step <= steps or not job.run.exists:
        return
    before = max(run_recipe(job.run).course.steps, saved.step)
    key = "steps" if job.recipe.schedule.steps is not None else "tokens"
    done = saved.step if key == "steps" else saved.tokens
    found.add(
        UsageError(
            f"{job.run.path}: {saved.step:,} of {before:,} steps are done, and this run is to have "
            f"{steps:,}; give schedule.{key}= at least {done}, or start another run with -r"
        )
    )


def _engine(job: Job, found: Collector) -> None:
    """Engines round and store differently: a run keeps its own."""
    if not (job.run.path / DESCRIPTION).is_file():
        return  # a new run, or what is none, which another check refuses
    began = job.run.info().engine
    if began != job.engine:
        newest = newest_good(job.run.checkpoints)
        take = f"; checkpoint.initial_checkpoint={newest[0]} begins one with its weights" if newest else ""
        found.add(
            UsageError(
                f"{job.run.path}: the run was begun with -t {began}, and this is -t {job.engine}; give -t {began} "
                f"again, or another folder with -r{take}"
            )
        )


def _settings(job: Job, found: Collector) -> None:
    if not job.run.exists:
        return
    before = with_dtypes(run_recipe(job.run), job.device)
    compared = {"precision.dtype"} if list_checkpoints(job.run.checkpoints) else set()  # with the checkpoint
    for key, old, new, free in differing_keys(before, job.recipe):
        if not free and key not in compared:
            found.add(
                UsageError(f"{job.run.path}: the run was begun with {key}={old}, and this one has {new}; {ANOTHER_RUN}")
            )


_COMPARISONS: tuple[Callable[[Job, Collector], None], ...] = (
    _engine,
    _checkpoint_asked_for,
    _checkpoint,
    _settings,
    check_course,
)


def describe_changes(job: Job) -> Iterator[str]:
    """The settings that differ from the last start of a run, old and new, and what becomes of its learning rate.

    Of a complete run it is one line, as nothing comes of them.
    """
    if not job.run.exists:
        return
    before = with_dtypes(run_recipe(job.run), job.device)
    changed = [
        (key, old, new)
        for key, old, new, free in differing_keys(before, job.recipe)
        if free and not (key == "parallel.stage_bounds" and new is None)
    ]
    if not changed:
        return
    if is_complete(job.run, job.recipe):
        values = ", ".join(f"{key}={_written(new)}" for key, _, new in changed)
        yield f"{job.run.path}: the run is complete and nothing is left to do: {values} not applied"
        return
    yield f"{job.run.path}: settings that changed since the last start:"
    for key, old, new in changed:
        yield f"  {key:<32} {_written(old)} -> {_written(new)}"
    yield from describe_curve(job)


def _written(value: Any) -> str:
    return "not set" if value is None else str(value)
