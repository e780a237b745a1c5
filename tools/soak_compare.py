"""Whether a run is the run that nobody interrupted: samples, losses, and each step recorded exactly once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.sample_log import Sample, read_samples

TOLERANCE = 1e-5
"""Largest relative difference of losses between layouts."""


@dataclass(frozen=True)
class Recorded:
    """What a run has recorded."""

    losses: list[tuple[int, float]]
    """Step and loss of each record of a step, in the order of the file."""
    validations: list[tuple[int, float]]
    """Step and loss of each validation."""
    samples: Mapping[int, Sequence[Sample]]
    """Samples that were trained on, by step."""


def recorded(run: Path) -> Recorded:
    """Read what the run in folder `run` has recorded.

    Raises:
        MegazhError: a file is missing or damaged.
    """
    records = read_metrics(run)
    losses, validations = (
        [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        for kind in ("step", "validation")
    )
    return Recorded(losses, validations, read_samples(RunFolder(run).logs))


@dataclass(frozen=True)
class Take:
    """Steps that an attempt has taken in one layout, also those that were lost afterwards."""

    layout: str
    begin: int
    """Step that it went on from."""
    losses: Mapping[int, float]
    """Loss of each step after `begin`."""


def first_difference(wanted: Recorded, home: Recorded, found: Recorded, same_bits: int) -> str | None:
    """The first difference between a run and the run that nobody interrupted; None where there is none.

    Args:
        wanted: the run that nobody interrupted, in one process.
        home: the same in the layout that `found` began in.
        found: the run.
        same_bits: steps up to this one were all taken in that layout: their losses have to be equal in each bit. All
            losses have to be equal to `TOLERANCE`, relative.
    """
    steps = [step for step, _ in wanted.losses]
    for place, step in enumerate(steps):
        if place >= len(found.losses):
            return f"step {step} is not recorded"
        if found.losses[place][0] != step:
            return f"the record behind step {place} is one of step {found.losses[place][0]}, not of step {step}"
    if len(found.losses) > len(steps):
        return f"step {found.losses[len(steps)][0]} is recorded behind the last step"
    for step in steps:
        if different := _samples(step, wanted.samples.get(step, []), found.samples.get(step, [])):
            return different
    if extra := sorted(found.samples.keys() - set(steps)):
        return f"samples of step {extra[0]} were trained on, which is not one of the run"
    for (step, loss), (_, here), (_, now) in zip(wanted.losses, home.losses, found.losses, strict=True):
        if step <= same_bits and here != now:
            return f"the loss of step {step} is {now!r}, and {here!r} in an uninterrupted run of the same layout"
        if not math.isclose(loss, now, rel_tol=TOLERANCE):
            return f"the loss of step {step} is {now!r}, and {loss!r} in an uninterrupted process"
    if [step for step, _ in wanted.validations] != [step for step, _ in found.validations]:
        return f"validated at steps {[step for step, _ in found.validations]}, not {[s for s, _ in wanted.validations]}"
    for (step, loss), (_, now) in zip(wanted.validations, found.validations, strict=True):
        if not math.isclose(loss, now, rel_tol=TOLERANCE):
            return f"the validation loss at step {step} is {now!r}, and {loss!r} in an uninterrupted process"
    return None


def _samples(step: int, wanted: Sequence[Sample], found: Sequence[Sample]) -> str | None:
    if list(wanted) == list(found):
        return None
    numbers, other = [number for number, _ in wanted], [number for number, _ in found]
    if numbers != other:
        return f"step {step} was trained on samples {other}, not on {numbers}"
    changed = [number for (number, before), (_, now) in zip(wanted, found, strict=True) if before != now]
    return f"sample {changed[0]} of step {step} was trained on with other tokens"


def retaken_difference(takes: Sequence[Take]) -> str | None:
    """The first step that was taken twice by one layout from the same state, with different bits; None: there is none.

    Args:
        takes: all that the attempts of a run have taken, in their order.
    """
    for place, take in enumerate(takes):
        for before in reversed(takes[:place]):
            if not before.begin <= take.begin <= max(before.losses, default=before.begin):
                continue
            if before.layout == take.layout:
                for step in sorted(take.losses.keys() & before.losses.keys()):
                    if take.losses[step] != before.losses[step]:
                        return (
                            f"the loss of step {step} is {take.losses[step]!r} when it is taken again by the same "
                            f"layout ({take.layout}) from step {take.begin}, and was {before.losses[step]!r}"
                        )
            if before.begin < take.begin:
                break  # it has written the checkpoint that this take goes on from
    return None


def bits_until(takes: Sequence[Take]) -> int | None:
    """Last step up to which all steps were taken in the layout of the first take; None: all of them."""
    return min((take.begin for take in takes if take.layout != takes[0].layout), default=None)
