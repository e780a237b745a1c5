"""The curves of a report, as SVG within the page: lines of the page's own colour, so that they suit light and dark."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megazh.run.drawing import (
    add_legend,
    draw_corpora,
    draw_line,
    draw_marks,
    draw_training,
    draw_validation,
    drawing,
    encoded,
    format_x,
    make_logarithmic,
)
from megazh.run.fonts import Fonts, fonts_for
from megazh.run.history import Axis, History, Measure
from megazh.run.smoothing import Smoothing
from megazh.training.report.html import Html, html

_INK = "#010203"
"""Stands in matplotlib for the colour of the page's text."""
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_SIZE = (5.2, 3.1)
_LEAST_FOR_HALF = 40
_GIB = 1 << 30


def charts(history: History) -> Iterator[Html]:
    """The curves of a run over its tokens, one after another; none where no step is recorded."""
    if not history.steps:
        return
    fonts = fonts_for(history.validation_of_corpora(Measure.LOSS))
    for number, (title, draw) in enumerate(_drawings(history)):
        with drawing(fonts, f"chart{number}", dict.fromkeys(_INKED, _INK) | {"font.size": 9}):
            yield _chart(number, title, draw, Fonts(fonts.families), history)


def _drawings(history: History) -> Iterator[tuple[str, Callable[[Any], list[tuple[Any, str]]]]]:
    """Title and drawing of each chart; a drawing gets the axes and returns the entries of the legend."""
    yield "Loss, nats per token", lambda axes: _losses(axes, history)
    if len(history.steps) >= _LEAST_FOR_HALF:
        yield "Loss, second half", lambda axes: _second_half(axes, history)
    yield "Learning rate", lambda axes: _lines(axes, history, [("learning_rate", "", 1.0)])
    yield "Gradient norm before clipping", lambda axes: _lines(axes, history, [("grad_norm", "", 1.0)], log=True)
    yield "Throughput, tokens per second", lambda axes: _lines(axes, history, [("tokens_per_second", "", 1.0)])
    if np.isfinite(history.column("memory_bytes")).any():
        parts = [("memory_bytes", "allocated", 1 / _GIB), ("memory_reserved", "reserved", 1 / _GIB)]
        yield "Memory, GiB of the fullest GPU", lambda axes: _lines(axes, history, parts)


def _losses(axes: Any, history: History) -> list[tuple[Any, str]]:
    x, y = history.x(Axis.TOKENS), history.training(Measure.LOSS)
    entries = [(draw_training(axes, x, y, Smoothing(), {"color": "tab:blue"}, each=0.4), "training, smoothed")]
    look = {"color": "tab:red", "zorder": 3}
    if validation := draw_validation(axes, history, Axis.TOKENS, Measure.LOSS, look):
        entries.append((validation, "validation"))
    entries += draw_corpora(axes, history, Axis.TOKENS, Measure.LOSS)
    return entries + draw_marks(axes, history, Axis.TOKENS)


def _second_half(axes: Any, history: History) -> list[tuple[Any, str]]:
    """The losses again, with scales for the second half of the run."""
    _losses(axes, history)
    x, y = history.x(Axis.TOKENS), history.training(Measure.LOSS)
    late = x >= x[-1] / 2
    steps, validation = history.validation(Measure.LOSS)
    values = np.concatenate([y[late], validation[history.positions(steps, Axis.TOKENS) >= x[-1] / 2]])
    values = values[np.isfinite(values)]
    axes.set_xlim(x[-1] / 2, x[-1])
    if values.size:
        low, high = np.quantile(values, [0.002, 0.998])
        margin = max(0.05 * (high - low), 1e-4)
        axes.set_ylim(low - margin, high + margin)
    return []


def _lines(
    axes: Any, history: History, parts: list[tuple[str, str, float]], log: bool = False
) -> list[tuple[Any, str]]:
    """Lines of numbers of the steps: (name of the number, name in the legend, factor)."""
    x, entries, positive = history.x(Axis.TOKENS), [], False
    for number, (name, word, factor) in enumerate(parts):
        y = history.column(name) * factor
        positive |= bool((y[np.isfinite(y)] > 0).any())
        line = draw_line(axes, x, y, color=("tab:blue", "tab:orange")[number], linewidth=1.0)
        entries += [(line, word)] if word else []
    if log and positive:
        make_logarithmic(axes)
    elif not log:
        axes.set_ylim(bottom=0)
    return entries


def _chart(
    number: int, title: str, draw: Callable[[Any], list[tuple[Any, str]]], fonts: Fonts, history: History
) -> Html:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    entries = draw(axes)
    format_x(axes, Axis.TOKENS)
    if axes.get_yscale() == "linear" and axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(axes, entries, fonts, frameon=False)
    picture = encoded(figure, ".svg", fonts).decode()
    return Html(f"<figure><figcaption>{html(title)}</figcaption>{_inline(picture, f'c{number}', title)}</figure>")


def _inline(picture: str, prefix: str, title: str) -> str:
    """An SVG for use within a page: ids of its own, and the page's colour in place of `_INK`."""
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<metadata>.*?</metadata>", "", picture, flags=re.DOTALL)
    picture = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", picture)
    picture = picture.replace(_INK, "currentColor")
    return picture.replace("<svg ", f'<svg role="img" aria-label="{html(title)}" ', 1)
