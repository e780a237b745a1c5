"""Metrics of a run: a line per step on the terminal, metrics.jsonl, and TensorBoard."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from megazh.errors import DataError, UsageError
from megazh.files import write_atomic
from megazh.run.board import Board
from megazh.run.lines import one_line, sample_line, step_line, validation_line
from megazh.run.redraw import Redrawing
from megazh.writing import write_all, writing

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_GIB = 1 << 30
_TAG_LENGTH = 40


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Numbers need not be finite."""

    step: int
    """Number of the optimizer step, from 1."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens that the run has consumed so far."""
    loss: float
    """Mean cross entropy over the trained tokens of this step, in nats per token, as in `ValidationRecord`. Files of
    versions that did not record `z_loss` hold the sum of both."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm of the gradients before clipping; nan where the engine gives none."""
    step_seconds: float
    """Seconds that this step took."""
    tokens_per_second: float
    """Tokens per second of all ranks together."""
    tokens_per_second_per_gpu: float
    """Tokens per second and GPU; per rank on the CPU."""
    mfu: float | None
    """Model FLOPs utilization, 1 at the cards' peak; None where the peak is not known."""
    memory_bytes: int | None
    """Largest number of bytes allocated so far on any GPU; None on the CPU."""
    memory_reserved: int | None
    """Largest number of bytes that torch's allocator has held on any GPU; None on the CPU."""
    data_seconds: float
    """Part of `step_seconds` spent waiting for samples, on the slowest rank."""
    skipped: bool
    """Whether the optimizer skipped the step because a gradient was not finite."""
    eta_seconds: float
    """Estimated seconds until the last step."""
    skipped_so_far: int | None = None
    """Steps of the run that were skipped so far; None in files of versions that did not count them."""
    z_loss: float | None = None
    """Mean z-loss that training adds to `loss`, in nats per token; None without `optimizer.z_loss`."""
    time: float | None = None
    """When it was recorded, in seconds since 1970-01-01 UTC; None in files of versions that did not record it."""


@dataclass(frozen=True)
class ValidationRecord:
    """One pass over the validation side."""

    step: int
    """Optimizer steps done before the pass; 0 for the untrained model."""
    tokens: int
    """Tokens that training has consumed so far."""
    loss: float
    """Mean cross entropy in nats per token."""
    bits_per_byte: float | None
    samples: int
    """Samples evaluated."""
    time: float | None = None
    """See `StepRecord.time`."""


