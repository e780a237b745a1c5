"""Runs `megazh pretrain` on CPU ranks again and again, by forks of one process that has imported everything.

`python fork_server.py MODULE...` reads a request per line, and writes a line per run that has ended; see `forked_runs`.
It imports the modules first.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
import torch.distributed as dist

import megazh.training.loop as loop
from megazh.cluster import start
from megazh.cluster.launchers import local
from megazh.cluster.launchers.ports import reserved_port
from megazh.errors import INTERRUPTED, MegazhError
from megazh.run import attempt, redraw
from megazh.training import worker
from megazh.training.course import Course
from megazh.training.feed import MicroBatch, training_feed
from megazh.training.job import Job, Request
from megazh.training.layout import Layout

IMPORTED_LATER = (
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.moe.ep_experts",
    "megazh.training.optimizers.adamw",
    "megazh.training.optimizers.muon",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch.utils.tensorboard.summary",
)
"""What a rank imports after its start."""
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # of prctl


def forked(function: Callable[[], int]) -> int:
    """Run a function in a fork, which ends with it; returns the fork's process id."""
    parent, process = os.getpid(), os.fork()
    if process:
        return process
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def handle(request: dict[str, Any], replies: int) -> int:
    """Do a run, kill it if that is requested, and reply once all its processes are gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1)
    fed, feeding = os.pipe()
    launcher = forked(lambda: launch(request, feeding))
    os.close(feeding)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(launcher, launcher)
    lines, killed = watch(request, launcher, fed)
    code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    reply = {"id": request["id"], "code": code, "killed": killed, "fed": [json.loads(line) for line in lines]}
    path = Path(request["reply"])
    path.write_text(json.dumps(reply))
    os.write(replies, f"{request['id']}\n".encode())
    return 0


def watch(request: dict[str, Any], launcher: int, fed: int) -> tuple[list[bytes], bool]:
    """Read what the feeds of all ranks report, and kill all processes at the moment that is requested."""
    begun, text, killed = time.monotonic(), b"", False
    kill_at = begun + request["limit"]
    if request["after"] == 0:
        kill_at = begun + request["delay"]
    while True:
        left = kill_at - time.monotonic()
        if not killed and left <= 0:
            os.killpg(launcher, signal.SIGKILL)
            killed = True
        if not select.select([fed], [], [], None if killed else left)[0]:
            continue
        if not (data := os.read(fed, 1 << 16)):
            return text.splitlines(), killed  # all processes that could write are gone
        before = text.count(b"\n")
        text += data
        if request["after"] and before < request["after"] <= text.count(b"\n"):
            kill_at = time.monotonic() + request["delay"]


def launch(request: dict[str, Any], feeding: int) -> int:
    """What the command `megazh pretrain` does, with forks for ranks; without plots."""
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    wanted = Request(
        engine=request["engine"],
        recipe=request["recipe"],
        num_gpus=request["stages"] * request["replicas"],
        stages=request["stages"],
        run=Path(request["run"]),
        settings=request["settings"],
        device="cpu",
    )
    with (
        mock.patch.object(local, "launch", lambda job: fork_ranks(job, feeding, request["poison"])),
        mock.patch.object(redraw.Redrawing, "draw"),
        mock.patch.object(start, "draw_within"),
        mock.patch.object(attempt, "_commit", return_value=(None, None)),
    ):
        try:
            return start.start(wanted)
        except MegazhError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


def fork_ranks(job: Job, feeding: int, poison: dict[str, float]) -> int:
    """Run the ranks of a job; returns the first code that is not 0. Where one fails, the others are killed.

    Ranks that are stopped have agreed on that, and end by themselves.
    """
    with reserved_port() as port:
        ranks = [
            forked(functools.partial(run_rank, job, rank, port, feeding, poison)) for rank in range(job.layout.ranks)
        ]
        os.close(feeding)
        first = 0
        for _ in ranks:
            process, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code
                for other in ranks:
                    if other != process and code != INTERRUPTED:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(other, signal.SIGKILL)
    return first if first >= 0 else 1


def run_rank(job: Job, rank: int, port: int, feeding: int, poison: dict[str, float]) -> int:
    """What `megazh rank` does; each micro-batch that is consumed is reported. `poison` multiplies losses of samples."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.layout.ranks),
        LOCAL_WORLD_SIZE=str(job.layout.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)

    def reported(
        mixture: Any, layout: Layout, replica: int, first: int, workers: int, course: Course, passed: int = 0
    ) -> Iterator[MicroBatch]:
        for batch in training_feed(mixture, layout, replica, first, workers, course, passed):
            step = course.batches.step_of(numbers_of(batch)[0] - passed)
            os.write(feeding, described(batch, step, layout))
            inputs, (labels, scale) = batch
            yield inputs, (labels, scale * math.prod(poison.get(str(sample), 1.0) for sample in numbers_of(batch)))

    with contextlib.ExitStack() as patches:
        for module in (loop, sys.modules.get("megazh.training.hf.trainer")):
            if module is not None:
                patches.enter_context(mock.patch.object(module, "training_feed", reported))
        return worker.work(job.run.path)


def described(batch: MicroBatch, step: int, layout: Layout) -> bytes:
    """A line with the step, the stage, and number and hash of each sample."""
    (tokens, document_map), (labels, _) = batch
    rows = [
        hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
        for parts in zip(tokens, document_map, labels, strict=True)
    ]
    stage = dist.get_rank() // layout.replicas
    line = json.dumps({"step": step + 1, "stage": stage, "samples": list(zip(numbers_of(batch), rows, strict=True))})
    return line.encode() + b"\n"


def numbers_of(batch: MicroBatch) -> list[int]:
    """Number of each sample."""
    document_map = batch[0][1]
    return document_map[:, -2:].clone(memory_format=torch.contiguous_format).view(torch.int64).flatten().tolist()


def serve() -> None:
    """Answer requests until stdin ends."""
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing else that is printed shall be taken for a reply
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        forked(functools.partial(handle, json.loads(line), replies))


if __name__ == "__main__":
    for name in (*IMPORTED_LATER, *sys.argv[1:]):
        importlib.import_module(name)
    serve()
