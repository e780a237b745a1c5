"""What a run tells about itself: a line a step on the terminal, metrics.jsonl, and TensorBoard."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from megazh.errors import DataError, UsageError
from megazh.files import write_atomic
from megazh.progress import duration

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_GIB = 1 << 30
_TAG_LENGTH = 40
_UNITS = ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Numbers need not be finite."""

    step: int
    """Counts from 1: the optimizer steps done, this one included."""
    steps: int
    """Length of the run."""
    tokens: int
    """Consumed by the run so far."""
    loss: float
    """Mean over the tokens of this step, in nats a token."""
    learning_rate: float
    grad_norm: float
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    """Per rank, where the ranks run on a CPU."""
    mfu: float | None
    """Model FLOPs utilization, 1 is the peak of the cards; None where that is not known."""
    memory_bytes: int | None
    """Largest allocation so far on the fullest GPU; None on a CPU."""
    memory_reserved: int | None
    """The same for what the allocator holds."""
    data_seconds: float
    """What of `step_seconds` went by waiting for samples."""
    skipped: bool
    """The optimizer left the weights alone, for a gradient was not finite."""
    eta_seconds: float
    loss_scale: float | None = None
    """Only with fp16."""


@dataclass(frozen=True)
class ValidationRecord:
    """One pass over the validation side."""

    step: int
    """Optimizer steps done before it; 0 is the untrained model."""
    tokens: int
    """Consumed by the training so far."""
    loss: float
    bits_per_byte: float | None
    samples: int
    """How many were evaluated."""


@dataclass(frozen=True)
class SampleRecord:
    """Text that the model wrote after a prompt."""

    step: int
    prompt: str
    text: str
    """Without the prompt."""


_KINDS: dict[str, TypeAdapter[Any]] = {
    "step": TypeAdapter(StepRecord),
    "validation": TypeAdapter(ValidationRecord),
    "sample": TypeAdapter(SampleRecord),
}


