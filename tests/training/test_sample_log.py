"""What was trained on is noted: the newest attempt counts, a line that was cut is dropped, stages have to agree."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megazh.errors import DataError
from megazh.model.document_map import encode_document_map
from megazh.training.feed import MicroBatch
from megazh.training.sample_log import SampleLog, read_samples

SEQ = 8


def batch(*numbers: int, change: int = 0) -> MicroBatch:
    """A micro-batch of these samples; `change` makes other tokens."""
    count = len(numbers)
    tokens = torch.arange(SEQ, dtype=torch.int32).repeat(count, 1) + torch.tensor(numbers, dtype=torch.int32)[:, None]
    positions = torch.arange(SEQ, dtype=torch.int32).repeat(count, 1)
    bounds = torch.tensor([[0, SEQ]], dtype=torch.int32).repeat(count, 1)
    document_map = encode_document_map(positions, bounds, torch.tensor(numbers))
    return (tokens + change, document_map), (tokens.clone(), torch.ones(1))


def feed(log: SampleLog, *batches: MicroBatch) -> Iterator[MicroBatch]:
    return log.watch(iter(batches))


def test_replicas_together_are_the_step_and_what_is_not_taken_is_not_noted(tmp_path: Path) -> None:
    for rank in (0, 1):
        log = SampleLog(tmp_path, rank, attempt=1, stage=0)
        taken = feed(log, batch(2 * rank, 2 * rank + 1), batch(4 + rank), batch(8 + rank))
        for step, count in ((1, 1), (2, 1)):
            for _ in range(count):
                next(taken)
            log.note(step)
    found = read_samples(tmp_path)
    assert {step: [number for number, _ in samples] for step, samples in found.items()} == {1: [0, 1, 2, 3], 2: [4, 5]}


def test_steps_that_were_lost_count_as_they_were_taken_again(tmp_path: Path) -> None:
    for attempt, change in ((1, 1), (2, 0)):
        log = SampleLog(tmp_path, 0, attempt, stage=0)
        for step in range(attempt, 4):
            next(feed(log, batch(step, change=change)))
            log.note(step)
    for change in (1, 0):  # went back to step 3, and took it again
        next(feed(log, batch(3, change=change)))
        log.note(3)
    with open(tmp_path / "samples_rank_0.jsonl", "ab") as file:
        file.write(b'{"attempt": 2, "st')  # killed in the middle of a line
    again = SampleLog(tmp_path / "alone", 0, 1, stage=0)
    for step in (1, 2, 3):
        next(feed(again, batch(step)))
        again.note(step)
    found, alone = read_samples(tmp_path), read_samples(tmp_path / "alone")
    assert found[1] != alone[1], "only the first attempt took it, with other tokens"
    assert (found[2], found[3]) == (alone[2], alone[3])
    SampleLog(tmp_path, 0, 3, stage=0).note(4)  # nothing was taken, as on a stage in the middle
    text = (tmp_path / "samples_rank_0.jsonl").read_bytes()
    assert text.endswith(b"\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 2, 3, 3, 3]


def test_stages_that_disagree_and_damaged_lines_are_errors(tmp_path: Path) -> None:
    for rank in (0, 1):
        log = SampleLog(tmp_path, rank, 1, stage=rank)
        next(feed(log, batch(7, change=rank)))
        log.note(1)
    with pytest.raises(DataError, match="the stages of step 1 were fed different samples"):
        read_samples(tmp_path)
    path = tmp_path / "samples_rank_1.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"samples_rank_1\.jsonl: line 1 is no note"):
        read_samples(tmp_path)


def test_a_sample_that_is_fed_twice_is_there_twice(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, 0, 1, stage=0)
    list(feed(log, batch(3), batch(3)))
    log.note(1)
    assert [number for number, _ in read_samples(tmp_path)[1]] == [3, 3]
