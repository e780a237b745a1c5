"""What the ranks of a run have trained on, sample by sample: an audit aid, for recipes with `logging.samples`.

Each rank of the first and of the last stage appends a line per step to RUN/logs/samples_rank_N.jsonl. What it notes are
the micro-batches that the engine has taken, not those that a formula expects. Nothing is ever removed: a step that was
lost and taken again has a line for each time, and the newest one counts.
"""

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megazh.errors import DataError
from megazh.model.document_map import decode_sample_numbers
from megazh.training.feed import MicroBatch
from megazh.writing import write_all, writing

Sample = tuple[int, str]
"""Number of a sample, and hash of its tokens, document map and labels."""


class SampleLog:
    """Notes the samples that one rank feeds to its engine.

    Args:
        logs: folder of the logs.
        rank: number of this rank.
        attempt: number of this start of the run, from 1.
        stage: stage of this rank.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, logs: Path, rank: int, attempt: int, stage: int) -> None:
        self._path = logs / f"samples_rank_{rank}.jsonl"
        self._begin = {"attempt": attempt, "stage": stage}
        self._taken: list[Sample] = []
        with writing(self._path):
            logs.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (open as long as the rank)
            whole = self._path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(whole)  # without the part of a line that an attempt left that was killed

    def watch(self, feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a feed, and remember those that are taken."""
        for batch in feed:
            (tokens, document_map), (labels, _) = batch
            numbers = decode_sample_numbers(document_map).tolist()
            self._taken += zip(numbers, map(_digest, tokens, document_map, labels), strict=True)
            yield batch

    def note(self, step: int) -> None:
        """Write down what was taken since the last call, as that of optimizer step `step`, counted from 1.

        Raises:
            WriteError: the file cannot be written.
        """
        taken, self._taken = self._taken, []
        if not taken:
            return  # a stage in the middle
        line = json.dumps({**self._begin, "step": step, "samples": taken}).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        with writing(self._path, len(line)):
            try:
                write_all(self._file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise


def _digest(*parts: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(part.contiguous().cpu().numpy().tobytes() for part in parts)).hexdigest()[:16]


def read_samples(logs: Path) -> dict[int, list[Sample]]:
    """Samples of each step of a run, in the order of their numbers; a sample that was fed twice is there twice.

    A step counts as the newest attempt that noted it took it, the last time if it went back and took it again. The last
    line of a file may be incomplete.

    Raises:
        DataError: a line is no such note, or the stages of a run were fed different samples.
    """
    found: dict[int, dict[int, dict[tuple[int, Path], list[Sample]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(logs.glob("samples_rank_*.jsonl")):
        for values in _lines(path):
            taken = [(int(number), str(digest)) for number, digest in values["samples"]]
            found[values["step"]][values["attempt"]][values["stage"], path] = taken
    samples = {}
    for step, attempts in sorted(found.items()):
        stages = defaultdict[int, list[Sample]](list)
        for (stage, _), taken in attempts[max(attempts)].items():
            stages[stage] += taken
        first, *others = map(sorted, stages.values())
        if any(other != first for other in others):
            raise DataError(f"{logs}: the stages of step {step} were fed different samples")
        samples[step] = first
    return samples


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # behind the last newline is nothing, or a line that is being written
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not all(isinstance(values[key], int) for key in ("attempt", "stage", "step")) or "samples" not in values:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: line {number:,} is no note of a step's samples") from None
        yield values
