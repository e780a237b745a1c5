"""Another layout of a run on another number of GPUs than it had, or than its recipe is made for."""

from collections.abc import Iterator
from dataclasses import replace

from megazh.errors import MegazhError, UsageError
from megazh.run.attempt import restarts_of_job, slurm_job_number
from megazh.run.folder import RunFolder
from megazh.training.checks import fit
from megazh.training.job import Case
from megazh.training.recipe import run_recipe

OPTION = "--allow-relayout"


def relaid(case: Case, hosts: int = 1) -> tuple[Case, list[str]]:
    """The case in a layout that fits its GPUs, and lines to print.

    With --allow-relayout, and only where the requested layout does not fit: as many GPUs as possible, then the number
    of stages nearest to the requested one, then the largest micro-batch up to the requested one. The global batch, and
    with it what is learned, stays.

    Args:
        case: the run, with its devices.
        hosts: number of hosts, each of which has as many of the devices.

    Raises:
        UsageError: the run's Slurm job came back with another number of GPUs, and --allow-relayout was not given; or no
            layout fits.
    """
    ranks, before = case.devices.ranks, _ranks_before(case.run)
    if not case.request.allow_relayout:
        if before not in (None, ranks) and _came_back(case.run):
            raise UsageError(
                f"{case.run.path}: its Slurm job came back with {ranks} GPUs, and had {before}; give {OPTION} to go on "
                "with another layout, or submit it again with as many"
            )
        return case, []
    if _fits(case):
        return case, [_note(case, before)] if before not in (None, ranks) else []
    found = next((candidate for candidate in _candidates(case, hosts) if _fits(candidate)), None)
    if found is None:
        raise UsageError(
            f"{OPTION}: no layout of at most {ranks} GPUs fits global_batch_size={case.recipe.batch.global_batch_size} "
            "and the memory of the GPUs"
        )
    return found, [_note(found, before)]


def _ranks_before(run: RunFolder) -> int | None:
    return run_recipe(run).parallel.num_gpus if run.exists else None


def _came_back(run: RunFolder) -> bool:
    """Whether the last attempt of the run was an earlier start of this Slurm job."""
    attempts = run.info().attempts
    return restarts_of_job() > 0 and bool(attempts) and attempts[-1].job == slurm_job_number()


def _fits(case: Case) -> bool:
    """Whether ranks, stages and batch go together, and each stage fits its GPU."""
    try:
        for check in (fit.layout, *((fit.memory,) if case.request.engine == "ds_pp" else ())):
            for _ in check(case):  # a warning is none of a layout that does not fit
                pass
    except MegazhError:
        return False
    return True


def _candidates(case: Case, hosts: int) -> Iterator[Case]:
    """Layouts on the case's GPUs or fewer, as many on each host, the best one first."""
    recipe, request = case.recipe, case.request
    wanted = request.stages or recipe.parallel.pipe_parallel_size
    micro, sizes = recipe.batch.micro_batch_size, recipe.course.sizes()
    for ranks in range(case.devices.ranks, 0, -hosts):
        stages_of = [stages for stages in range(1, ranks + 1) if ranks % stages == 0]
        if request.engine != "ds_pp":
            stages_of = [1]
        for stages in sorted(stages_of, key=lambda stages: max(stages / wanted, wanted / stages)):
            fitting = [size for size in range(micro, 0, -1) if not any(n % (size * (ranks // stages)) for n in sizes)]
            if fitting:
                yield _with_layout(case, ranks, stages, fitting[0])


def _with_layout(case: Case, ranks: int, stages: int, micro_batch_size: int) -> Case:
    batch = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": None}
    recipe = case.recipe.model_copy(update={"batch": case.recipe.batch.model_copy(update=batch)})
    bounds = recipe.parallel.stage_bounds
    if bounds is not None and len(bounds) != stages + 1:
        recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"stage_bounds": None})})
    devices = replace(case.devices, ranks=ranks, ids=case.devices.ids and case.devices.ids[:ranks])
    return replace(case, recipe=recipe, devices=devices, request=replace(case.request, stages=stages))


def _note(case: Case, before: int | None) -> str:
    layout = case.job.layout
    had = "" if before in (None, layout.ranks) else f" (the run had {before})"
    return (
        f"{OPTION}: {layout.ranks} GPUs{had}: {layout.stages} stages x {layout.replicas} replicas, "
        f"micro_batch_size={layout.micro_batch_size}"
    )
