"""The lines that a run writes to the terminal: a step on at most 80 columns, a validation, a sample."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

if TYPE_CHECKING:
    from megazh.run.records import SampleRecord, StepRecord, ValidationRecord

COLUMNS = 80
"""Width of a terminal that was never widened."""

_GIB = 1 << 30
_UNITS = ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
_SEPARATORS = (" | ", "  ", " ")
_LEFT_OUT_FIRST = ("lr", "memory", "mfu", "rate", "eta")
"""Parts that a line goes without where all do not fit, in this order; `metrics.jsonl` has them all."""
_LEFT_OUT_OF_SKIPPED = ("eta", "memory", "mfu", "rate", "lr")
"""The same of a skipped step: the last ones first, so that the others stay in their columns."""


def step_line(record: "StepRecord") -> str:
    """A step on at most 80 columns, for steps of up to seven digits.

    Columns of a run are aligned, and a skipped step has the same separators and first columns as others. `18.2G` are
    GiB of GPU memory.
    """
    parts = {
        "step": f"step {record.step:>{len(str(record.steps))}}/{record.steps}",
        "loss": f"loss {_digits(record.loss, 6)}",
        "lr": f"lr {_power(record.learning_rate)}",
        "norm": f"norm {_digits(record.grad_norm, 4)}",
        "rate": f"{compact(record.tokens_per_second):>5} tok/s",
    }
    if record.mfu is not None:
        parts["mfu"] = f"MFU {record.mfu:>3.0%}"
    if record.memory_bytes is not None:
        parts["memory"] = f"{record.memory_bytes / _GIB:>4.1f}G"
    parts["eta"] = f"ETA {left(record.eta_seconds)}"
    line, separator = _fitted(parts, _LEFT_OUT_FIRST, _SEPARATORS)
    if record.skipped:
        finite = math.isfinite(record.loss) and math.isfinite(record.grad_norm)
        parts["skipped"] = "skipped: spike" if finite else "skipped: not finite"
        line, _ = _fitted(parts, _LEFT_OUT_OF_SKIPPED, [separator])
    return line


def _fitted(parts: dict[str, str], left_out: Sequence[str], separators: Sequence[str]) -> tuple[str, str]:
    """A line of the parts that fit, and its separator; those of these names, in this order, are removed if need be."""
    for name in ("", *left_out):
        parts.pop(name, None)
        for separator in separators:
            if len(line := separator.join(parts.values())) <= COLUMNS:
                return line, separator
    return line, separator


def validation_lines(record: "ValidationRecord") -> Iterator[str]:
    """A pass over the validation side, and a line for each corpus where there are several."""
    figures = _figures(record.loss, record.perplexity, record.bits_per_byte)
    yield f"validation after step {record.step} | {figures}"
    corpora = record.corpora or {}
    if len(corpora) > 1:
        names = {name: one_line(name) for name in corpora}
        width = max(map(_columns, names.values()))
        for name, each in corpora.items():
            figures = _figures(each.loss, each.perplexity, each.bits_per_byte)
            yield f"  {names[name]}{' ' * (width - _columns(names[name]))} | {figures} | {each.samples:,} samples"


def _figures(loss: float, perplexity: float | None, bits_per_byte: float | None) -> str:
    parts = [f"loss {loss:.4f}"]
    if perplexity is not None:
        parts.append(f"perplexity {compact(perplexity)}")
    if bits_per_byte is not None:
        parts.append(f"{bits_per_byte:.4f} bits/byte")
    return " | ".join(parts)


def sample_line(record: "SampleRecord") -> str:
    """A sampled continuation, as long as it is."""
    return f"sample after step {record.step} | {one_line(record.prompt)} → {one_line(record.text)}"


def compact(number: float) -> str:
    """Format a number with about three digits: 950, 11.2k, 1.97M, 30.0B."""
    if not math.isfinite(number) or (abs(number) < 1000 and number == int(number)):
        return f"{number:.0f}"
    scale, unit = next((pair for pair in _UNITS if abs(number) < 999.5 * pair[0]), _UNITS[-1])
    number /= scale
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def one_line(text: str) -> str:
    """Put text on one line of a terminal: no line breaks, no control characters."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _columns(text: str) -> int:
    """Columns of a terminal that text takes: two for each wide character, such as a Chinese one."""
    return sum(2 if east_asian_width(each) in "WF" else 1 for each in text)


def _digits(number: float, width: int) -> str:
    """A number in `width` characters, with as many digits after the point as there is room for."""
    for digits in range(width - 2, -1, -1):
        if len(text := f"{number:.{digits}f}") <= width:
            return text.ljust(width)
    return f"{number:.0e}"


def _power(number: float) -> str:
    """4.87e-4"""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def left(seconds: float) -> str:
    """The two largest units of a duration: 45s, 12m05s, 12h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86_400}d{whole // 3600 % 24:02d}h"
