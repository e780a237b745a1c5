"""Whether a run folder that holds a run already may go on as this job, and what changes if it does.

To compare something else on resume, add a function to `_COMPARISONS`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megazh.errors import Collector, UsageError
from megazh.run.folder import ANOTHER_RUN, RunFolder
from megazh.training.checkpoint_list import CheckpointManifest, list_checkpoints, read_manifest
from megazh.training.job import Case, Job, with_dtypes
from megazh.training.learning_rate import learning_rate, warmup_steps
from megazh.training.recipe import Recipe, Resume, differing_keys, run_recipe

_NOTABLE = 0.01
"""Relative difference of two learning rates that is worth a line."""


def same_run(case: Case) -> Iterator[str]:
    """The run folder is new, or holds the same run; yields the settings that change."""
    job = case.job
    check_resume(job)
    yield from describe_changes(job)


def check_resume(job: Job) -> None:
    """Check that a run that exists already may be resumed as this job.

    Raises:
        MegazhError: another length than is done, layout, dtype, cut, model or seed; all that differs, each with both
            values.
    """
    found = Collector()
    for compare in _COMPARISONS:
        with found.collecting():
            compare(job, found)
    found.raise_all()


def steps_done(run: RunFolder) -> int | None:
    """Optimizer steps of the newest checkpoint of a run; None without one."""
    checkpoints = list_checkpoints(run.checkpoints)
    return read_manifest(checkpoints[-1]).step if checkpoints else None


def is_complete(run: RunFolder, recipe: Recipe) -> bool:
    """Whether the run has a checkpoint of the recipe's last step, or of a later one, and has evaluated it."""
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        return False
    newest = read_manifest(checkpoints[-1])
    return newest.step >= recipe.total_steps and newest.complete is not False


def saved_data(run: RunFolder) -> dict[str, str] | None:
    """Fingerprint of the data that the newest checkpoint was trained on; None without one, or where it has none."""
    checkpoints = list_checkpoints(run.checkpoints)
    return read_manifest(checkpoints[-1]).data if checkpoints else None


def _new_where_asked(job: Job, found: Collector) -> None:
    if job.recipe.checkpoint.resume is Resume.NEVER and (list_checkpoints(job.run.checkpoints) or job.run.exists):
        found.add(UsageError(f"{job.run.path}: holds a run already, and resume=never; give another folder with -r"))


def _checkpoint(job: Job, found: Collector) -> None:
    """Layout, dtype, cut and length against the newest checkpoint."""
    checkpoints = list_checkpoints(job.run.checkpoints)
    if not checkpoints:
        return
    newest, saved, layout = checkpoints[-1], read_manifest(checkpoints[-1]), job.layout
    if (saved.stages, saved.replicas) != (layout.stages, layout.replicas):
        found.add(
            UsageError(
                f"{newest}: was saved by {saved.stages} stages x {saved.replicas} replicas, and this is "
                f"{layout.stages} x {layout.replicas}; resume with "
                f"-n {saved.stages * saved.replicas} -p {saved.stages}, or start another run with -r"
            )
        )
    if saved.precision != job.precision.compute:
        found.add(
            UsageError(
                f"{newest}: was saved in {saved.precision}, and this is {job.precision.compute} (precision.dtype=auto "
                "follows the device); resume in the same, or start another run with -r"
            )
        )
    if job.recipe.parallel.stage_bounds not in (None, saved.bounds):
        found.add(
            UsageError(
                f"{newest}: was saved with stage_bounds {saved.bounds}, and this run requests "
                f"{job.recipe.parallel.stage_bounds}; leave stage_bounds out, or start another run with -r"
            )
        )
    _length(job, saved, found)


def _length(job: Job, saved: CheckpointManifest, found: Collector) -> None:
    """A run that is not complete goes on; a shorter length than is done would end it unnoticed."""
    steps = job.recipe.total_steps
    if saved.step <= steps or not job.run.exists or saved.step >= run_recipe(job.run).total_steps:
        return
    key = "steps" if job.recipe.schedule.steps is not None else "tokens"
    done = saved.step if key == "steps" else saved.tokens
    found.add(
        UsageError(
            f"{job.run.path}: {saved.step:,} of {run_recipe(job.run).total_steps:,} steps are done, and this run is to "
            f"have {steps:,}; give schedule.{key}= at least {done}, or start another run with -r"
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


_COMPARISONS: tuple[Callable[[Job, Collector], None], ...] = (_new_where_asked, _checkpoint, _settings)


def describe_changes(job: Job) -> Iterator[str]:
    """The settings that differ from the last start of a run, old and new, and the jump of its learning rate."""
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
    yield f"{job.run.path}: settings that changed since the last start:"
    for key, old, new in changed:
        yield f"  {key:<32} {_written(old)} -> {_written(new)}"
    yield from _jump(job, before)


def _written(value: Any) -> str:
    return "not set" if value is None else str(value)


def _jump(job: Job, before: Recipe) -> Iterator[str]:
    """A line where the course of the learning rate breaks at the step that comes next."""
    done = steps_done(job.run)
    if done is None or done >= job.recipe.total_steps:
        return
    old, new = _rate(before, done), _rate(job.recipe, done)
    if abs(new - old) > _NOTABLE * max(old, new):
        yield (
            f"warning: {job.run.path}: the learning rate changes at step {done + 1:,}, the next one: {old:.2e} by the "
            f"settings so far, {new:.2e} now (the step before had {_rate(before, done - 1):.2e})"
        )


def _rate(recipe: Recipe, step: int) -> float:
    steps = recipe.total_steps
    warmup = warmup_steps(steps, recipe.schedule.warmup)
    return learning_rate(max(step, 0), steps, recipe.optimizer.learning_rate, warmup, recipe.schedule.min_lr_ratio)
