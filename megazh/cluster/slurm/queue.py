"""What Slurm knows of a job, from squeue, or from sacct where squeue has forgotten it; everything is checked."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, NoReturn

from megazh.cluster.slurm.times import slurm_seconds
from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError, WorkerError

ACTIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESV_DEL_HOLD", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT",
})  # fmt: skip
"""States of a job that runs or may still run. PREEMPTED is an end: a job that comes back is PENDING."""

_SEPARATOR = "\x1f"
_WIDTH = 1000  # of a field of squeue, which would cut it at 20 characters
_FIELDS = {
    "JobArrayID": "number", "State": "state", "TimeLeft": "left", "TimeLimit": "limit", "TimeUsed": "used",
    "StartTime": "starts", "Requeue": "requeue", "RestartCnt": "restarts", "exit_code": "status",
    "Partition": "partition", "Reason": "reason", "NodeList": "nodes",
}  # fmt: skip
_SECONDS = 30.0  # for an answer
_NUMBER = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?")
_STATE = re.compile(r"[A-Z_]{1,40}")


class QueuedJob(Config):
    """A job as Slurm describes it."""

    number: str
    """Number, such as `17`, or `17_3` for a task of an array."""
    state: str
    """State in capitals, such as PENDING, RUNNING, COMPLETED, CANCELLED."""
    left: float | None = None
    """Seconds until the time limit; None where there is none, or the job does not run."""
    limit: float | None = None
    """Time limit in seconds; None where there is none."""
    used: float = 0.0
    """Seconds that it has run."""
    starts: str = ""
    """When it started or, while it waits, is expected to start, as 2026-11-28T01:02:03 in the cluster's time; empty
    where Slurm does not know."""
    requeue: bool | None = None
    """Whether Slurm may start it again; None where that is not known."""
    restarts: int = 0
    """How often Slurm has started it again."""
    exit_code: int | None = None
    """Exit code of a job that has ended by itself."""
    partition: str = ""
    reason: str = ""
    """Why it waits, or ended; empty where Slurm gives no reason."""
    nodes: str = ""
    """Nodes, such as `n[1-2]`; empty before it starts."""

    @property
    def active(self) -> bool:
        """Whether it runs, or may still run."""
        return self.state in ACTIVE


def find_job(number: str, name: str | None = None) -> QueuedJob | None:
    """Look a job up.

    Args:
        number: its number.
        name: its name; a job of another name does not count. Numbers begin anew where a cluster is set up again.

    Returns:
        None where Slurm no longer knows it, or never did.

    Raises:
        UsageError: not a number of a job, or no Slurm on this machine.
        WorkerError: Slurm does not answer.
        DataError: its answer cannot be understood.
    """
    if not _NUMBER.fullmatch(number):
        raise UsageError(f"{number!r}: not the number of a Slurm job; expected 17, or 17_3 for a task of an array")
    format = ",".join(f"{field}:{_WIDTH}{_SEPARATOR}" for field in _FIELDS)
    words = ["squeue", "--noheader", "--states=all", f"--jobs={number}", f"--Format={format}"]
    answer = _ask([*words, f"--name={name}"] if name else words, "Invalid job id")
    lines = [line for line in answer.splitlines() if line.strip()]
    if lines:
        return _queued(lines[0])
    words = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={number}"]
    if shutil.which("sacct") is None:
        return None
    answer = _ask([*words, "--format=JobID,State,ExitCode,NodeList,JobName"], "accounting storage is disabled")
    return _accounted(answer, number, name)


def slurm_command(name: str) -> str:
    """The path of a command of Slurm. Raises UsageError where it is missing."""
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"no Slurm on this machine: {name} is not in PATH; call this on a login node of the cluster")
    return found


def _ask(words: Sequence[str], nothing: str) -> str:
    """The answer of a command of Slurm; empty where its error holds `nothing`."""
    command = [slurm_command(words[0]), *words[1:]]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"{words[0]}: no answer within {_SECONDS:.0f} s; try again later") from None
    except OSError as error:
        raise WorkerError(f"{words[0]}: cannot be called: {error.strerror or error}") from None
    if found.returncode == 0:
        return found.stdout
    if nothing in found.stderr:
        return ""
    text = " ".join(found.stderr.split()) or f"exit code {found.returncode}"
    raise WorkerError(f"{words[0]}: {text}")


def _queued(line: str) -> QueuedJob:
    texts = [text.strip() for text in line.split(_SEPARATOR)]
    if len(texts) != len(_FIELDS) + 1:  # a separator ends each field
        _refuse("squeue", line)
    values = dict(zip(_FIELDS.values(), texts, strict=False))
    state, restarts, status = values["state"], values["restarts"], values["status"]
    if not _STATE.fullmatch(state) or not re.fullmatch(r"\d{1,9}", restarts) or not re.fullmatch(r"\d{1,9}", status):
        _refuse("squeue", line)
    if values["requeue"] not in ("0", "1"):
        _refuse("squeue", line)
    signalled = int(status) & 0x7F  # as waitpid gives it
    return _job({
        "number": values["number"],
        "state": state,
        "left": _seconds(values["left"], line) if state == "RUNNING" else None,
        "limit": _seconds(values["limit"], line),
        "used": _seconds(values["used"], line) or 0.0,
        "starts": values["starts"] if re.fullmatch(r"[0-9T:-]{19}", values["starts"]) else "",
        "requeue": values["requeue"] == "1",
        "restarts": int(restarts),
        "exit_code": None if signalled or state in ACTIVE else int(status) >> 8,
        "partition": _printable(values["partition"]),
        "reason": "" if values["reason"] == "None" else _printable(values["reason"]),
        "nodes": _printable(values["nodes"]),
    })  # fmt: skip


def _accounted(answer: str, number: str, name: str | None) -> QueuedJob | None:
    """The job in an answer of sacct, whose last field, the name, may hold anything but the end of a line."""
    for line in answer.splitlines():
        fields = line.split("|", 4)
        if len(fields) != 5:
            _refuse("sacct", line)
        job, state, codes, nodes, its_name = fields
        if job != number or (name is not None and its_name != name):
            continue
        word, _, rest = state.partition(" ")  # such as CANCELLED by 1000
        code = re.fullmatch(r"(\d{1,5}):(\d{1,5})", codes)
        if not _STATE.fullmatch(word) or code is None:
            _refuse("sacct", line)
        return _job({
            "number": job,
            "state": word,
            "exit_code": None if int(code[2]) else int(code[1]),
            "reason": _printable(rest),
            "nodes": _printable(nodes),
        })  # fmt: skip
    return None


def _job(values: dict[str, Any]) -> QueuedJob:
    return from_mapping(values, QueuedJob, "Slurm")


def _seconds(text: str, line: str) -> float | None:
    """Seconds of a duration such as `1-02:03:04` or `3:04`; None for one that is unlimited or not known."""
    if text in ("UNLIMITED", "NOT_SET", "INVALID", "Partition_Limit", "N/A"):
        return None
    seconds = slurm_seconds(text)
    if seconds is None:
        _refuse("squeue", line)
    return float(seconds)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)


def _refuse(command: str, line: str) -> NoReturn:
    text = _printable(" ".join(line.split()))[:200]
    raise DataError(f"{command} answered in a form that this version does not know: {text!r}")
