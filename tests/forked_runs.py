"""Runs of `megazh pretrain` on CPU ranks that start in a fraction of a second: forks of a process with all imports."""

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import kill_marked

_SERVER = Path(__file__).with_name("fork_server.py")
_MARK = "MEGAZH_TEST_FORKS"


@dataclass(frozen=True)
class Ended:
    """A run that has ended or was killed."""

    code: int
    """Exit code of the command; negative if it was killed."""
    killed: bool
    fed: list[dict[str, Any]]
    """Micro-batches in the order in which ranks consumed them: step, stage, and (number, hash) of each sample."""
    output: str
    """stdout and stderr of the command and of all ranks."""


class ForkedRuns:
    """The process that is forked; made by `start_forks`. Runs of several threads go on at the same time."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process, self._folder = process, folder
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[str, queue.SimpleQueue[None]] = {}
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self._ready.wait(120):
            raise AssertionError("the process that is forked was not ready within 120 s")

    def train(
        self,
        recipe: Path,
        run: Path,
        layout: tuple[int, int],
        *settings: str,
        kill_after: int | None = None,
        delay: float = 0.0,
        limit: float = 60.0,
        engine: str = "ds_pp",
        poison: Mapping[int, float] | None = None,
        code: int = 0,
    ) -> Ended:
        """Start or resume a run in a layout of (stages, replicas), and wait for its end.

        Args:
            kill_after: number of micro-batches, over all ranks, after which all processes are killed by SIGKILL; 0
                counts from the start of the command, None does not kill.
            delay: seconds from then to the kill.
            limit: seconds after which a run that is not to be killed has failed.
            engine: `-t` of the command.
            poison: factors of the loss of a micro-batch, by the number of a sample in it.
            code: exit code with which a run that is not killed is to end.
        """
        name = str(next(self._numbers))
        reply, log = self._folder / f"reply_{name}.json", self._folder / f"log_{name}.txt"
        request = {
            "id": name,
            "engine": engine,
            "recipe": str(recipe),
            "run": str(run),
            "stages": layout[0],
            "replicas": layout[1],
            "settings": settings,
            "after": -1 if kill_after is None else kill_after,
            "delay": delay,
            "limit": limit,
            "poison": poison or {},
            "reply": str(reply),
            "log": str(log),
        }
        self._waiting[name] = done = queue.SimpleQueue()
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        try:
            done.get(timeout=limit + 30)
        except queue.Empty:
            raise AssertionError(f"no reply of {request}") from None
        values, output = json.loads(reply.read_text()), log.read_text(errors="replace")
        ended = Ended(values["code"], values["killed"], values["fed"], output)
        if kill_after is None:
            assert ended.code == code, f"{request}\n{output}"
        return ended

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == b"ready\n":
                self._ready.set()
            else:
                self._waiting.pop(line.decode().strip()).put(None)


@contextlib.contextmanager
def start_forks(folder: Path, *modules: str) -> Iterator[ForkedRuns]:
    """Start the process that is forked, with `folder` for its files; all forks end with the block.

    Args:
        folder: folder for its files.
        modules: names of modules that it imports besides, which forks would import later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}_{folder}"
    path = os.pathsep.join([str(_SERVER.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "MEGAZH_CACHE": str(folder / "cache"), _MARK: mark}
    with open(folder / "server.txt", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(_SERVER), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield ForkedRuns(process, folder)
    finally:
        process.kill()
        process.wait()
        kill_marked(f"{_MARK}={mark}")
