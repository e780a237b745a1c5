"""The plot of a run: training and validation loss over tokens, learning rate and gradient norm below."""

import io
from pathlib import Path

import numpy as np

from megazh.errors import DataError, UsageError
from megazh.files import write_atomic
from megazh.run.metrics import read_metrics

_SMOOTH_FRACTION = 0.02


def plot_losses(folder: Path, output: Path) -> None:
    """Draw the run in `folder` to the PNG `output`.

    The thick line is the moving average of the finite losses: a window centred on each step, 2 % of the steps wide and
    at least nine steps.

    Raises:
        UsageError: the folder holds no metrics, or `output` is not named .png.
        DataError: the metrics are damaged, or hold no step.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: a loss plot is a PNG; name it .png")
    records = read_metrics(folder)
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    if not steps:
        raise DataError(f"{folder}: no step is recorded yet; let the run take one first")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogFormatter

    tokens, loss = _column(steps, "tokens"), _column(steps, "loss")
    finite = np.isfinite(loss)

    figure = Figure(figsize=(8.0, 6.0), layout="constrained")  # pyplot would keep the figure in a global registry
    top, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    marker = "." if len(steps) == 1 else None
    top.plot(tokens, loss, color="tab:blue", alpha=0.35, linewidth=0.7, marker=marker, label="training, each step")
    if finite.any():
        top.plot(tokens[finite], _smoothed(loss[finite]), color="tab:blue", linewidth=1.6, label="training, smoothed")
    if validations:
        points = _column(validations, "tokens"), _column(validations, "loss")
        top.plot(*points, color="tab:red", linewidth=1.0, marker="o", markersize=4, label="validation")
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    top.legend()

    lines = rates.plot(
        tokens, _column(steps, "learning_rate"), color="tab:green", linewidth=1.2, marker=marker, label="learning rate"
    )
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    norms = rates.twinx()
    norm = _column(steps, "grad_norm")
    lines += norms.plot(tokens, norm, color="tab:gray", alpha=0.6, linewidth=0.7, marker=marker, label="gradient norm")
    if (norm[np.isfinite(norm)] > 0).any():
        norms.set_yscale("log")
        norms.yaxis.set_major_formatter(LogFormatter())  # 2, not 2 x 10^0
        norms.yaxis.set_minor_formatter(LogFormatter())
    norms.set_ylabel("gradient norm")
    rates.legend(handles=lines)

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    write_atomic(output, picture.getvalue())


def _column(records: list[dict], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], dtype=np.float64)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average over a centred window, which is cut off at both ends."""
    count = len(values)
    half = max(4, round(count * _SMOOTH_FRACTION / 2))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return (sums[last] - sums[first]) / (last - first)
