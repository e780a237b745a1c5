"""Start a Slurm job again that was stopped or failed, a limited number of times without progress.

The files in slurm/ set MEGAZH_REQUEUE to that number; without it, and outside of Slurm jobs, nothing is started again.
What Slurm ends itself (scancel, a preemption, the failure of a node, `scontrol requeue`, the time limit), Slurm alone
starts again, or not: by then the job is no longer in state RUNNING.

`python -m megazh.cluster.slurm.requeue` decides for a job that is no run, such as an index build at its time limit.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from megazh.errors import REQUEUE, DataError, MegazhError, Stopped, UsageError, WorkerError
from megazh.run.attempt import restarts_of_job, slurm_job_number
from megazh.run.folder import RunFolder
from megazh.training.checks.resume import steps_done

LIMIT = "MEGAZH_REQUEUE"
"""Environment variable: how often in a row a job is requeued without progress."""

CODES = (WorkerError.exit_code, REQUEUE)
"""Exit codes after which a run is worth another start; all others need a person first (see `megazh.errors`)."""

_SECONDS = 30.0  # for an answer of Slurm's controller
_ATTEMPTS, _PAUSE_SECONDS = 4, 5.0


@dataclass(frozen=True)
class _Job:
    """The Slurm job that this process runs in."""

    name: str
    """Number as squeue and scontrol take it: `17`, or `17_3` for a task of an array."""
    limit: int


def requeueing(run: RunFolder, work: Callable[[], int]) -> int:
    """Do the work of a run, and then have its Slurm job start again where that may help; returns its exit code.

    Args:
        run: the run, whose attempts tell how often the job came back without progress.
        work: returns the exit code, or raises a MegazhError.

    Raises:
        UsageError: MEGAZH_REQUEUE is no number; nothing was done.
    """
    job = _job()
    try:
        code = work()
    except MegazhError as error:
        _after(job, run, error.exit_code)
        raise
    except Stopped:
        _after(job, run, REQUEUE)
        raise
    _after(job, run, code)
    return code


def _after(job: _Job | None, run: RunFolder, code: int) -> None:
    if job is not None and job.limit and code in CODES:
        _requeue(job, starts_without_progress(run), f"exit code {code}")


def starts_without_progress(run: RunFolder) -> int:
    """Starts of this Slurm job up to the present one, in a row, after which no more steps were saved than before."""
    name, restarts = slurm_job_number(), restarts_of_job()
    try:
        attempts = run.info().attempts if run.exists else []
    except DataError:
        attempts = []
    recorded = [attempt for attempt in attempts if attempt.job == name]
    if not recorded or attempts[-1].job != name:
        return restarts + 1
    count, done = restarts - recorded[-1].restarts, steps_done(run) or 0  # starts that ended before they were recorded
    for attempt in reversed(recorded):
        if done > attempt.steps:
            break
        count, done = count + 1, attempt.steps
    return count


def _requeue(job: _Job, starts: int, why: str) -> None:
    """Requeue the job, unless it came back too often without progress, or Slurm has its own plans for it."""
    if starts > job.limit:
        times = "once" if job.limit == 1 else f"{job.limit} times"
        _say(f"Slurm job {job.name} was requeued {times} in a row without progress ({LIMIT}={job.limit}): not again")
        return
    try:
        state = _slurm("squeue", "--noheader", f"--jobs={job.name}", "--format=%T").strip()
        if state != "RUNNING":
            _say(f"Slurm job {job.name} is {state or 'unknown to Slurm'}: whether it starts again is Slurm's decision")
            return
        again = f"; start {starts} of {job.limit + 1} in a row without progress" if starts else ""
        _say(f"requeueing Slurm job {job.name} ({why}{again})")
        # Slurm will send SIGTERM to this process, which is ending anyway, with an exit code of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _slurm("scontrol", "requeue", job.name)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        _say(f"Slurm job {job.name} cannot be requeued: {' '.join(reason.split())}; submit it again by hand")


def _slurm(*words: str) -> str:
    """The output of a command of Slurm. A controller that is busy, or is being restarted, is asked again."""
    attempt = 1
    while True:
        try:
            return subprocess.run(
                words,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=True,
                stdin=subprocess.DEVNULL,
            ).stdout
        except subprocess.SubprocessError:
            if attempt == _ATTEMPTS:
                raise
        attempt += 1
        time.sleep(_PAUSE_SECONDS)


def _job() -> _Job | None:
    """The Slurm job of this process and its limit; None outside of jobs that want to be requeued.

    Raises:
        UsageError: the limit is no number.
    """
    name, limit = slurm_job_number(), os.environ.get(LIMIT)
    if name is None or limit is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", limit):
        raise UsageError(f"{LIMIT}={limit}: expected a number of requeues, such as 3; 0: none")
    return _Job(name, int(limit))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    found = _job()
    if found is not None and found.limit:
        _requeue(found, restarts_of_job() + 1, "the time limit is near")