class Metrics:
    """Records a run: console, `folder/metrics.jsonl` and `folder/tensorboard`.

    On a resume, what lies there beyond step `first_step` is of a life that was lost, and goes; what belongs to
    `first_step` itself stays.

    Args:
        folder: the run's.
        first_step: the optimizer steps that the checkpoint holds; 0 for a new run, which begins with nothing.
        quiet: write nothing, neither to the terminal nor to files (all ranks but one).

    Raises:
        DataError: the metrics.jsonl that is there is damaged.
    """

    def __init__(self, folder: Path, first_step: int, quiet: bool) -> None:
        self._last_step = first_step
        self._quiet = quiet
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which readers of metrics need not wait

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if first_step and path.exists():
            _drop_after(path, first_step)
        self._file = open(path, "ab" if first_step else "wb")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step + 1 if first_step else 0)

    def step(self, record: StepRecord) -> None:
        """Record an optimizer step.

        Raises:
            ValueError: a step that is recorded already.
        """
        if record.step <= self._last_step:
            raise ValueError(f"step {record.step} comes after step {self._last_step}")
        self._last_step = record.step
        if self._quiet:
            return
        _say(_step_line(record))
        self._append("step", record)
        scalars = {
            "train/loss": record.loss,
            "train/lr": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/loss_scale": record.loss_scale,
            "train/skipped": float(record.skipped),
            "train/tokens": record.tokens,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/tokens_per_second_per_gpu": record.tokens_per_second_per_gpu,
            "speed/mfu": record.mfu,
            "speed/step_seconds": record.step_seconds,
            "speed/data_seconds": record.data_seconds,
            "memory/allocated_gib": None if record.memory_bytes is None else record.memory_bytes / _GIB,
            "memory/reserved_gib": None if record.memory_reserved is None else record.memory_reserved / _GIB,
        }
        self._add_scalars(scalars, record.step)

    def validation(self, step: int, tokens: int, loss: float, bits_per_byte: float | None, samples: int) -> None:
        """Record a validation; see `ValidationRecord`."""
        if self._quiet:
            return
        record = ValidationRecord(step, tokens, loss, bits_per_byte, samples)
        bits = "" if bits_per_byte is None else f" | {bits_per_byte:.4f} bits/byte"
        _say(f"validation after step {step} | {_compact(tokens)} tok | loss {loss:.4f}{bits} | {samples:,} samples")
        self._append("validation", record)
        self._add_scalars({"validation/loss": loss, "validation/bits_per_byte": bits_per_byte}, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record what the model wrote after a prompt; see `SampleRecord`."""
        if self._quiet:
            return
        prompt, text = (each.encode("utf-8", "replace").decode() for each in (prompt, text))  # no lone surrogates
        _say(f"sample after step {step} | {_one_line(prompt)} → {_one_line(text)}")
        self._append("sample", SampleRecord(step, prompt, text))
        shown = "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())  # TensorBoard reads Markdown
        self._board.add_text(f"sample/{_one_line(prompt)[:_TAG_LENGTH]}", shown, step)
        self._board.flush()

    def close(self) -> None:
        """Finish the files; nothing can be recorded after."""
        if not self._quiet:
            self._file.close()
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, record: StepRecord | ValidationRecord | SampleRecord) -> None:
        values = {"kind": kind, **{name: _json_value(value) for name, value in dataclasses.asdict(record).items()}}
        self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _add_scalars(self, scalars: dict[str, float | None], step: int) -> None:
        for tag, value in scalars.items():
            if value is not None:
                self._board.add_scalar(tag, value, step)
        self._board.flush()  # else a process that is killed loses the points still in the queue


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of the run in `folder`, oldest first.

    Each is the fields of `StepRecord`, `ValidationRecord` or `SampleRecord`, and under "kind" which of these: "step",
    "validation" or "sample". A last line that is torn, by a crash or since it is being written, is left out.

    Raises:
        UsageError: there is no run in the folder.
        DataError: a line is no such record.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the folder of a run that has taken a step")
    return [record for _, record in _read(path)]


def _drop_after(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl without what comes after `step`, and without a torn last line."""
    kept = b"".join(line + b"\n" for line, record in _read(path) if record["step"] <= step)
    if kept != path.read_bytes():
        write_atomic(path, kept)


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of a metrics.jsonl, with the record that it holds."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            kind = values.pop("kind")
            record = _KINDS[kind].validate_python(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):  # torn, or what split leaves after the last line
                return
            raise DataError(
                f"{path}: line {number:,} is no record of a step, a validation or a sample; repair it, or move the "
                "file away to go on without the history"
            ) from None
        yield line, {"kind": kind, **dataclasses.asdict(record)}


def _json_value(value: object) -> object:
    """JSON knows no nan and inf: they become text, which `float` and pydantic read back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step_line(record: StepRecord) -> str:
    unit = "rank" if record.memory_bytes is None else "GPU"
    each = f"({_compact(record.tokens_per_second_per_gpu)}/{unit})"
    parts = [
        f"step {record.step:>{len(str(record.steps))}}/{record.steps}",
        f"{_compact(record.tokens):>5} tok",
        f"loss {record.loss:<7.4f}",
        f"lr {record.learning_rate:.2e}",
        f"norm {record.grad_norm:<5.2f}",
        f"{_compact(record.tokens_per_second):>5} tok/s {each:<12}",
    ]
    if record.loss_scale is not None:
        parts.append(f"scale {record.loss_scale:<5.0f}")
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:>5.1%}")
    if record.memory_bytes is not None:
        parts.append(f"{record.memory_bytes / _GIB:>4.1f} GiB")
    parts.append(f"ETA {duration(record.eta_seconds) if math.isfinite(record.eta_seconds) else '?'}")
    if record.skipped:
        parts.append("skipped: not finite")
    return " | ".join(parts)


def _compact(number: float) -> str:
    """A number in about three digits: 950, 11.2k, 1.97M, 30.0B."""
    if not math.isfinite(number) or (abs(number) < 1000 and number == int(number)):
        return f"{number:.0f}"
    scale, unit = next((pair for pair in _UNITS if abs(number) < 999.5 * pair[0]), _UNITS[-1])
    number /= scale
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def _one_line(text: str) -> str:
    """Text as a terminal can show it in a line: no line breaks, no control characters."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without Chinese gets question marks, not a crash
    sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()
