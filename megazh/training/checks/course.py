"""Whether a run may go on by the course of another recipe: what it has consumed, and the curve of its learning rate."""

from collections.abc import Iterator
from pathlib import Path

from megazh.config import from_mapping
from megazh.errors import Collector, DataError, UsageError
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    gone_on_since,
    list_checkpoints,
    named_checkpoint,
    newest_good,
    read_manifest,
    step_of,
)
from megazh.training.course import Course, Kind
from megazh.training.job import Job
from megazh.training.recipe import Recipe, Resume

NOTABLE = 0.01
"""Relative difference of two learning rates that is worth a line."""
_SAME = 1e-6
"""Largest difference of two learning rates, relative to the peak, that is taken for rounding."""
_COMPARED = 1000
"""Largest number of steps whose learning rates are compared."""

Saved = tuple[Path, CheckpointManifest]


def goes_on_from(run: RunFolder, recipe: Recipe) -> Saved | None:
    """The checkpoint that a start of this recipe resumes from; None where the run begins.

    Raises:
        DataError: the one that `checkpoint.resume` names is damaged.
    """
    newest, named = newest_good(run.checkpoints), recipe.checkpoint.resume
    if isinstance(named, Resume) or (newest is not None and gone_on_since(newest[1], named)):
        return newest
    path = named_checkpoint(run.checkpoints, named)
    return (path, read_manifest(path)) if (path / MANIFEST).is_file() else newest


def course_of(saved: Saved) -> Course:
    """The course by which a checkpoint was trained. Raises DataError where its manifest holds no recipe."""
    path, manifest = saved
    try:
        return from_mapping(manifest.recipe, Recipe, str(path / MANIFEST)).course
    except UsageError as error:
        raise DataError(f"{error}; resume with the version of megazh that wrote it, or from another one") from None


