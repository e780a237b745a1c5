"""From a request on the command line to an exit code: devices, checks, data, ranks, closing summary."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megazh.cluster.hostfile import Host, read_hostfile
from megazh.cluster.late_files import await_checkpoint, await_data
from megazh.cluster.launchers.choose import choose_place, hosts_for, launch, launch_command
from megazh.cluster.place_job import placed
from megazh.cluster.relayout import relaid
from megazh.cluster.slurm.requeue import requeueing
from megazh.errors import INTERRUPTED, REQUEUE, Collector, MegazhError, Stopped, WorkerError
from megazh.files import locked
from megazh.pipeline.deepspeed_config import deepspeed_config
from megazh.run.folder import RunFolder
from megazh.run.redraw import draw_within
from megazh.run.requests import Inbox
from megazh.run.summary import describe_end
from megazh.training.checkpoint_list import newest_good, remove_unfinished
from megazh.training.checkpoint_report import check_last
from megazh.training.checks.course import bends, course_of, with_first_warmup
from megazh.training.checks.data import checked_mixture, describe_data, makes_data
from megazh.training.checks.resume import check_resume, is_complete, saved_data, steps_done
from megazh.training.describe import describe_job
from megazh.training.hf.deepspeed import zero_config
from megazh.training.job import Case, Job, Launcher, Request, Task
from megazh.training.live import given_on_command_line
from megazh.training.preflight import CHECKS_OF, DATA, WITHOUT_DEVICES, preflight, requested_case, warnings_of
from megazh.training.stages import work_of
from megazh.training.startup import preparing
from megazh.writing import check_writable

_PLOT_SECONDS = 10.0
"""Time for the plot of a run that was stopped or has failed, whose million steps take half a minute to draw."""


def start(request: Request) -> int:
    """Train; returns the exit code.

    Raises:
        MegazhError: the request cannot work; nothing was started. All that is wrong with it is raised together.
    """
    case, found = requested_case(request), Collector()
    await_checkpoint(case.run)
    if not request.inputs and not makes_data(case):
        await_data(case.recipe)
    hosts: list[Host] = []
    with found.collecting():
        hosts = read_hostfile(request.hostfile) if request.hostfile else []
    checks, place, relayout = WITHOUT_DEVICES, None, list[str]()
    with found.collecting():
        place = choose_place(case, hosts)
        case, relayout = relaid(replace(case, devices=place.devices), len(place.hosts) or 1)
        checks = CHECKS_OF[request.engine]
    job = preflight(case, checks, found)
    assert place is not None  # else `preflight` has raised what was found
    placed_on = hosts_for(place, job.layout.ranks)
    job = replace(job, launcher=place.launcher, hosts=placed_on, hostfile=request.hostfile)
    job, placement = placed(job)
    command = launch_command(job)  # refuses hosts that cannot work
    _note([*relayout, *job.notes, *placement])
    if request.dry_run:
        _dry_run(job, command)
        return 0
    return requeueing(job.run, lambda: _carry_out(case, job))


def _carry_out(case: Case, job: Job) -> int:
    """Make the data where it is missing, and train; returns the exit code."""
    request = case.request
    if request.inputs:
        _prepare(job, request)
    if is_complete(job.run, job.recipe):
        check_last(job.run.path)
        _describe_end(job, request)
        return 0
    if not request.inputs and makes_data(case) and not Path(job.recipe.data.manifest).exists():
        _prepare(job, request)
    _note([line for line in warnings_of(case, DATA) if line not in job.notes])  # of data that has just been made
    mixture = checked_mixture(job.recipe, case.settings)
    with locked(job.run.lock, f"{job.run.path}: another job is training in this folder"):
        remove_unfinished(job.run.checkpoints)  # first: what follows may need their space
        check_resume(job)
        _note(
            job.run.begin(
                job.recipe.to_yaml(),
                mixture,
                saved_data(job.run),
                job.recipe.data.allow_change,
                job.engine,
                given_on_command_line(case.settings),
                steps_done(job.run) or 0,
            )
        )
        with _recorded_end(job.run):
            if warning := Inbox.clear(job.run):
                _note([warning])
            for line in (*describe_job(job), *describe_data(job.recipe)):
                print(line, flush=True)
            code = launch(job)
            if code == 0 and not is_complete(job.run, job.recipe):
                raise WorkerError(
                    f"{job.run.path}: the ranks ended before the run was complete; run the same command again"
                )
    if code not in (0, REQUEUE):  # a scheduler may kill within seconds, and then the code would be lost
        draw_within(job.run.path, _PLOT_SECONDS)  # a plot, or its lack, changes no exit code
    if code == 0:
        _describe_end(job, request)
    return code


@contextlib.contextmanager
def _recorded_end(run: RunFolder) -> Iterator[None]:
    """Record the end of an attempt that fails, or is interrupted, outside of its ranks; launchers record other ends."""
    try:
        yield
    except MegazhError as error:
        run.end(error.exit_code, f"error: {error}")
        raise
    except KeyboardInterrupt as error:
        run.end(REQUEUE if isinstance(error, Stopped) else INTERRUPTED, "interrupted before the ranks began")
        raise


def _note(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


@preparing()
def _prepare(job: Job, request: Request) -> None:
    """Make data from the text of -i, or from stories; where it is there already, check it."""
    from megazh.index.prepare import prepare

    recipe = job.recipe
    elsewhere = "start in a folder that you can write to, and name the run folder with -r"
    check_writable(job.data_folder, elsewhere)
    prepare(
        job.data_folder,
        recipe.model.vocab_size,
        recipe.schedule.seed,
        request.inputs,
        request.text_key,
        request.text_documents,
        recipe.data.stories or 1,
        request.encoding,
        say=lambda line: print(line, flush=True),
    )


def _dry_run(job: Job, command: list[str]) -> None:
    for line in describe_job(job, detailed=True):
        print(line)
    print(f"{'precision':<12}{job.precision.compute}")
    print(f"{'optimizer':<12}{job.recipe.optimizer.name}")
    if job.devices.ids:
        print(f"{'GPUs':<12}{','.join(job.devices.ids)}")
    for line in describe_data(job.recipe):
        print(line)
    print(f"{'DeepSpeed':<12}{_deepspeed(job)}")
    print(f"{'command':<12}{' '.join([command[0], shlex.join(command[1:])])}")
    print("dry run: nothing was started")


def _deepspeed(job: Job) -> str:
    """DeepSpeed's configuration as text."""
    if job.engine == "hf":
        config = zero_config(job.recipe, job.layout, job.precision)
        return json.dumps(config) if config else "not used"
    return json.dumps(
        deepspeed_config(work_of(job.recipe, job.layout, job.precision), job.recipe.optimizer.max_grad_norm)
    )


