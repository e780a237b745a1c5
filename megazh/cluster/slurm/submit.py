"""Submit a chain of jobs to Slurm, each after the one whose result it reads; no job twice unless that is asked for."""

import datetime
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megazh.cluster.slurm.chain import Chain, Link, Stage
from megazh.cluster.slurm.queue import find_job, slurm_command
from megazh.config import Config, choice, from_mapping
from megazh.errors import Collector, DataError, UsageError, WorkerError
from megazh.files import locked, write_atomic
from megazh.program import program

_SECONDS = 60.0  # for an answer of sbatch
_TAIL = 120  # characters of a command in an error


class Submitted(Config):
    """A job that was submitted."""

    stage: Annotated[Stage, choice(Stage)]
    job: str
    """Its number."""
    command: list[str]
    """The command line without its dependency."""
    result: str
    """Index (prefix), run folder, or file of figures."""
    time: str
    """Date and time of the submission in UTC."""


class ChainState(Config):
    """The contents of `runs/NAME.chain.json`: the newest job of each stage."""

    format_version: Literal[1] = 1
    jobs: list[Submitted] = Field(default_factory=list)

    def newest(self, stage: Stage) -> Submitted | None:
        """The newest job of a stage; None before there is one."""
        return next((each for each in self.jobs if each.stage is stage), None)


@dataclass(frozen=True)
class _Decision:
    """What happens to a stage."""

    submit: bool
    job: str | None = None
    """Job that later stages wait for; None where its result is there, and before it is submitted."""
    why: str = ""
    """Why it is not submitted."""


def read_state(path: Path) -> ChainState:
    """Read the jobs of a chain; none where there is no such file. Raises DataError where it is damaged."""
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return from_mapping(values, ChainState, str(path))
    except FileNotFoundError:
        return ChainState()
    except (OSError, ValueError, UsageError) as error:
        raise DataError(f"{path}: damaged: {error}; remove it, and look at squeue for jobs that are waiting") from None


