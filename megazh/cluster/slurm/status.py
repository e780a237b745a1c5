"""The Slurm job of a run beside what the run itself records: does it end before the time limit does?"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazh.cluster.slurm.queue import QueuedJob, find_job, slurm_command
from megazh.cluster.slurm.submit import read_state
from megazh.errors import UsageError
from megazh.progress import duration
from megazh.run.folder import RunFolder
from megazh.training.status import Status, status

LEAD_SECONDS = 600
"""Seconds before the time limit at which the files in slurm/ have the run save and end."""


@dataclass(frozen=True)
class Forecast:
    """Whether a run that trains is complete before the time limit of its job."""

    in_time: bool
    spare_seconds: float | None
    """Seconds between its end and the time limit; None where it is not in time, or there is no limit."""
    requeues: int | None
    """How often the job has to start again until the run is complete; None where the limit is too short to say."""


@dataclass(frozen=True)
class RunInSlurm:
    """A run and its job."""

    run: Path
    number: str | None
    """Number of the job; None where none is recorded."""
    job: QueuedJob | None
    """The job; None where there is none, or Slurm no longer knows it."""
    status: Status | None
    """What the run records; None before it has begun."""
    forecast: Forecast | None
    """None unless job and run are running, and the pace is known."""

    def to_json(self) -> str:
        """A JSON object with all values, on one line."""
        values: dict[str, Any] = {
            "run": str(self.run),
            "job": self.number,
            "slurm": self.job.model_dump() if self.job else None,
            "forecast": vars(self.forecast) if self.forecast else None,
            "status": json.loads(self.status.to_json()) if self.status else None,
        }
        return json.dumps(values, ensure_ascii=False)

    def lines(self, now: float) -> Iterator[str]:
        """Lines for a terminal; `now` are seconds since 1970-01-01 UTC."""
        for number, line in enumerate(self._about_job()):
            yield f"{'' if number else 'job':<12}{line}"
        if self.forecast is not None and self.job is not None:
            yield f"{'forecast':<12}{_describe(self.forecast, self.job)}"
        if self.status is None:
            yield f"{'run':<12}{self.run}"
            yield f"{'state':<12}not begun"
        else:
            yield from self.status.lines(now)

    def _about_job(self) -> Iterator[str]:
        job = self.job
        if self.number is None:
            yield "none: the newest start of this run was outside of Slurm; --job N names one"
        elif job is None:
            yield f"{self.number}: Slurm no longer knows it; how it ended is below, and in its log"
        elif job.state == "PENDING":
            expected = f", expected to start at {job.starts}" if job.starts else ""
            yield f"{job.number}: PENDING in partition {job.partition}: {job.reason or 'no reason given'}{expected}"
        elif job.active:
            limit = "no time limit" if job.limit is None else f"time limit {duration(job.limit)}"
            left = "" if job.left is None else f", {duration(job.left)} left"
            yield f"{job.number}: {job.state} on {job.nodes or 'no node'} in partition {job.partition}{left} ({limit})"
            if job.restarts:
                yield f"started again {job.restarts} {'time' if job.restarts == 1 else 'times'}"
        else:
            code = "" if job.exit_code is None else f" with exit code {job.exit_code}"
            reason = f" ({job.reason})" if job.reason else ""
            where = f" on {job.nodes}" if job.nodes else ""
            yield f"{job.number}: ended as {job.state}{code}{where}{reason}"


def slurm_status(run: RunFolder, now: float, number: str | None = None) -> RunInSlurm:
    """The job and the state of a run.

    The job is the one that its newest attempt ran in, or the one that a chain (see `megazh.cluster.slurm.submit`) has
    submitted for it since.

    Args:
        run: the run; it may not have begun yet.
        now: seconds since 1970-01-01 UTC.
        number: number of its job. Default: as recorded.

    Raises:
        UsageError: no Slurm on this machine, not the number of a job, or neither a run nor a job of it is known.
        DataError, WorkerError: see `megazh.cluster.slurm.queue.find_job`, `megazh.training.status.status`.
    """
    slurm_command("squeue")
    found = status(run) if run.exists else None
    recorded = list(_recorded(run)) if number is None else [number]
    if found is None and not recorded:
        raise UsageError(
            f"{run.path}: no run, and no chain has submitted one; its job is known once it has begun, or by --job N"
        )
    jobs = [find_job(each) for each in recorded]
    newest = next((at for at, job in enumerate(jobs) if job is not None and job.active), 0)
    job = jobs[newest] if jobs else None
    return RunInSlurm(run.path, recorded[newest] if recorded else None, job, found, _forecast(job, found, now))


def _recorded(run: RunFolder) -> Iterator[str]:
    """Numbers of the jobs of a run, the likeliest first: of its newest attempt, of chains."""
    seen = set[str]()
    if run.exists and (attempts := run.info().attempts) and (job := attempts[-1].job) is not None:
        seen.add(job)
        yield job
    for path in sorted(run.path.parent.glob("*.chain.json")):
        for each in read_state(path).jobs:
            if Path(each.result).name == run.path.name and each.job not in seen:
                seen.add(each.job)
                yield each.job


def _forecast(job: QueuedJob | None, found: Status | None, now: float) -> Forecast | None:
    if job is None or job.state != "RUNNING" or found is None or not found.running:
        return None
    if found.eta_seconds is None or found.recorded is None:
        return None
    return forecast(max(0.0, found.eta_seconds - (now - found.recorded)), job.left, job.limit)


def forecast(remaining: float, left: float | None, limit: float | None) -> Forecast:
    """Whether a run is complete before the time limit, and how often its job has to start again if not.

    Starts take no time here, and each but the last ends `LEAD_SECONDS` before its limit.

    Args:
        remaining: seconds that the run still takes.
        left: seconds until the time limit; None for none.
        limit: time limit of each start, in seconds; None for none.
    """
    if left is None or limit is None:
        return Forecast(True, None, 0)
    usable = max(0.0, left - LEAD_SECONDS)
    if remaining <= usable:
        return Forecast(True, left - remaining, 0)
    each = limit - LEAD_SECONDS
    return Forecast(False, None, math.ceil((remaining - usable) / each) if each > 0 else None)


def _describe(found: Forecast, job: QueuedJob) -> str:
    if found.in_time:
        if found.spare_seconds is None:
            return "no time limit comes before its end"
        return f"complete {duration(found.spare_seconds)} before the time limit"
    if not job.requeue:
        return "not complete before the time limit, and the job may not be requeued: submit it once more then"
    if found.requeues is None:
        return f"the time limit is shorter than the {LEAD_SECONDS // 60} minutes that a save may take: raise --time"
    return f"not complete before the time limit: {found.requeues} more {'start' if found.requeues == 1 else 'starts'}"