def _describe_end(job: Job, request: Request) -> None:
    recipe, run = job.recipe, job.run
    done = steps_done(run) or recipe.course.steps
    kept = [
        text
        for text in request.settings
        if _last_name(text) not in ("steps", "max_steps", "tokens", "resume", "allow_bend")
    ]
    longer = replace(request, settings=[*kept, f"steps={2 * done}", *_bend(job, 2 * done)])
    anew = replace(request, run=run.path.with_name(f"{run.path.name}-2"))
    flops = recipe.flops_per_token.total
    for line in describe_end(run, done, flops, _trial(job), _command(longer), _command(anew)):
        print(line)


def _bend(job: Job, steps: int) -> list[str]:
    """The setting that a complete run needs to go on for so many steps."""
    saved = newest_good(job.run.checkpoints)
    if saved is None:
        return []
    schedule = job.recipe.schedule.model_copy(update={"steps": steps, "tokens": None})
    longer = with_first_warmup(job.recipe.model_copy(update={"schedule": schedule}), job.run)
    return ["allow_bend=true"] if bends(course_of(saved), longer.course, saved[1].step) else []


def _trial(job: Job) -> list[str]:
    """The arguments of `megazh` that try the model of a run: a chat, where it was trained on conversations."""
    newest, path = newest_good(job.run.checkpoints), str(job.run.path)
    if newest is not None and newest[1].template is not None:
        return ["chat", path]
    prompts = job.recipe.evaluation.sample_prompts
    return ["sample", path, prompts[0] if prompts else "从前，"]


def _last_name(setting: str) -> str:
    return setting.removeprefix("--").partition("=")[0].rpartition(".")[2]


def _command(request: Request) -> str:
    """The command line of a request."""
    command = "pretrain" if request.task is Task.PRETRAIN else "finetune"
    script = Path("jobs") / f"run_{command}.sh"
    if not script.exists():  # called from another folder
        script = Path(__file__).resolve().parents[2] / script
    kind = request.engine if request.task is Task.PRETRAIN else request.task.value
    words = [*(["bash", str(script)] if script.exists() else ["megazh", command]), "-t", kind]
    options = {
        "-c": request.recipe, "-g": request.gpus, "-n": request.num_gpus, "-p": request.stages, "-H": request.hostfile,
        "--launcher": None if request.launcher is Launcher.AUTO else request.launcher.value, "-r": request.run,
        "--device": request.device,
    }  # fmt: skip
    if request.inputs:
        options |= {"--text-key": request.text_key, "--text-documents": request.text_documents}
        options["--encoding"] = request.encoding
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    if request.allow_relayout:
        words.append("--allow-relayout")
    if request.inputs:
        words += ["-i", *request.inputs]
    return shlex.join([*words, *request.settings])
