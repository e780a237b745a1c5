"""Pictures of runs: loss.png, which a run draws of itself, and curves of one or several runs as a PNG or SVG."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megazh.errors import UsageError
from megazh.files import write_atomic
from megazh.run.drawing import (
    COLOURS,
    STYLES,
    Y_LABELS,
    add_legend,
    draw_corpora,
    draw_marks,
    draw_rates,
    draw_training,
    draw_validation,
    drawing,
    encoded,
    format_x,
    make_logarithmic,
)
from megazh.run.fonts import Fonts, fonts_for
from megazh.run.history import Axis, History, Measure, drawable_history
from megazh.run.smoothing import Smoothing

SUFFIXES = (".png", ".svg")
_MOST_WITH_EACH_STEP = 4  # runs; of more, only smoothed curves can be told apart


@dataclass(frozen=True)
class PlotOptions:
    """What a picture of runs shows."""

    x: Axis = Axis.TOKENS
    y: Measure = Measure.LOSS
    smoothing: Smoothing = field(default_factory=Smoothing)
    labels: Sequence[str] = ()
    """Names of the runs in the legend; empty: those of their folders."""
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    """First and last value of the axis; None: all."""
    y_range: tuple[float, float] | None = None
    """As `x_range`."""


def plot_losses(folder: Path, output: Path) -> None:
    """Draw the losses of the run in `folder` over its tokens to the PNG `output`.

    Raises:
        UsageError: the folder holds no metrics, or no step in them, or `output` is not named .png.
        DataError: the metrics are damaged.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: a loss plot is a PNG; name it .png")
    plot_runs([folder], output, PlotOptions())


def plot_runs(folders: Sequence[Path], output: Path, options: PlotOptions) -> list[str]:
    """Draw one or several runs to `output`, a .png or .svg. Of a single run, also learning rate, norm and events.

    Returns:
        Lines for the user: how a measure was derived, and characters that no font has.

    Raises:
        UsageError: a folder holds no step, `output` has another suffix, labels and runs are not as many, or no step
            is in the part of the axis that is shown.
        DataError: metrics are damaged, or lack what the measure needs.
        WriteError: `output` cannot be written.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{output}: a plot is a PNG or an SVG; name it .png or .svg")
    if options.labels and len(options.labels) != len(folders):
        raise UsageError(
            f"--label: {len(options.labels)} for {len(folders)} runs; give one for each run, in their order"
        )
    histories = [drawable_history(folder) for folder in folders]
    _check_range(histories, options)
    labels = list(options.labels) or labels_of(folders)
    corpora = [name for history in histories for name in history.validation_of_corpora(options.y)]
    fonts = fonts_for([*labels, options.title, *corpora])
    shown = fonts if suffix == ".png" else Fonts(fonts.families)

    from matplotlib.figure import Figure  # pyplot would keep the figure in a global registry

    with drawing(fonts):
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        if len(histories) == 1:
            top, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
            entries = _draw_one(top, histories[0], options)
            draw_rates(rates, histories[0], options.x)
        else:
            top = rates = figure.subplots()
            entries = _draw_several(top, histories, labels, options)
        _format(top, rates, options)
        add_legend(top, entries, shown)
        if options.title:
            top.set_title(shown.drawable(options.title), parse_math=False)
        write_atomic(output, encoded(figure, suffix, fonts))
    return [*_derived(histories, options), *filter(None, [fonts.note])]


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Names of runs for a legend: those of their folders, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _draw_one(axes: Any, history: History, options: PlotOptions) -> list[tuple[Any, str]]:
    """Training, validation and marks of one run; returns the entries of the legend."""
    x, y = history.x(options.x), history.training(options.y)
    look = {"color": COLOURS[0]}
    training = draw_training(axes, x, y, options.smoothing, look, each=0.35)
    entries = [(training, "training" if options.smoothing.off else "training, smoothed")]
    if validation := draw_validation(axes, history, options.x, options.y, {"color": "tab:red", "zorder": 3}):
        entries.append((validation, "validation"))
    corpora = draw_corpora(axes, history, options.x, options.y)
    entries += [(line, f"validation: {name}") for line, name in corpora]
    return entries + draw_marks(axes, history, options.x)


def _draw_several(
    axes: Any, histories: Sequence[History], labels: Sequence[str], options: PlotOptions
) -> list[tuple[Any, str]]:
    """Training and validation of several runs, each in its colour; returns the entries of the legend."""
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, str]] = []
    each, validated = 0.2 if len(histories) <= _MOST_WITH_EACH_STEP else 0.0, False
    for number, (history, label) in enumerate(zip(histories, labels, strict=True)):
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": style}
        line = draw_training(axes, history.x(options.x), history.training(options.y), options.smoothing, look, each)
        entries.append((line, label))
        dots = {"color": look["color"], "linestyle": ":", "markeredgecolor": "black", "markeredgewidth": 0.6}
        validated |= draw_validation(axes, history, options.x, options.y, dots) is not None
    if validated:
        dot = Line2D([], [], color="0.4", linestyle=":", marker="o", markersize=4, markeredgecolor="black")
        entries.append((dot, "validation"))
    return entries


def _format(top: Any, bottom: Any, options: PlotOptions) -> None:
    """Scales, ranges and names of the axes; `bottom` is the lowest one."""
    if options.log_x:
        top.set_xscale("log", nonpositive="mask")
    if options.log_y:
        make_logarithmic(top)
    if options.x_range:
        top.set_xlim(*options.x_range)
    if options.y_range:
        top.set_ylim(*options.y_range)
    top.set_ylabel(Y_LABELS[options.y])
    top.grid(alpha=0.3)
    format_x(bottom, options.x)


def _check_range(histories: Sequence[History], options: PlotOptions) -> None:
    """Refuse a part of the axis that no step is in. Raises UsageError."""
    if options.x_range is None:
        return
    low, high = options.x_range
    places = [history.x(options.x) for history in histories]
    if not any(((low <= each) & (each <= high)).any() for each in places):
        first, last = min(each.min() for each in places), max(each.max() for each in places)
        raise UsageError(
            f"--x-range {low:g} {high:g}: no step is there: the {options.x} of the steps are {first:g} to {last:g}"
        )


def _derived(histories: Sequence[History], options: PlotOptions) -> list[str]:
    """How bits per byte of training were found."""
    if options.y is not Measure.BITS:
        return []
    ratios = ", ".join(f"{history.path} {history.bits_per_nat():.4f}" for history in histories)
    return [f"bits per byte of training are its loss times the bits per nat of the run's validation: {ratios}"]
