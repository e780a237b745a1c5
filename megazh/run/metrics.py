"""Metrics of a run: a line per step on the terminal, metrics.jsonl, TensorBoard, and trackers."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megazh.errors import UsageError
from megazh.files import fsync
from megazh.run.board import Board
from megazh.run.lines import one_line, sample_line, step_line, validation_lines
from megazh.run.records import (
    CorpusValidation,
    EventRecord,
    Record,
    SampleRecord,
    StepRecord,
    ValidationRecord,
    line_of,
    perplexity,
    read_records,
)
from megazh.run.redraw import Redrawing
from megazh.run.rewind import drop_after, records_of_step
from megazh.run.scalars import scalars_of
from megazh.run.trackers.start import Trackers
from megazh.run.trackers.tracker import TrackedRun, TrackerName
from megazh.writing import write_all, writing

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_TAG_LENGTH = 40


VALIDATION = "validation"
"""Name of the validation of a step in `Metrics.evaluated_at`."""


def sample_of(prompt: str) -> str:
    """Name of the continuation of a prompt in `Metrics.evaluated_at`."""
    return f"sample {_valid_text(prompt)}"


class Metrics:
    """Records a run on the terminal, in `folder/metrics.jsonl` and in `folder/tensorboard`.

    On resume, records after `first_step` are dropped: they belong to steps that the interruption lost. Records of
    `first_step` itself stay, and events of all steps. A new run keeps the events of attempts that saved nothing. Lines
    behind `first_step` that cannot be read are removed with a warning; ones before it are left to `read_metrics`.

    Args:
        folder: the run folder.
        first_step: optimizer steps in the checkpoint that the run resumes from; 0 for a new run.
        quiet: write nothing at all (every rank but one).

    Raises:
        DataError: metrics.jsonl is of a newer version.
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
                drop_after(path, first_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._path, self._redrawing = path, Redrawing(folder)
        self._board = Board(folder / TENSORBOARD, first_step + 1 if first_step else 0)
        self._trackers: Trackers | None = None

    def track(self, names: Sequence[TrackerName], run: TrackedRun) -> None:
        """Let trackers follow the records, those of earlier attempts included where they do not have them yet."""
        if not self._quiet and names:
            self._trackers = Trackers(names, self._path, run, _print)

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
        # First: a resume hides points of later steps than its own, and would miss one that a kill kept from the board.
        self._add_scalars(record)
        self._append(record)
        _print(step_line(record))

    def validation(
        self,
        step: int,
        tokens: int,
        loss: float,
        bits_per_byte: float | None,
        samples: int,
        corpora: Mapping[str, CorpusValidation] | None = None,
    ) -> None:
        """Record a validation; see `ValidationRecord`."""
        if self._quiet:
            return
        record = ValidationRecord(
            step, tokens, loss, bits_per_byte, samples, perplexity(loss), None if corpora is None else dict(corpora)
        )
        self._append(record)
        for line in validation_lines(record):
            _print(line)
        self._add_scalars(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a sampled continuation; see `SampleRecord`."""
        if self._quiet:
            return
        prompt, text = _valid_text(prompt), _valid_text(text)
        record = SampleRecord(step, prompt, text)
        self._append(record)
        _print(sample_line(record))
        shown = "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())  # TensorBoard reads Markdown
        self._board.text(f"sample/{one_line(prompt)[:_TAG_LENGTH]}", shown, step)

    def event(self, step: int, name: str, text: str, /, **details: str | int | float | bool | None) -> None:
        """Record that something happened, and print it; see `EventRecord`."""
        self.silent_event(step, name, text, **details)
        if not self._quiet:
            _print(one_line(_valid_text(text)))

    def silent_event(self, step: int, name: str, text: str, /, **details: str | int | float | bool | None) -> None:
        """Record that something happened, which another line on the terminal says."""
        if not self._quiet:
            self._append(EventRecord(step, name, _valid_text(text), details))

    def evaluated_at(self, step: int) -> set[str]:
        """What is recorded at the last step besides the step itself: `VALIDATION`, and `sample_of` each prompt."""
        if self._quiet:
            return set()
        return {
            VALIDATION if record["kind"] == "validation" else sample_of(record["prompt"])
            for record in records_of_step(self._path, step)
            if record["kind"] in ("validation", "sample")
        }

    def flush(self) -> None:
        """Make what is recorded survive a power cut; may be called in a thread. Raises WriteError."""
        if not self._quiet:
            with writing(self._path):
                fsync(self._path)

    def go_back(self, step: int) -> None:
        """Drop the records after `step`, as a resume from there does, and go on from it.

        Raises:
            WriteError: metrics.jsonl cannot be written.
        """
        self._last_step = step
        if self._quiet:
            return
        self._file.close()
        with writing(self._path):
            drop_after(self._path, step)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._board.close()
        self._board = Board(self._path.parent / TENSORBOARD, step + 1)

    def draw(self) -> None:
        """Draw `loss.png` in the background, at most once a minute; less often where that takes long."""
        if not self._quiet:
            self._redrawing.draw()

    def close(self) -> None:
        """Close the files; nothing can be recorded afterwards."""
        if not self._quiet:
            self._redrawing.close()
            self._file.close()
            self._board.close()
            if self._trackers is not None:
                self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: Record) -> None:
        line = line_of(dataclasses.replace(record, time=round(time.time(), 3)))
        before = self._file.tell()
        with writing(self._path, len(line)):
            try:
                write_all(self._file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise
        if self._trackers is not None:
            self._trackers.poll()

    def _add_scalars(self, record: StepRecord | ValidationRecord) -> None:
        for tag, value in scalars_of(dataclasses.asdict(record)).items():
            self._board.scalar(tag, value, record.step)


def read_metrics(folder: Path, on_bytes: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
    """Read the records of the run in `folder`, oldest first.

    A record holds the fields of `StepRecord`, `ValidationRecord`, `SampleRecord` or `EventRecord` and, under "kind",
    "step", "validation", "sample" or "event". An incomplete last line (a crash, or a run that is just writing it) is
    left out.

    Args:
        folder: the run folder.
        on_bytes: called after each record with the size of its line.

    Raises:
        UsageError: the folder holds no metrics.jsonl.
        DataError: a line is none of these records.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the folder of a run that has taken a step")
    records = []
    for line, record in read_records(path):
        records.append(record)
        if on_bytes is not None:
            on_bytes(len(line) + 1)
    return records


def _valid_text(text: str) -> str:
    """Text without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _print(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without Chinese gets question marks, not a crash
    sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()