@dataclass(frozen=True)
class SampleRecord:
    """A continuation that the model generated."""

    step: int
    prompt: str
    text: str
    """Continuation, without the prompt; empty where the model's logits were not finite."""
    time: float | None = None
    """See `StepRecord.time`."""


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to the run. Events stay when the steps around them are lost and taken anew."""

    step: int
    """Optimizer steps done before."""
    name: str
    """What happened: start, resume, relayout, ..."""
    text: str
    """The same in a line for people."""
    details: dict[str, str | int | float | bool | None]
    """Figures that belong to it, by name."""
    time: float | None = None
    """See `StepRecord.time`."""


_KINDS: dict[str, TypeAdapter[Any]] = {
    "step": TypeAdapter(StepRecord),
    "validation": TypeAdapter(ValidationRecord),
    "sample": TypeAdapter(SampleRecord),
    "event": TypeAdapter(EventRecord),
}

VALIDATION = "validation"
"""Name of the validation of a step in `Metrics.evaluated_at`."""


def sample_of(prompt: str) -> str:
    """Name of the continuation of a prompt in `Metrics.evaluated_at`."""
    return f"sample {_valid_text(prompt)}"


class Metrics:
    """Records a run on the terminal, in `folder/metrics.jsonl` and in `folder/tensorboard`.

    On resume, records after `first_step` are dropped: they belong to steps that the interruption lost. Records of
    `first_step` itself stay, and events of all steps. A new run keeps the events of attempts that saved nothing.

    Args:
        folder: the run folder.
        first_step: optimizer steps in the checkpoint that the run resumes from; 0 for a new run.
        quiet: write nothing at all (every rank but one).

    Raises:
        DataError: metrics.jsonl is damaged.
        WriteError: metrics.jsonl cannot be written.
    """

    def __init__(self, folder: Path, first_step: int, quiet: bool) -> None:
        self._last_step = first_step
        self._quiet = quiet
        if quiet:
            return
        path = folder / METRICS
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_after(path, first_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._path, self._redrawing = path, Redrawing(folder)
        self._board = Board(folder / TENSORBOARD, first_step + 1 if first_step else 0)

    def step(self, record: StepRecord) -> None:
        """Record an optimizer step.

        Raises:
            ValueError: the step is recorded already.
        """
        if record.step <= self._last_step:
            raise ValueError(f"step {record.step} comes after step {self._last_step}")
        self._last_step = record.step
        if self._quiet:
            return
        self._append("step", record)
        _print(step_line(record))
        scalars = {
            "train/loss": record.loss,
            "train/z_loss": record.z_loss,
            "train/lr": record.learning_rate,
            "train/grad_norm": record.grad_norm,
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
        self._append("validation", record)
        _print(validation_line(record))
        self._add_scalars({"validation/loss": loss, "validation/bits_per_byte": bits_per_byte}, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a sampled continuation; see `SampleRecord`."""
        if self._quiet:
            return
        prompt, text = _valid_text(prompt), _valid_text(text)
        record = SampleRecord(step, prompt, text)
        self._append("sample", record)
        _print(sample_line(record))
        shown = "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())  # TensorBoard reads Markdown
        self._board.text(f"sample/{one_line(prompt)[:_TAG_LENGTH]}", shown, step)

    def event(self, step: int, name: str, text: str, **details: str | int | float | bool | None) -> None:
        """Record that something happened; see `EventRecord`."""
        if self._quiet:
            return
        record = EventRecord(step, name, _valid_text(text), {key: _json_value(each) for key, each in details.items()})
        self._append("event", record)
        _print(one_line(record.text))

    def evaluated_at(self, step: int) -> set[str]:
        """What is recorded at a step besides the step itself: `VALIDATION`, and `sample_of` each prompt."""
        if self._quiet:
            return set()
        records = [record for _, record in _read(self._path) if record["step"] == step]
        return {
            VALIDATION if record["kind"] == "validation" else sample_of(record["prompt"])
            for record in records
            if record["kind"] in ("validation", "sample")
        }

    def draw(self) -> None:
        """Draw `loss.png` in the background, at most once a minute."""
        if not self._quiet:
            self._redrawing.draw()

    def close(self) -> None:
        """Close the files; nothing can be recorded afterwards."""
        if not self._quiet:
            self._redrawing.close()
            self._file.close()
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, record: StepRecord | ValidationRecord | SampleRecord | EventRecord) -> None:
        record = dataclasses.replace(record, time=round(time.time(), 3))
        values = {"kind": kind, **{name: _json_value(value) for name, value in dataclasses.asdict(record).items()}}
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        before = self._file.tell()
        with writing(self._path, len(line)):
            try:
                write_all(self._file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise

    def _add_scalars(self, scalars: dict[str, float | None], step: int) -> None:
        for tag, value in scalars.items():
            if value is not None:
                self._board.scalar(tag, value, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the records of the run in `folder`, oldest first.

    A record holds the fields of `StepRecord`, `ValidationRecord`, `SampleRecord` or `EventRecord` and, under "kind",
    "step", "validation", "sample" or "event". An incomplete last line (a crash, or a run that is just writing it) is
    left out.

    Raises:
        UsageError: the folder holds no metrics.jsonl.
        DataError: a line is none of these records.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the folder of a run that has taken a step")
    return [record for _, record in _read(path)]


def _drop_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl without records after `step`, but for events, and without an incomplete last line."""

    def keeps(record: dict[str, Any]) -> bool:
        return record["kind"] == "event" or 0 < step >= record["step"]

    kept = b"".join(line + b"\n" for line, record in _read(path) if keeps(record))
    if kept != path.read_bytes():
        write_atomic(path, kept)


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of metrics.jsonl with the record that it holds."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            kind = values.pop("kind")
            record = _KINDS[kind].validate_python(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):  # incomplete, or the empty string behind the last newline
                return
            raise DataError(
                f"{path}: line {number:,} is no record of a step, a validation, a sample or an event; repair it, or "
                "move the file away to go on without the history"
            ) from None
        yield line, {"kind": kind, **dataclasses.asdict(record)}


def _json_value(value: Any) -> Any:
    """Write nan and inf, which JSON lacks, as text that `float` and pydantic read back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _valid_text(text: str) -> str:
    """Text without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _print(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without Chinese gets question marks, not a crash
    sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()
