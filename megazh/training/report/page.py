"""The report of a run as one HTML file that needs no other, and no network."""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megazh.errors import UsageError
from megazh.files import write_atomic
from megazh.run.lines import compact
from megazh.run.records import perplexity
from megazh.training.checkpoint_list import CheckpointManifest
from megazh.training.report.about import (
    attempts_parts,
    checkpoints_parts,
    data_parts,
    ended,
    hardware_parts,
    recipe_parts,
)
from megazh.training.report.charts import charts
from megazh.training.report.gather import Gathered, all_events, gather, median, training_hours
from megazh.training.report.html import Html, element, html, table, time_text
from megazh.training.report.style import STYLE

_GIB = 1 << 30
_MOST_EVENTS = 300
_MOST_SAMPLES = 8
"""Samples of a prompt: the first, the last, and some between them."""


def write_report(folder: Path, output: Path) -> list[str]:
    """Write the report of the run in `folder` to the .html file `output`.

    All text of the run is escaped, and the page may run no script.

    Returns:
        What in the folder is missing or damaged, as the report says it, too.

    Raises:
        UsageError: the folder holds nothing of a run, or `output` is not named .html.
        WriteError: the report cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{output}: a report is a page; name it .html")
    found = gather(folder)
    text = "\n".join(_page(found)) + "\n"
    write_atomic(output, text.encode("utf-8", "replace"))
    return found.problems


def _page(found: Gathered) -> Iterator[str]:
    name = found.path.resolve().name
    yield '<!doctype html>\n<html lang="zh">\n<head>\n<meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{html(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html(name)}</h1>"
    now = datetime.datetime.now(datetime.UTC)
    yield element("p", f"{_state(found)} Report of {time_text(now.timestamp())}.", class_="state")
    for problem in found.problems:
        yield element("p", problem, class_="problem")
    sections = {
        "": _tiles(found),
        "Curves": _curves(found),
        "Validation by corpus": _corpora(found),
        "Samples": _samples(found),
        "Events": _events(found),
        "Data": data_parts(found),
        "Model and hardware": hardware_parts(found),
        "Checkpoints": checkpoints_parts(found),
        "Attempts": attempts_parts(found),
        "Recipe": recipe_parts(found),
    }
    for title, parts in sections.items():
        content = "\n".join(parts)
        if content:
            head = element("h2", title) if title else ""
            yield f"<section>\n{head}\n{content}\n</section>"
    yield "</body>\n</html>"


def _state(found: Gathered) -> str:
    """How far the run is, and how its last attempt ended."""
    steps, total = found.history.steps, _total_steps(found)
    if not steps:
        return "No step is recorded."
    done = steps[-1]["step"]
    whole = f" of {total:,}" if total else ""
    complete = any(isinstance(each, CheckpointManifest) and each.complete for each in found.checkpoints.values())
    if complete and done == total:
        return f"Complete: {done:,} steps."
    attempts = found.info.attempts if found.info else []
    end = ended(attempts[-1]) if attempts else ""
    last = f"; the last record is of {time_text(steps[-1]['time'])}" if steps[-1]["time"] else ""
    return f"Step {done:,}{whole}{last}.{' Ended: ' + end + '.' if end else ''}"


def _total_steps(found: Gathered) -> int:
    if found.history.steps:
        return found.history.steps[-1]["steps"]
    return found.recipe.course.steps if found.recipe else 0


def _tiles(found: Gathered) -> Iterator[Html]:
    """The numbers that matter most."""
    history, steps = found.history, found.history.steps
    if not steps:
        return
    tiles = [("tokens", compact(steps[-1]["tokens"])), ("steps", f"{steps[-1]['step']:,}")]
    tiles += [("hours of steps", f"{training_hours(history):,.2f}")]
    if found.recipe:
        operations = found.recipe.flops_per_token.total * steps[-1]["tokens"]
        tiles.append(("TFLOP", f"{operations / 1e12:,.4g}" if operations < 1e16 else f"{operations / 1e12:,.0f}"))
    tiles.append(("training loss", f"{steps[-1]['loss']:.4f}"))
    if history.validations:
        last = history.validations[-1]
        tiles += [("validation loss", f"{last['loss']:.4f}"), ("perplexity", f"{perplexity(last['loss']):.4g}")]
        if last["bits_per_byte"] is not None:
            tiles.append(("bits per byte", f"{last['bits_per_byte']:.4f}"))
    if rate := median(history, "tokens_per_second"):
        tiles.append(("tokens per second", compact(rate)))
    if (share := median(history, "mfu")) is not None:
        tiles.append(("MFU", f"{share:.1%}"))
    if (memory := steps[-1]["memory_bytes"]) is not None:
        tiles.append(("GiB of GPU memory", f"{memory / _GIB:.1f}"))
    tiles.append(("skipped steps", f"{sum(record['skipped'] for record in steps):,}"))
    boxes = (element("div", element("b", value), element("span", name)) for name, value in tiles)
    yield element("div", *boxes, class_="tiles")


def _curves(found: Gathered) -> Iterator[str]:
    drawn = list(charts(found.history))
    if drawn:
        yield element("div", *drawn, class_="charts")


def _corpora(found: Gathered) -> Iterator[Html]:
    """The last validation of each corpus, where there are several and it is recorded."""
    last = next((record for record in reversed(found.history.validations) if len(record["corpora"] or ()) > 1), None)
    if last is None:
        return
    rows = [
        (
            name,
            f"{each['loss']:.4f}",
            f"{each['perplexity']:.4g}",
            f"{each['bits_per_byte']:.4f}",
            f"{each['samples']:,}",
        )
        for name, each in last["corpora"].items()
    ]
    yield element("p", f"After step {last['step']:,}.")
    yield table(["corpus", "loss", "perplexity", "bits per byte", "samples"], rows, " nnnn")


def _samples(found: Gathered) -> Iterator[Html]:
    """Continuations of each prompt over time, the newest first."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in found.history.samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    for prompt, samples in by_prompt.items():
        shown = _spread(samples)
        left_out = f" ({len(shown)} of {len(samples):,} samples)" if len(shown) < len(samples) else ""
        rows = [(f"{each['step']:,}", element("p", each["text"], class_="sample")) for each in reversed(shown)]
        yield element("h3", prompt, element("small", left_out))
        yield table(["step", "continuation"], rows, "n")


def _spread(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the last, and samples at equal distances between them."""
    count = min(len(samples), _MOST_SAMPLES)
    last = len(samples) - 1
    return [samples[round(number * last / max(1, count - 1))] for number in range(count)] if count > 1 else samples


def _events(found: Gathered) -> Iterator[Html]:
    events = all_events(found.history)
    if not events:
        if found.history.steps:
            yield element("p", "None is recorded: no step was skipped. (Older versions recorded no other events.)")
        return
    shown = events[-_MOST_EVENTS:]
    if len(shown) < len(events):
        yield element("p", f"The last {len(shown):,} of {len(events):,}.")
    rows = [
        (f"{each['step']:,}", time_text(each["time"]), each["name"].replace("_", " "), each["text"]) for each in shown
    ]
    yield table(["step", "time", "what", ""], rows, "n")
