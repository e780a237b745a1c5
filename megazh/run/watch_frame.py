"""One picture of a watched run, as lines for a terminal of some size."""

import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megazh.run.lines import compact, left, one_line
from megazh.run.screen import (
    BLUE,
    BOLD,
    DIM,
    GREEN,
    PLAIN,
    RED,
    YELLOW,
    Line,
    Span,
    beside,
    clip,
    render,
    width_of,
    wrapped,
)
from megazh.run.text_plot import text_plot
from megazh.run.watched import Watched

_GIB = 1 << 30
_LAST_STEPS = 200
_ABOVE = 0.04
"""Share of a long curve, its steep begin, that may lie above the plot."""
_TWO_PLOTS = 90  # columns from which two plots stand side by side
_LABEL = 9  # columns of the numbers at a plot
_LEAST_PLOT, _MOST_PLOT = 4, 20
_MOST_SAMPLES, _SAMPLE_LINES, _MOST_EVENTS = 3, 2, 5
_REASON_LINES = 3
_CALM = frozenset({"start", "resume", "resume_training", "command", "set", "stop", "relayout"})


@dataclass(frozen=True)
class Look:
    """What a terminal can show."""

    width: int
    height: int
    colours: bool
    unicode: bool
    """Whether it has Braille and blocks; else stars and hashes take their places."""


def frame(run: Watched, look: Look, now: float, keys: str = "") -> list[str]:
    """The lines of a picture, at most `look.height` of them, each at most `look.width` columns wide.

    Args:
        run: the run.
        look: what the terminal can show.
        now: seconds since 1970-01-01 UTC.
        keys: what the keys do, for the last line.
    """
    head = [*_title(run, look, now), *_progress(run, look), *_numbers(run)]
    foot = [_foot(run, now, keys)]
    room = look.height - len(head) - len(foot)
    samples, events = list(_samples(run, look)), list(_events(run))
    # A plot needs some lines to say anything; events, and then samples, give way to it.
    for below in ([*samples, *events], samples, []):
        if not run.losses or room - len(below) > _LEAST_PLOT:
            break
    plots = list(_plots(run, look, min(_MOST_PLOT, room - len(below) - 1))) if run.losses else []
    lines: list[Line] = [*head, *plots, *below]
    return [render(line, look.width, look.colours) for line in [*lines[: look.height - len(foot)], *foot]]


