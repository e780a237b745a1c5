"""No step is recorded twice, whatever ends a run and wherever it goes on: in metrics.jsonl and in TensorBoard."""

import functools
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from processes import wait_until
from run.test_metrics import points, record, recorded, write_run

from megazh.run.metrics import METRICS, Metrics


def steps(folder: Path) -> list[int]:
    return [step for kind, step in recorded(folder) if kind == "step"]


def test_a_file_cut_at_any_byte_is_gone_on_with(tmp_path: Path) -> None:
    write_run(tmp_path, 4)
    with Metrics(tmp_path, 4, quiet=False) as metrics:
        metrics.event(4, "set", "学习率", name="learning_rate", value=1e-3)
        whole = (tmp_path / METRICS).read_bytes()
        begin = whole.index(b'"step": 4')  # in the last step before a validation, a sample and an event
    for cut in (*range(begin, len(whole) - 1, 5), len(whole) - 1):
        (tmp_path / METRICS).write_bytes(whole[:cut])
        with Metrics(tmp_path, 3, quiet=False) as metrics:
            metrics.step(record(4))
            metrics.step(record(5))
        assert steps(tmp_path) == [1, 2, 3, 4, 5]
        assert recorded(tmp_path).count(("validation", 4)) == 0
        assert recorded(tmp_path).count(("event", 4)) == (cut == len(whole) - 1), "events stay"


def _train(folder: Path, first: int) -> None:
    with Metrics(folder, first, quiet=False) as metrics:
        metrics.event(first, "resume", f"from {first}")
        for step in range(first + 1, 1_000_000):
            metrics.step(record(step))
            if step % 3 == 0:
                metrics.validation(step, step * 16_384, 2.5, 1.25, 400)


def _is_at(path: Path, attempt: int, step: int) -> bool:
    """Whether an attempt has recorded that it goes on, and then a step; also while a line is being written."""
    text = path.read_bytes() if path.exists() else b""
    found = re.findall(rb'"kind": "step", "schema": 1, "step": (\d+)', text.rpartition(b'"kind": "event"')[2])
    return text.count(b'"kind": "event"') == attempt and any(int(each) > step for each in found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a process with threads that forks
def test_killed_again_and_again(tmp_path: Path) -> None:
    """Each attempt is killed while it writes, and the next one goes on from a checkpoint at or before that."""
    draw = random.Random(1)
    context = multiprocessing.get_context("fork")
    begun = []
    for _ in range(8):
        done = steps(tmp_path)[-1] if (tmp_path / METRICS).exists() else 0
        begun.append(draw.randrange(done // 2, done + 1))
        process = context.Process(target=_train, args=(tmp_path, begun[-1]))
        process.start()
        grown = begun[-1] + draw.randrange(20, 60)
        wait_until(functools.partial(_is_at, tmp_path / METRICS, len(begun), grown), 60, "steps")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
    last = steps(tmp_path)[-1]
    write_run(tmp_path, last + 2, first_step=last)
    assert last > 20
    assert steps(tmp_path) == list(range(1, last + 3))
    assert [step for kind, step in recorded(tmp_path) if kind == "event"] == begun
    for tag in ("train/loss", "validation/loss"):
        shown = [step for step, _ in points(tmp_path, tag)]
        assert len(shown) == len(set(shown)), tag
    assert {step for step, _ in points(tmp_path, "train/loss")} == set(range(1, last + 3))


def test_resumed_from_earlier_checkpoints_and_by_a_clock_that_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, 9)
    clock = time.time
    for back, (first, last) in enumerate([(6, 8), (2, 7), (2, 4), (0, 3), (3, 10)]):
        monkeypatch.setattr(time, "time", lambda back=back: clock() - 3600 * back)
        write_run(tmp_path, last, first_step=first, loss=1.0 + back)
    assert steps(tmp_path) == list(range(1, 11))
    shown = points(tmp_path, "train/loss")
    assert shown == [(step, 4.0 if step <= 3 else 5.0) for step in range(1, 11)]
    assert [step for step, _ in points(tmp_path, "validation/loss")] == [2, 4, 6, 8, 10]
