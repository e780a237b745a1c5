"""The placement of a job's ranks on its hosts, from its recipe's numbers, as `megazh plan` would have it."""

from dataclasses import replace
from itertools import pairwise

from megazh.cluster.placement import Links, describe, place, traffic_of
from megazh.cluster.plan import CARDS, MEASURED_MFU, Assumptions
from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.memory import trained_parameters
from megazh.pipeline.passes import makespan
from megazh.run.peaks import peak_flops
from megazh.training.job import Job, Launcher
from megazh.training.stages import fitting_bounds, work_of


def placed(job: Job) -> tuple[Job, list[str]]:
    """A job with the ranks of its hosts' slots chosen, and a line that says what crosses the hosts.

    The time of computation, which hides a part of the traffic, is estimated for RTX 3090s at the MFU of `megazh plan`,
    or for `logging.peak_tflops`. The cut is the recipe's, or by FLOPs: the run may cut by measured times.

    Args:
        job: the job; its hosts have as many slots as its layout has ranks.

    Returns:
        The job, and the line; no line where there is nothing to choose.
    """
    recipe, layout = job.recipe, job.layout
    if job.launcher is Launcher.LOCAL or len(job.hosts) < 2 or 1 in (layout.stages, layout.replicas):
        return job, []
    work = work_of(recipe, layout, job.precision)
    costs, blocks = costs_by_flops(work), recipe.model.num_hidden_layers
    bounds = fitting_bounds(recipe, work, costs, None)
    name, _ = CARDS[Assumptions.card]
    peak = peak_flops(name, recipe.logging.peak_tflops)
    assert peak is not None
    per_second = peak * MEASURED_MFU
    passes = [
        (forward / per_second, backward / per_second, weights / per_second)
        for forward, backward, weights in (
            costs.passes(begin, end, blocks, work.defers_weight_gradients) for begin, end in pairwise(bounds)
        )
    ]
    trained = [trained_parameters(recipe.model, begin, end, work.lora) for begin, end in pairwise(bounds)]
    links = Links(recipe.parallel.gpu_bandwidth, recipe.parallel.network_bandwidth)
    choice = place(layout, job.hosts, traffic_of(work, trained, makespan(passes, layout.micro_batches)), links)
    line = f"{'placement':<12}on {len(job.hosts)} hosts, {describe(choice, links)}"
    return replace(job, ranks_of_slots=choice.best.ranks_of_slots), [line]
