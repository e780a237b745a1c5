"""The records of a run, and their lines in `metrics.jsonl`; docs/metrics.md has the schema."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from megazh.errors import DataError

SCHEMA = 1
"""Version of the schema, which each line carries. It rises when a version of megazh would misread the lines of the next
one; lines without it are of versions before the first. Fields may be added without."""


def perplexity(loss: float) -> float:
    """e to the mean cross entropy in nats per token; inf where no float can hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class CorpusValidation:
    """The part of a validation that one corpus has."""

    loss: float
    """Mean cross entropy in nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Bits per UTF-8 byte of text."""
    samples: int
    """Samples evaluated."""

    @classmethod
    def of(cls, loss: float, bits_per_byte: float, samples: int) -> Self:
        """The figures of a mean loss."""
        return cls(loss, perplexity(loss), bits_per_byte, samples)


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
    """Whether the step changed no weight: loss or gradient were not finite, or a spike (`guard` of the recipe)."""
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
    perplexity: float | None = None
    """e to the loss; None in files of versions that did not record it."""
    corpora: dict[str, CorpusValidation] | None = None
    """The part of each corpus that has samples in the pass, by its name in the manifest; None in files of versions
    that did not record it."""
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
    """What happened: one of `EVENTS`."""
    text: str
    """The same in a line for people."""
    details: dict[str, str | int | float | bool | None]
    """Figures that belong to it, by name."""
    time: float | None = None
    """See `StepRecord.time`."""


Record = StepRecord | ValidationRecord | SampleRecord | EventRecord

KINDS: dict[str, type[Record]] = {
    "step": StepRecord,
    "validation": ValidationRecord,
    "sample": SampleRecord,
    "event": EventRecord,
}
"""The classes of records by the name in their lines."""

EVENTS = {
    "start": "The run begins, or begins again since no checkpoint was saved.",
    "resume": "The run goes on from a checkpoint.",
    "relayout": "A resumed run has other numbers of stages or replicas than its checkpoint was saved by.",
    "skip": "The update of a step is left out, since its loss or gradients are not finite, or a spike.",
    "rollback": "The run goes back to an earlier checkpoint, past the data that led to a spike.",
    "save_failed": "A checkpoint could not be written; the run goes on.",
    "stop": "The run is ended before its last step.",
    "slow_rank": "A rank has computed more slowly than the others for long.",
    "slow_rank_over": "A rank that was named as slow is as fast as the others again.",
    "pause": "Training waits until it is told to go on.",
    "resume_training": "Training goes on after a pause.",
    "set": "A setting is changed while the run goes on.",
    "command": "Another command of `megazh ctl` is carried out.",
}
"""Names of events, and what they mean."""

_ADAPTERS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(record) for kind, record in KINDS.items()}
_KIND_OF = {record: kind for kind, record in KINDS.items()}


def line_of(record: Record) -> bytes:
    """The line of a record, with its end. Numbers that JSON lacks, nan and inf, are written as text."""
    values = {"kind": _KIND_OF[type(record)], "schema": SCHEMA, **_json_value(dataclasses.asdict(record))}
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a metrics.jsonl, without its end, and its record: "kind" and the fields of the record's class.

    An incomplete last line (a crash, or a run that is just writing it) is left out.

    Raises:
        DataError: a line is no record, or of a newer schema.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found = record_of(line)
        except DataError as error:
            raise DataError(f"{path}: line {number:,}: {error}") from None
        if found is not None:
            yield line, found
        elif number < len(lines):  # else incomplete, or the empty string behind the last line end
            raise DataError(
                f"{path}: line {number:,} is no record of a step, a validation, a sample or an event; repair it, or "
                "move the file away to go on without the history"
            )


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line, as `read_records` has it; None where the line is none.

    Raises:
        DataError: the line is of a newer schema.
    """
    try:
        values = json.loads(line)
        schema = values.pop("schema", 0)
        if schema > SCHEMA:
            raise DataError(f"schema {schema} is newer than {SCHEMA}, the newest that this megazh reads; update megazh")
        kind = values.pop("kind")
        record = _ADAPTERS[kind].validate_python(values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    # A step is flat, and there are many of them: asdict, which copies deeply, would take most of the time.
    return {"kind": kind, **(vars(record) if kind == "step" else dataclasses.asdict(record))}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(each) for key, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