def submit(
    chain: Chain,
    begin: Stage | None = None,
    again: Collection[Stage] | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Submit the jobs of a chain; a stage whose job waits, runs or has succeeded is not submitted again.

    Args:
        chain: the chain.
        begin: the first stage to submit. Default: the first one of the chain.
        again: stages to submit again whatever became of their jobs; empty: those whose jobs have failed.
        dry_run: print the commands, submit nothing.
        say: prints a line.

    Raises:
        UsageError: no Slurm here, a stage is missing, was submitted otherwise, or has failed and `again` is None.
        WorkerError: sbatch refuses a job; those before it are submitted and recorded.
        BusyError: another process submits this chain.
    """
    stages = [link.stage for link in chain.links]
    if missing := [each for each in (*filter(None, [begin]), *(again or ())) if each not in stages]:
        raise UsageError(f"{missing[0]}: not a stage of this chain, which has {', '.join(stages)}")
    first = stages.index(begin) if begin else 0
    if dry_run:
        _submit(chain, first, again, True, say)
        return
    slurm_command("sbatch")
    with locked(chain.state.with_name(f".{chain.state.name}.lock"), f"{chain.state}: another command submits it"):
        _submit(chain, first, again, False, say)


def _submit(
    chain: Chain, first: int, again: Collection[Stage] | None, dry_run: bool, say: Callable[[str], None]
) -> None:
    state = read_state(chain.state)
    decisions = _decide(chain, first, again, state)
    jobs: dict[Stage, str | None] = {}
    new: list[str] = []
    for link, decision in zip(chain.links, decisions, strict=True):
        jobs[link.stage] = decision.job
        if not decision.submit:
            if decision.why:
                say(f"{link.stage:<14}{decision.why}")
            continue
        after = jobs.get(link.needs) if link.needs else None
        command = link.command(after)
        if dry_run:
            jobs[link.stage] = f"JOB_OF_{link.stage.upper()}"
            say(f"{link.stage:<14}{shlex.join(command)}")
            continue
        job = _sbatch(command)
        jobs[link.stage] = job
        new.append(job)
        entry = Submitted(
            stage=link.stage,
            job=job,
            command=link.command(),
            result=str(link.result),
            time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        others = [each for each in state.jobs if each.stage is not link.stage]
        state = state.model_copy(update={"jobs": [*others, entry]})
        write_atomic(chain.state, (state.model_dump_json(indent=1) + "\n").encode())
        waits = f", after {after}" if after else ""
        say(f"{link.stage:<14}job {job}{waits}: {link.result}{_log(job)}")
    if dry_run:
        say("dry run: nothing was submitted")
        return
    if new:
        shown = next((link.result for link in chain.links if jobs[link.stage] in new and link.is_run), None)
        look = f", {program()} slurm status {shlex.quote(str(shown))}" if shown else ""
        say(f"{'look at':<14}squeue --me{look}")
        say(f"{'cancel':<14}scancel {' '.join(new)}")
    say(f"{'recorded':<14}{chain.state}")


def _decide(chain: Chain, first: int, again: Collection[Stage] | None, state: ChainState) -> list[_Decision]:
    """What happens to each stage, before anything is submitted; all that is wrong is raised together."""
    found, decisions = Collector(), list[_Decision]()
    needed = {link.needs for link in chain.links[first:]}
    for number, link in enumerate(chain.links):
        decision = _Decision(submit=False)
        with found.collecting():
            if number >= first:
                decision = _decision(link, state.newest(link.stage), again)
            elif link.stage in needed:
                decision = _earlier(link, state.newest(link.stage))
        decisions.append(decision)
    found.raise_all()
    return decisions


def _decision(link: Link, before: Submitted | None, again: Collection[Stage] | None) -> _Decision:
    if before is None or (again is not None and link.stage in again):
        return _Decision(submit=True)
    if before.command != link.command():
        raise UsageError(
            f"{link.stage}: was submitted as job {before.job} with another command: {_difference(before, link)}; give "
            f"the same again, another --name, or --again {link.stage}"
        )
    job = find_job(before.job, link.name)
    if job is not None and job.active:
        return _Decision(False, before.job, f"job {before.job} is {job.state} already")
    if (job is not None and job.state == "COMPLETED") or link.done:
        return _Decision(False, None, f"done by job {before.job}: {link.result}")
    if again is not None and not again:
        return _Decision(submit=True)
    how = f"has ended as {job.state}" if job else "has ended, unknown to Slurm by now"
    raise UsageError(
        f"{link.stage}: job {before.job} {how}, and {link.result} is not complete; look at its log, then submit what "
        "failed once more with --again"
    )


def _earlier(link: Link, before: Submitted | None) -> _Decision:
    """A stage that is not to be submitted, although a later one needs its result."""
    job = find_job(before.job, link.name) if before else None
    if before and job is not None and job.active:
        return _Decision(False, before.job, f"job {before.job} is {job.state} already")
    if (job is not None and job.state == "COMPLETED") or link.done:
        return _Decision(submit=False)
    other = ", or name a model with --base" if link.is_run else ""
    raise UsageError(
        f"{link.result}: not complete, and the stage after it needs it; begin with --from {link.stage}{other}"
    )


def _difference(before: Submitted, link: Link) -> str:
    """The words that only one of the two commands has."""
    now = link.command()
    gone = [word for word in before.command if word not in now]
    added = [word for word in now if word not in before.command]
    text = " ".join(
        [*(f"without {shlex.quote(word)}" for word in gone), *(f"with {shlex.quote(word)}" for word in added)]
    )
    return text[:_TAIL] or "its words in another order"


def _sbatch(command: list[str]) -> str:
    """Submit a job; returns its number."""
    words = [slurm_command(command[0]), *command[1:]]
    try:
        found = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkerError(f"sbatch: {error}; look at squeue --me before you submit again") from None
    name = next(word for word in command if word.startswith("--job-name="))
    if found.returncode:
        text = " ".join(found.stderr.split()).removeprefix("sbatch: error: ")
        raise WorkerError(f"sbatch {name}: {text}; jobs before it are submitted: the same command again goes on")
    match = re.fullmatch(r"(\d{1,10})(;[^\s;]+)?", found.stdout.strip())
    if match is None:
        raise DataError(f"sbatch {name}: expected the number of a job, found {found.stdout.strip()[:_TAIL]!r}")
    return match[1]


def _log(job: str) -> str:
    """Where the output of a job goes, for a line; empty where Slurm does not say."""
    words = [slurm_command("scontrol"), "show", "job", job]
    try:
        text = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"^ *StdOut=(\S.*)$", text, re.MULTILINE)
    return f", log {match[1]}" if match and match[1].isprintable() else ""
