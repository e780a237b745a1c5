"""One rank of a made-up training state that saves; see `test_saver.py`.

`python saver_rank.py FOLDER JOB ARGUMENT...`; all ranks are replicas of one stage.
"""

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from pieces import MadeOptimizer, made_manifest, whole_state
from ranks import save_results

from megazh import writing
from megazh.errors import MegazhError, WriteError
from megazh.training import checkpoint_write
from megazh.training.saver import Saver, mark_complete


def make_saver(folder: Path) -> tuple[MadeOptimizer, Saver, list[str]]:
    """The state of this rank, what saves it, and the lines that it has printed."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = MadeOptimizer(whole_state(1), replica=rank, replicas=ranks)
    lines: list[str] = []
    return optimizer, Saver(optimizer, folder, lines.append), lines


def poll_until_saved(saver: Saver) -> int:
    """Poll as steps do, with a collective in each; returns the number of steps that this took."""
    steps = 0
    while saver.step is not None:
        busy: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(busy, saver.busy)
        saver.poll(any(busy))
        steps += 1
        time.sleep(0.01)
    return steps


def behind_the_steps(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Save while the state goes on to change; the last rank writes slowly."""
    optimizer, saver, lines = make_saver(folder)
    write = checkpoint_write.write_tensor_file
    may_write = threading.Event()

    def slow(*given: Any) -> str:
        if dist.get_rank() == dist.get_world_size() - 1:
            may_write.wait(20)
        return write(*given)

    with mock.patch.object(checkpoint_write, "write_tensor_file", slow):
        saver.begin(made_manifest(2, replicas=dist.get_world_size()))
        optimizer.clear()  # as the next step does
        steps_before = 0
        for _ in range(5):
            busy: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(busy, saver.busy)
            saver.poll(any(busy))
            steps_before += saver.step == 2
        there = sorted(path.name for path in folder.iterdir() if "step" in path.name)
        may_write.set()
        poll_until_saved(saver)
    saver.save(made_manifest(4))
    mark_complete(folder / "step_00000004")
    return {"steps": steps_before, "there": there, "lines": lines, "saved_at": saver.saved_at}


def failures(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Failed saves: too little room, once and as the last one; the last rank at its limit; three in a row."""
    found: dict[str, Any] = {"noted": []}
    lines: list[str] = []
    optimizer = MadeOptimizer(whole_state(1), replica=dist.get_rank(), replicas=dist.get_world_size())

    def note(line: str, step: int) -> None:
        lines.append(line)
        found["noted"].append(step)

    saver = Saver(optimizer, folder, lines.append, note_failure=note)
    saver.save(made_manifest(1))
    with mock.patch.object(writing, "free_bytes", return_value=1000):
        try:
            saver.check_room()
        except WriteError as error:
            found["at the start"] = str(error)
        saver.begin(made_manifest(2))
        found["under way"] = saver.step
        try:
            saver.save(made_manifest(3))
        except WriteError as error:
            found["required"] = str(error)
    saver.save(made_manifest(4))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    for step in (5, 6):
        saver.begin(made_manifest(step))
        poll_until_saved(saver)
        found[f"left of {step}"] = [path.name for path in folder.iterdir() if str(step) in path.name]
    found["lines"] = list(lines)
    saver.begin(made_manifest(7))
    try:
        poll_until_saved(saver)
    except MegazhError as error:
        found["third"], found["code"] = str(error), error.exit_code
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    found["saved_at"] = saver.saved_at
    return found


def a_bug(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """An exception in the thread of one rank that is no OSError."""
    _, saver, _ = make_saver(folder)
    wrong = ValueError("a bug") if dist.get_rank() == 1 else None
    write = checkpoint_write.write_tensor_file
    with mock.patch.object(checkpoint_write, "write_tensor_file", side_effect=wrong, wraps=write):
        saver.begin(made_manifest(1))
        try:
            saver.wait()
        except RuntimeError as error:
            return {"error": str(error)}
    return {}


def save_for_ever(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Save step after step, until the process is killed."""
    _, saver, _ = make_saver(folder)
    step = int(arguments[0])
    while True:
        saver.begin(made_manifest(step))
        poll_until_saved(saver)
        step += 1


JOBS = {
    "behind_the_steps": behind_the_steps,
    "failures": failures,
    "a_bug": a_bug,
    "save_for_ever": save_for_ever,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = JOBS[sys.argv[2]](Path(sys.argv[1]) / "checkpoints", sys.argv[3:])
    save_results(Path(sys.argv[1]), results)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