def with_first_warmup(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with the warm-up, in steps, of the run that it goes on with, where it gives a share.

    A share is one of the steps that the run was begun with: another length shall not move the warm-up behind it.
    """
    saved = newest_good(run.checkpoints) if run.exists else None
    span = recipe.schedule.warmup
    if saved is None or isinstance(span, str) or span >= 1:
        return recipe
    before, now = course_of(saved).schedule.warmup, recipe.course
    if before == now.schedule.warmup or before > now.steps:
        return recipe
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"warmup": float(before)})})


def check_course(job: Job, found: Collector) -> None:
    """What is consumed stays as it was, and the curve bends only where that is allowed."""
    saved = goes_on_from(job.run, job.recipe) if job.run.exists else None
    if saved is None:
        return
    before, now, done = course_of(saved), job.recipe.course, saved[1].step
    with found.collecting():
        check_consumed(job.run.path, saved[1], before, now)
    goes_on = done < now.steps or (done == now.steps and not saved[1].complete)
    if goes_on and bends(before, now, done) and not job.recipe.schedule.allow_bend:
        found.add(UsageError(f"{job.run.path}: {_bent(job.run, before, now, done)}"))


def check_consumed(path: Path, saved: CheckpointManifest, before: Course, now: Course) -> None:
    """Check that a checkpoint has consumed what another course gives to its steps.

    Args:
        path: the run's folder, for errors.
        saved: the checkpoint's manifest.
        before: the course by which it was trained.
        now: the course that is to go on.

    Raises:
        UsageError: a step had another batch, or segments of another length.
    """
    begins = [part[0] for course in (before, now) for part in course.parts()]
    steps = sorted({step for step in begins if step < saved.step})
    for step in steps:
        for key, had, has in (
            ("batch", before.samples(step), now.samples(step)),
            ("length", before.length(step), now.length(step)),
        ):
            if had != has:
                raise UsageError(
                    f"{path}: step {step + 1:,} was trained with a {key} of {had}, and by this recipe it would have "
                    f"had {has}; {saved.step:,} steps and {saved.tokens:,} tokens are done: change schedule.{key} for "
                    "later tokens only, or start another run with -r"
                )
    passed = saved.guard.samples_passed if saved.guard else 0
    if saved.samples - passed != now.samples_before(saved.step):
        raise UsageError(
            f"{path}: its {saved.step:,} steps have consumed {saved.samples:,} samples, and by this recipe it would "
            f"have been {now.samples_before(saved.step):,}; resume with the batch of before, or start another run with "
            "-r"
        )


def bends(before: Course, now: Course, done: int) -> bool:
    """Whether steps done along one course would have had other learning rates, relative to the peak, by another."""
    return done > 0 and _apart(before, now, _most_apart(before, now, done)) > _SAME


def _most_apart(before: Course, now: Course, done: int) -> int:
    """The step, of those that are done, whose learning rates differ most relative to the peak; the latest of equals."""
    count = min(done, _COMPARED)
    steps = {done * number // count for number in range(count)} | {done - 1}
    steps |= {course.schedule.warmup - 1 for course in (before, now) if 0 < course.schedule.warmup <= done}
    return max(sorted(steps, reverse=True), key=lambda step: _apart(before, now, step))


def _apart(before: Course, now: Course, step: int) -> float:
    return abs(before.rate(step) / before.peak - now.rate(step) / now.peak)


def _bent(run: RunFolder, before: Course, now: Course, done: int) -> str:
    step = _most_apart(before, now, done)
    rates = f"step {step + 1:,} had {{}}, and would have had {{}}".format(*_shown(before.rate(step), now.rate(step)))
    follow = f"follow the new curve from the next step on ({now.rate(done):.2e})"
    aim = follow if done < now.steps else "end the run here, without the rest of the curve that it was begun with"
    earlier = ""
    if before.kind is now.kind is Kind.WSD:
        begun = min(course.steps - course.schedule.decay for course in (before, now))
        stable = [path for path in list_checkpoints(run.checkpoints) if step_of(path) <= begun]
        if stable and not bends(before, now, step_of(stable[-1])):
            earlier = (
                f", or go on from before the decay with checkpoint.resume={stable[-1].name}, which drops the "
                "records of the steps behind it and sets later checkpoints aside"
            )
    return (
        f"by {now.kind} over {now.steps:,} steps ({before.kind} over {before.steps:,} before), the steps that are done "
        f"would have had other learning rates: {rates}; keep the settings of before, or add schedule.allow_bend=true, "
        f"to {aim}{earlier}"
    )


def _shown(old: float, new: float) -> tuple[str, str]:
    """Two learning rates as text, with more digits where few would show no difference."""
    short = f"{old:.2e}", f"{new:.2e}"
    return short if short[0] != short[1] else (f"{old:.6e}", f"{new:.6e}")


def describe_curve(job: Job) -> Iterator[str]:
    """Lines on what becomes of the learning rate where a run goes on with other settings."""
    saved = goes_on_from(job.run, job.recipe)
    if saved is None or saved[1].step >= job.recipe.course.steps:
        return
    before, now, done = course_of(saved), job.recipe.course, saved[1].step
    old, new, bent = before.rate(done), now.rate(done), bends(before, now, done)
    if abs(new - old) > NOTABLE * max(old, new) and (bent or before.peak != now.peak):
        yield (
            f"warning: {job.run.path}: the learning rate changes at step {done + 1:,}, the next one: {old:.2e} by the "
            f"settings so far, {new:.2e} now (the step before had {before.rate(max(done - 1, 0)):.2e})"
        )
    elif bent or before.steps != now.steps:
        shown = f"{old:.2e}", f"{new:.2e}"
        if shown[0] != shown[1]:
            yield f"  {'learning rate of the next step':<32} {shown[0]} -> {shown[1]}"
        if now.kind is Kind.WSD:
            first, later = (course.steps - course.schedule.decay + 1 for course in (before, now))
            yield f"  {'first step of the decay':<32} {first:,} -> {later:,}"
