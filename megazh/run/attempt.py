"""One attempt to run, as `run.json` records it: when, where, by which command, and with which code and libraries."""

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from megazh import __version__
from megazh.config import Config
from megazh.errors import INTERRUPTED, REQUEUE
from megazh.run.changes import Value

_LIBRARIES = ("torch", "deepspeed", "numpy", "triton", "transformers", "accelerate")
_GIT_SECONDS = 10.0


class Attempt(Config):
    """A start of the run, the first one or a resume."""

    started: str
    """Date and time of the start in UTC, such as 2026-11-28T01:02:03Z."""
    host: str
    """Name of the machine that the command ran on."""
    folder: str
    """Current folder, which relative paths in the command refer to."""
    command: str
    """Command line, quoted for a shell."""
    commit: str | None
    """Git commit of the code; None where it is no checkout, or git cannot tell."""
    changed: bool | None
    """Whether files of that commit had been changed; None where `commit` is."""
    versions: dict[str, str]
    """Versions of Python, megazh and the libraries; `cuda` is that of the CUDA libraries that torch was built with."""
    given: dict[str, Value] = Field(default_factory=dict)
    """Settings of the command line that `megazh ctl` could change, too: value by dotted key."""
    steps: int = 0
    """Optimizer steps of the newest whole checkpoint when it started."""
    job: str | None = None
    """Slurm job that it ran in (see `slurm_job_number`); None outside of Slurm."""
    restarts: int = 0
    """How often Slurm had started that job before."""
    devices: list[str] = Field(default_factory=list)
    """Devices of the ranks by host, such as `node1: 6 x NVIDIA GeForce RTX 3090`; empty until the ranks have joined."""
    ended: str | None = None
    """Date and time of the end in UTC; None while the attempt runs, and where nobody was left to record it."""
    reason: str | None = None
    """Why it ended: `done`, a request to stop, or the line of an error."""
    exit_code: int | None = None
    """Exit code (see `megazh.errors`); None where `ended` is."""
    saved: int | None = None
    """Step of the newest checkpoint at its end; None where there was none, and where `ended` is None."""

    def ended_now(self, code: int, reason: str, saved: int | None) -> "Attempt":
        """This attempt, with the end that it comes to at the moment."""
        return self.model_copy(update={"ended": _now(), "reason": _text(reason), "exit_code": code, "saved": saved})


KILLED = "no end was recorded: killed, or the machine failed"
"""Reason of an attempt that the next one finds without an end."""

COMPLETE = "complete"


def how_ended(code: int | None) -> str:
    """How an attempt with this exit code has ended, in a word: complete, stopped, failed; ended where it has none."""
    if code is None:
        return "ended"
    return COMPLETE if code == 0 else "stopped" if code in (INTERRUPTED, REQUEUE) else "failed"


def slurm_job_number() -> str | None:
    """Number of the Slurm job that this process runs in, as Slurm's commands take it: `17`, or `17_3` for a task of an
    array; None outside of Slurm, and where the variables are not Slurm's."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return name if re.fullmatch(r"[0-9]{1,10}(_[0-9]{1,10})?", name) else None


def restarts_of_job() -> int:
    """How often Slurm has started this job before, after a requeue."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0


def this_attempt(given: Mapping[str, Value], steps: int = 0) -> Attempt:
    """Describe the attempt that this process is about to make; for `given` and `steps`, see `Attempt`."""
    commit, changed = _commit(Path(__file__).resolve().parents[2])
    return Attempt(
        started=_now(),
        host=socket.gethostname(),
        folder=_text(os.getcwd()),
        command=_text(shlex.join(sys.orig_argv)),
        commit=commit,
        changed=changed,
        versions={
            "python": platform.python_version(),
            "megazh": __version__,
            **{name: version for name in _LIBRARIES if (version := _version(name))},
        },
        given=dict(given),
        steps=steps,
        job=slurm_job_number(),
        restarts=restarts_of_job(),
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(words: str) -> str:
    """Words of the system, of which bytes that are not UTF-8 are written as `\\udcNN`: JSON has no place for them."""
    return words.encode("utf-8", "backslashreplace").decode()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """The commit checked out at `root`, and whether its files have changed; (None, None) where git cannot tell."""
    if not (root / ".git").exists():  # installed, perhaps inside of another project's checkout
        return None, None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*git, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=_GIT_SECONDS, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status.strip())
