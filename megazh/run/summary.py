"""The closing lines of a complete run: losses, samples, time, and how to go on."""

import math
import shlex
from collections.abc import Iterator

from megazh.program import program
from megazh.run.folder import RunFolder
from megazh.run.metrics import METRICS, read_metrics
from megazh.run.plot import plot_losses
from megazh.writing import warn_once

_SAMPLES = 2


def describe_end(
    run: RunFolder, steps: int, flops_per_token: float, words: list[str], longer: str, anew: str
) -> Iterator[str]:
    """The lines that sum up a complete run. Draws its plot.

    Args:
        run: the run's folder.
        steps: optimizer steps of the run.
        flops_per_token: floating-point operations per token, the count behind MFU.
        words: the arguments of `megazh` that try the model, such as `sample runs/demo 从前`.
        longer: the command that trains on, twice as long.
        anew: the command that starts another run of the same recipe.
    """
    records = read_metrics(run.path) if (run.path / METRICS).exists() else []
    trained = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    samples = [record for record in records if record["kind"] == "sample"]
    yield ""
    yield f"{run.path}: complete, {steps:,} steps"
    if not trained:
        yield f"{'metrics':<12}no steps are in {run.path / METRICS}"
        return
    yield f"{'loss':<12}{trained[0]['loss']:.4f} at step {trained[0]['step']}, {trained[-1]['loss']:.4f} at the end"
    if validations:
        first, last = validations[0], validations[-1]
        yield (
            f"{'validation':<12}{first['loss']:.4f} before, {last['loss']:.4f} after; "
            f"{first['bits_per_byte']:.3f} and {last['bits_per_byte']:.3f} bits per byte"
        )
    for sample in samples[-_SAMPLES:]:
        yield f"{'sample':<12}after step {sample['step']:,}: {sample['prompt']}|{' '.join(sample['text'].split())}"
    if skipped := [record for record in trained if record["skipped"]]:
        odd = sum(not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])) for record in skipped)
        spikes = len(skipped) - odd
        yield f"{'skipped':<12}{len(skipped):,} of {len(trained):,} steps: {odd:,} not finite, {spikes:,} spikes"
    try:
        plot_losses(run.path, run.plot)
        yield f"{'plot':<12}{run.plot}"
    except OSError as error:
        warn_once(run.plot, error, "the run is complete without its plot; the next call draws it")
    except Exception as error:  # the run is complete without it
        yield f"{'plot':<12}could not be drawn: {' '.join(str(error).split())}"
    seconds = sum(record["step_seconds"] for record in trained)
    operations = flops_per_token * trained[-1]["tokens"] / 1e12
    yield f"{'time':<12}{seconds:.0f} s in {len(trained)} steps, {operations:.1f} TFLOP"
    yield ""
    yield "go on:"
    yield f"  {program()} {shlex.join(words)}"
    yield f"  {program('tensorboard', 'tensorboard.main')} {shlex.join(['--logdir', str(run.path / 'tensorboard')])}"
    yield f"  {longer}    # train on, twice as long"
    yield f"  {anew}    # start another run"
