"""Draws a run on axes of matplotlib: curves, validation, marks of events. All pictures of runs are made of these."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from megazh.run.fonts import Fonts
from megazh.run.history import Axis, History, Measure
from megazh.run.smoothing import Smoothing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_LABELS = {Axis.TOKENS: "tokens", Axis.STEPS: "steps", Axis.HOURS: "hours of training steps"}
Y_LABELS = {Measure.LOSS: "loss (nats per token)", Measure.BITS: "bits per byte"}

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
STYLES = ("-", "--", "-.", ":")
"""Each run has a colour; where there are more runs than colours, the next ones have another line style as well."""

MARK_COLOURS = {
    "skip": "tab:purple",
    "rollback": "tab:brown",
    "resume": "0.45",
    "relayout": "tab:cyan",
    "save_failed": "tab:pink",
    "set": "tab:olive",
}
"""Events that are marked, by name."""
_MARK_WORDS = {"skip": "skipped step", "relayout": "resume in another layout", "set": "setting changed"}
_STRETCHES = 2000
_MOST_MARKS = 300  # more would be one block of colour


@contextmanager
def drawing(fonts: Fonts, salt: str = "megazh", more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Settings of matplotlib for a picture, from its begin until it is saved: text in an SVG stays text.

    Args:
        fonts: the fonts of its text.
        salt: names parts of an SVG; pictures on one page need different ones.
        more: other settings, by matplotlib's names.
    """
    import matplotlib

    settings: dict[Any, Any] = {"font.family": list(fonts.families), "svg.fonttype": "none", "svg.hashsalt": salt}
    settings |= more or {}
    with matplotlib.rc_context(settings):
        yield


def encoded(figure: Figure, suffix: str, fonts: Fonts) -> bytes:
    """A figure as the bytes of a `.png` or `.svg`, the same for the same figure."""
    import warnings

    metadata: dict[str, Any] = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
    picture = io.BytesIO()
    with warnings.catch_warnings():
        if fonts.missing:  # the caller says so once; an SVG leaves the characters to the fonts of whoever looks at it
            warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture, format=suffix.removeprefix("."), dpi=110, metadata=metadata)
    return picture.getvalue()


def draw_training(
    axes: Axes, x: np.ndarray, y: np.ndarray, smoothing: Smoothing, look: dict[str, Any], each: float
) -> Any:
    """Draw the measure of each step, and above it the smoothed curve; returns the line for the legend.

    Args:
        x: where each step lies.
        y: the measure of each step; need not be finite.
        smoothing: how the thick line is smoothed.
        look: colour and line style of the run.
        each: opacity of the line of each step; 0 leaves it out.
    """
    finite = np.isfinite(y) & np.isfinite(x)
    if smoothing.off or not finite.any():
        return draw_line(axes, x, y, linewidth=1.0, **look)
    if each:
        draw_line(axes, x, y, alpha=each, linewidth=0.7, **{**look, "linestyle": "-"})
    return draw_line(axes, x[finite], smoothing(y[finite]), linewidth=1.6, **look)


def draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, **look: Any) -> Any:
    """Draw a line, or a dot for a single point; returns it. Of very many points, only extremes are drawn."""
    return axes.plot(*_thinned(x, y), marker="." if len(y) == 1 else None, **look)[0]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest value of each of `_STRETCHES` stretches; all points where they are not many."""
    size = len(y) // _STRETCHES
    if size < 4:
        return x, y
    whole = len(y) // size * size
    low = np.where(np.isfinite(y), y, np.inf)[:whole].reshape(-1, size).argmin(1)
    high = np.where(np.isfinite(y), y, -np.inf)[:whole].reshape(-1, size).argmax(1)
    begins = np.arange(0, whole, size)
    kept = np.unique(np.concatenate([[0], begins + low, begins + high, np.arange(whole, len(y)), [len(y) - 1]]))
    return x[kept], y[kept]


def draw_validation(axes: Axes, history: History, x: Axis, measure: Measure, look: dict[str, Any]) -> Any:
    """Draw the measure of validations as dots on a line; returns it for the legend, None where there is none."""
    steps, values = history.validation(measure)
    if not np.isfinite(values).any():
        return None
    return axes.plot(history.positions(steps, x), values, linewidth=1.0, marker="o", markersize=4, **look)[0]


def draw_corpora(axes: Axes, history: History, x: Axis, measure: Measure) -> list[tuple[Any, str]]:
    """Draw validation by corpus, where there are several, as thin lines; returns each with its name."""
    corpora = history.validation_of_corpora(measure)
    if len(corpora) < 2:
        return []
    found = []
    for number, (name, (steps, values)) in enumerate(corpora.items()):
        style = STYLES[1:][number % 3]
        colour = COLOURS[(number + 1) % len(COLOURS)]
        line = axes.plot(history.positions(steps, x), values, linewidth=0.8, marker=".", color=colour, linestyle=style)
        found.append((line[0], name))
    return found


def draw_marks(axes: Axes, history: History, x: Axis) -> list[tuple[Any, str]]:
    """Mark what happened by vertical lines; returns a line for each kind, with its name and number."""
    found = []
    marks = [mark for mark in history.marks() if mark.name in MARK_COLOURS]
    for name, count in Counter(mark.name for mark in marks).items():
        steps = np.array([mark.step for mark in marks if mark.name == name], dtype=np.float64)
        shown = steps[:: -(-count // _MOST_MARKS)]
        lines = [
            axes.axvline(at, color=MARK_COLOURS[name], linewidth=0.8, linestyle=":", zorder=0)
            for at in history.positions(shown, x)
        ]
        found.append((lines[0], f"{_MARK_WORDS.get(name, name.replace('_', ' '))} ({count:,})"))
    return found


def draw_rates(axes: Axes, history: History, x: Axis) -> None:
    """Draw learning rate and gradient norm, with a scale for each."""
    at = history.x(x)
    rate = draw_line(axes, at, history.column("learning_rate"), color="tab:green", linewidth=1.2, label="learning rate")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    norms = axes.twinx()
    norm = history.column("grad_norm")
    line = draw_line(norms, at, norm, color="tab:gray", alpha=0.6, linewidth=0.7, label="gradient norm")
    if (norm[np.isfinite(norm)] > 0).any():
        make_logarithmic(norms)
    norms.set_ylabel("gradient norm")
    # Above the panel: inside, it covers a curve wherever it stands.
    axes.legend(
        handles=[rate, line], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1
    )


def make_logarithmic(axes: Axes) -> None:
    """Give the vertical axis a logarithmic scale, with numbers such as 2 and 0.9, not 2 x 10^0 and 9e-01."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # empty where a number has no room

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


def format_x(axes: Axes, x: Axis) -> None:
    """Name the axis that curves are drawn over, with numbers such as 30G for tokens and steps."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(X_LABELS[x])
    if x is not Axis.HOURS and axes.get_xscale() == "linear":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def add_legend(axes: Axes, entries: Sequence[tuple[Any, str]], fonts: Fonts, **options: Any) -> None:
    """Add a legend in which names are shown as they are, also `$x$` and `_x`, which matplotlib reads otherwise."""
    if not entries:
        return
    legend = axes.legend([line for line, _ in entries], [str(number) for number in range(len(entries))], **options)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(fonts.drawable(name))
