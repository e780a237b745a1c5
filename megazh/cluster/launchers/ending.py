"""How the ranks of a run have ended, as an exit code and a line for the person at the terminal."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megazh.cluster.launchers.rank_log import RankLog
from megazh.errors import INTERRUPTED, REQUEUE, MegazhError, WorkerError
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.control import SIGNALS, Reason

SIGNALLED = tuple(-number for number in SIGNALS)
"""Exit codes of a process that a signal ended before it could save."""

STOPPED = (INTERRUPTED, REQUEUE)
"""Exit codes of a rank that was requested to stop, and has saved."""

_HINTS: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGBUS: " (is /dev/shm full?)"}
_AGAIN = "run the same command again to resume from the last checkpoint"
_ANEW = "no checkpoint is there yet; run the same command again to begin anew"


class Exit(NamedTuple):
    """The end of one rank."""

    rank: int
    code: int
    """Exit code; the negative number of a signal where one ended the rank."""
    lost: str = ""
    """Why nothing is known but that the rank has gone, such as `its connection from n2 broke`; else empty."""


class Fault(NamedTuple):
    """The failure of the program that starts the ranks, before they ran or while they did."""

    code: int
    """Exit code of the run (see `megazh.errors`)."""
    text: str
    """Line for the person at the terminal, with its remedy."""


@dataclass
class Ending:
    """What is known of the end of a run."""

    failed: Exit | None = None
    """The first rank that failed, if one has."""
    fault: Fault | None = None
    """What the program that starts the ranks has failed with, if it has."""
    reason: Reason = Reason.NONE
    """Why the run is to stop, if it is."""
    hang: str = ""
    """Why the run was taken for one that hangs, if it was."""
    stuck: list[int] = field(default_factory=list)
    """Ranks that did not end in time."""
    complete: bool = True
    """Whether all ranks that have ended have done so with 0."""
    left: bool = False
    """Whether a rank has ended with a code of `STOPPED`."""


def reason_of(code: int) -> Reason:
    """The reason of a rank that has ended with a code of `STOPPED`, and has not said which one it is."""
    return Reason.PERSON if code == INTERRUPTED else Reason.TERMINATED


def report(ending: Ending, logs: Sequence[RankLog], labels: Sequence[str], save_seconds: float) -> tuple[int, str]:
    """Print one line on why the ranks failed or were stopped, if they were; returns the exit code and the reason.

    Args:
        ending: how they ended.
        logs: log of each rank.
        labels: name of each rank.
        save_seconds: seconds that ranks had to save after a request to stop.
    """
    code, line, reason = 0, "", "done"
    if ending.hang:
        where = f"the stacks of all ranks are in {logs[0].path.parent}/rank_*.log"
        code, line = WorkerError.exit_code, f"error: {ending.hang}; {where}; all ranks were killed; {_AGAIN}"
    elif ending.fault is not None and ending.failed is None:
        code, line = ending.fault.code, f"error: {ending.fault.text}"
    elif ending.failed is not None:
        code, line = _cause(ending.failed, labels[ending.failed.rank], logs[ending.failed.rank])
    if _was_stopped(ending):
        code, reason, late = ending.reason.exit_code, ending.reason.text, ""
        if ending.stuck:
            names = ", ".join(labels[rank] for rank in ending.stuck)
            late = f"; {names} did not end within {save_seconds:.0f} s, and all ranks were killed"
        first = "interrupted" if ending.reason is Reason.PERSON else f"stopped: {ending.reason.text}"
        line = f"{first}{late}; {_anew_or_again(logs[0].path.parents[1])}"
        reason += late
    elif line:
        reason = line
    if line:
        print(line, file=sys.stderr, flush=True)
    return code, reason


def _anew_or_again(folder: Path) -> str:
    """How a run in this folder goes on, once it is stopped."""
    run = RunFolder(folder)
    return _ANEW if run.exists and not list_checkpoints(run.checkpoints) else _AGAIN


def _was_stopped(ending: Ending) -> bool:
    """Whether the ranks ended as requested; a run that was complete nevertheless is done.

    A rank that a signal ends before the first step leaves the others in the middle of a collective, which then fails in
    ways that no code of megazh's errors stands for.
    """
    if not ending.reason or ending.hang or (ending.complete and not ending.stuck):
        return False
    if ending.fault is not None and ending.failed is None:
        return False
    if ending.failed is None or ending.failed.code in SIGNALLED:
        return True
    return ending.left and (ending.failed.code < 0 or ending.failed.code == MegazhError.exit_code)


def _cause(failed: Exit, label: str, log: RankLog) -> tuple[int, str]:
    """The exit code and the message for a rank that failed."""
    where = f"all ranks ended; its last output is in {log.path}"
    if failed.lost:
        return WorkerError.exit_code, f"error: {label} was lost: {failed.lost}; {where}; {_AGAIN}"
    if failed.code < 0:
        hint = _HINTS.get(-failed.code, "")
        what = f"{label} was killed by signal {-failed.code}{hint}"
        return WorkerError.exit_code, f"error: {what}; {where}; {_AGAIN}"
    if 1 < failed.code < INTERRUPTED and (own := log.own_error()):
        return failed.code, own
    words = f" ({log.last_words()})" if log.last_words() else ""
    code = failed.code if failed.code in (1, INTERRUPTED) else WorkerError.exit_code
    return code, f"error: {label} ended with exit code {failed.code}{words}; {where}; {_AGAIN}"