def _title(run: Watched, look: Look, now: float) -> Iterator[Line]:
    """Name and state of the run, and below them the reason of its end."""
    standing = run.standing(now)
    colour = GREEN if standing.calm else RED if standing.ended else YELLOW
    name = clip(one_line(run.folder.resolve().name), max(8, look.width // 2))
    yield [Span(name, BOLD), Span("  "), Span(standing.text, colour)]
    for line in wrapped(standing.reason, look.width - 2, _REASON_LINES):
        yield [Span("  "), Span(line)]


def _progress(run: Watched, look: Look) -> Iterator[Line]:
    """How far the run is, as a bar."""
    step = run.last_step
    if step is None:
        yield [Span("no step yet", DIM)]
        return
    done, total = step["step"], max(1, step["steps"])
    share = min(1.0, done / total)
    figures = f" {share:.1%}  step {done:,.0f} of {total:,.0f}  {compact(step['tokens'])} tokens"
    if done < total and run.running:
        figures += f"  ETA {left(step['eta_seconds'])}"
    size = max(5, min(40, look.width - width_of(figures)))
    full, rest = ("█", "░") if look.unicode else ("#", "-")
    filled = int(size * share)
    yield [Span(full * filled, BLUE), Span(rest * (size - filled), DIM), Span(figures)]


def _numbers(run: Watched) -> Iterator[Line]:
    """The numbers of the last step and of the last validation."""
    if (step := run.last_step) is not None:
        parts = [("loss", f"{step['loss']:.4f}"), ("lr", f"{step['learning_rate']:.3g}")]
        parts += [("norm", f"{step['grad_norm']:.3g}"), ("", f"{compact(step['tokens_per_second'])} tok/s")]
        if step["mfu"] is not None:
            parts.append(("MFU", f"{step['mfu']:.0%}"))
        if step["memory_bytes"] is not None:
            parts.append(("memory", f"{step['memory_bytes'] / _GIB:.1f} GiB"))
        if run.skipped:
            parts.append(("skipped", f"{run.skipped:,}"))
        yield _pairs(parts)
    if run.validations:
        last = run.validations[-1]
        parts = [("validation", f"{last['loss']:.4f}")]
        if last["bits_per_byte"] is not None:
            parts.append(("", f"{last['bits_per_byte']:.4f} bits/byte"))
        parts.append(("after step", f"{last['step']:,}"))
        if len(run.validations) > 1:
            before = run.validations[0]
            parts.append(("before that", f"{before['loss']:.4f} after step {before['step']:,}"))
        yield _pairs(parts)
        if len(last["corpora"]) > 1:
            yield [
                Span("by corpus ", DIM),
                *_pairs([(one_line(name), f"{loss:.4f}") for name, loss in last["corpora"].items()]),
            ]


def _pairs(parts: Sequence[tuple[str, str]]) -> Line:
    spans: list[Span] = []
    for name, value in parts:
        spans += [Span("  ")] if spans else []
        spans += [Span(f"{name} ", DIM)] if name else []
        spans.append(Span(value, BOLD if not spans else PLAIN))
    return spans


def _plots(run: Watched, look: Look, height: int) -> Iterator[Line]:
    """The losses of the whole run, and beside them those of its last steps, each with a title."""
    if height < _LEAST_PLOT - 1:
        return
    last = run.losses[-_LAST_STEPS:]
    whole = f"loss of all {len(run.losses):,} recorded steps"
    if look.width < _TWO_PLOTS or len(run.losses) <= _LAST_STEPS:
        yield from _plot(run.losses, whole, look, look.width, height)
        return
    width = (look.width - 2) // 2
    yield from beside(
        _plot(run.losses, whole, look, width, height),
        _plot(last, f"the last {len(last):,}", look, width, height),
        width,
    )


def _plot(losses: Sequence[float], title: str, look: Look, width: int, height: int) -> Iterator[Line]:
    yield [Span(" " * _LABEL), Span(clip(title, width - _LABEL), DIM)]
    if not any(map(math.isfinite, losses)):
        yield [Span(" " * _LABEL), Span("no loss is finite", RED)]
        yield from [[]] * (height - 1)
        return
    above = _ABOVE if len(losses) > _LAST_STEPS else 0.0
    rows, low, high = text_plot(losses, max(1, width - _LABEL), height, look.unicode, above)
    for number, row in enumerate(rows):
        middle = number == (height - 1) // 2 and height > 4
        value = high if number == 0 else low if number == height - 1 else (low + high) / 2 if middle else None
        label = "" if value is None else f"{value:.4g}"
        yield [Span(f"{label:>{_LABEL - 1}} ", DIM), Span(row, BLUE)]


def _samples(run: Watched, look: Look) -> Iterator[Line]:
    """The newest sample of the prompts that were sampled last."""
    newest = list(run.samples.values())[-_MOST_SAMPLES:]
    if newest:
        yield [Span("samples", DIM)]
    for sample in newest:
        step = f"step {sample['step']:,}: "
        prompt = clip(" ".join(wrapped(sample["prompt"], look.width, 1)), max(4, look.width // 3))
        lines = wrapped(f"{step}{prompt} → {sample['text']}", look.width - 2, _SAMPLE_LINES)
        for number, line in enumerate(lines):
            known = len(step) if number == 0 else 0
            bold = known + len(prompt) if line[known:].startswith(prompt) and known else known
            yield [Span("  "), Span(line[:known], DIM), Span(line[known:bold], BOLD), Span(line[bold:])]


def _events(run: Watched) -> Iterator[Line]:
    """The last events, the newest one last; like ones in a row are one line."""
    shown = [list(like) for _, like in itertools.groupby(run.events, _likeness)][-_MOST_EVENTS:]
    if shown:
        yield [Span("events", DIM)]
    for like in shown:
        first, last = like[0]["step"], like[-1]["step"]
        event, text = like[-1], _text_of(like[-1])
        moment = time.strftime("%H:%M:%S", time.localtime(event["time"])) if event["time"] is not None else ""
        if len(like) > 1:
            times = f"{len(like)} x, steps {first:,} to {last:,}: " if first != last else f"{len(like)} x, "
        else:
            times = ""
        if first == last and not re.search(rf"\bstep ({last}|{last:,})\b", text):
            times += f"step {last:,}: "
        colour = PLAIN if event["name"] in _CALM else YELLOW
        yield [Span(f"  {moment} {times}", DIM), Span(text, colour)]


def _text_of(event: dict[str, Any]) -> str:
    """The text of an event on one line, without the step that it may begin with: a line of events names it anyway."""
    return one_line(event["text"]).removeprefix(f"step {event['step']}: ")


def _likeness(event: dict[str, Any]) -> tuple[str, str]:
    """What events that are one line have in common: the text, and of skipped steps only its words."""
    text = _text_of(event)
    return event["name"], re.sub(r"\S*\d\S*", "0", text) if event["name"] == "skip" else text


def _foot(run: Watched, now: float, keys: str) -> Line:
    parts = [keys] if keys else []
    parts.append(time.strftime("%H:%M:%S", time.localtime(now)))
    if run.unreadable:
        parts.append(f"{run.unreadable:,} lines of metrics.jsonl are damaged")
    return [Span("  ".join(parts), DIM)]
