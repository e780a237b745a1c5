"""Saving while training goes on: complete or absent, one line for a failure, and an end to failures."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from pieces import MadeOptimizer, whole_state
from processes import wait_until
from ranks import run_ranks, start_ranks

from megazh.errors import SaveError
from megazh.training.checkpoint_list import list_checkpoints, read_manifest, remove_unfinished
from megazh.training.checkpoint_read import load_checkpoint

SCRIPT = Path(__file__).parent / "saver_rank.py"
pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


def assert_whole(checkpoint: Path) -> None:
    """Check that a checkpoint holds the state that was to be saved."""
    manifest = read_manifest(checkpoint)
    for entry in manifest.files:
        assert hashlib.sha256((checkpoint / entry.name).read_bytes()).hexdigest() == entry.sha256
    optimizer = MadeOptimizer(whole_state(1))
    optimizer.clear()
    load_checkpoint(optimizer, checkpoint, manifest, print)
    assert optimizer.wrong() == []


def test_steps_go_on_while_a_rank_writes_what_there_was_before_them(tmp_path: Path, one_rank: None) -> None:
    found = run_ranks(SCRIPT, 3, ["behind_the_steps"], tmp_path, timeout=90)
    folder = tmp_path / "checkpoints"
    for rank in found:
        assert rank["steps"] == 5
        assert rank["there"] == [".step_00000002.unfinished"], "no checkpoint before all have written"
        assert rank["saved_at"] == 4
        assert [line.split(" (")[0] for line in rank["lines"]] == [
            f"checkpoint {os.path.relpath(folder / name, tmp_path)}" for name in ("step_00000002", "step_00000004")
        ]
        assert "of which the step waited" in rank["lines"][0]
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000002", "step_00000004"]
    assert_whole(folder / "step_00000002")
    first, last = map(read_manifest, list_checkpoints(folder))
    assert (first.complete, last.complete) == (False, True)
    assert (first.optimizer, first.replicas, set(first.versions)) == ("adamw", 3, {"megazh", "torch", "deepspeed"})


def test_failed_saves(tmp_path: Path, one_rank: None) -> None:
    first, second = run_ranks(SCRIPT, 2, ["failures"], tmp_path, timeout=90)
    assert first == {**second, "lines": first["lines"]}
    folder = tmp_path / "checkpoints"
    assert first["at the start"].startswith(f"{folder}: cannot be written: No space left on device (")
    assert first["under way"] is None, "found before anything was written"
    assert f"{folder / 'step_00000003'}: cannot be written: No space left on device (" in first["required"]
    assert " needed, 1.0 kB free); earlier checkpoints are whole: make room on its disk, then" in first["required"]
    assert first["noted"] == [2, 5, 6], "on all ranks, where the run goes on"
    assert first["left of 5"] == first["left of 6"] == []
    _, early, _, fifth, sixth = first["lines"]
    assert early.startswith(f"warning: {folder / 'step_00000002'}: cannot be written: No space left on device (")
    assert early.endswith("; earlier checkpoints are whole; training goes on to the next checkpoint")
    for line, step in ((fifth, 5), (sixth, 6)):
        assert line.startswith(f"warning: {folder / f'step_0000000{step}'}: cannot be written by rank 1 on ")
        assert "needed, 'ulimit -f' allows 300 bytes)" in line
    assert first["third"].endswith(
        "; 3 saves in a row have failed, and the newest is that of step 4: training is stopped"
    )
    assert first["code"] == SaveError.exit_code == 7
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000001", "step_00000004"]
    assert first["saved_at"] == 4
    assert_whole(folder / "step_00000004")


def test_a_bug_in_a_thread_is_raised_on_all_ranks(tmp_path: Path) -> None:
    for rank in run_ranks(SCRIPT, 2, ["a_bug"], tmp_path, timeout=90):
        assert rank["error"].startswith("rank 1 failed to write ")
        assert "ValueError: a bug" in rank["error"]


def test_a_kill_in_the_middle_leaves_only_whole_checkpoints(tmp_path: Path, one_rank: None) -> None:
    choose = random.Random(5)
    folder, first = tmp_path / "checkpoints", 1
    for victim in ("a rank", "the launcher", "a rank"):
        with start_ranks(SCRIPT, 2, ["save_for_ever", first], tmp_path) as running:
            wait_until(lambda first=first: (folder / f"step_{first + 2:08d}").exists(), 60, "three checkpoints")
            time.sleep(choose.uniform(0, 0.3))
            ranks = [pid for pid in running.descendants() if pid != running.process.pid]
            os.kill(choose.choice(ranks) if victim == "a rank" else running.process.pid, signal.SIGKILL)
            running.wait(60)
            wait_until(lambda running=running: not running.descendants(), 30, "all end")
        checkpoints = list_checkpoints(folder)
        assert len(checkpoints) >= 3
        for checkpoint in checkpoints:
            assert_whole(checkpoint)
        first = read_manifest(checkpoints[-1]).step + 1
    remove_unfinished(folder)
    assert sorted(folder.iterdir()) == list_checkpoints(folder)
