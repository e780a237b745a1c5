"""Layouts of stages and replicas for a recipe on given GPUs: memory, bubble, speed, days; best first."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megazh.cluster.placement import Choice, Links, describe, place, traffic_of
from megazh.errors import MegazhError, SeveralErrors, UsageError
from megazh.model.counts import Flops, parameter_counts
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.memory import StageMemory, stage_parameters, trained_parameters
from megazh.pipeline.passes import makespan
from megazh.pipeline.timing import remembered_seconds
from megazh.run.peaks import peak_flops
from megazh.settings import Settings
from megazh.training.checks import exported, fit
from megazh.training.checks.place import space_of
from megazh.training.describe import describe_course, describe_trained
from megazh.training.job import Case, Devices, Host
from megazh.training.layout import Layout
from megazh.training.preflight import DATA, planned_case, preflight, warnings_of
from megazh.training.recipe import Device, Recipe
from megazh.training.stages import (
    OUTSIDE_TORCH,
    MemoryLimit,
    describe_parts,
    fitting_bounds,
    memory_by_stage,
    memory_limit,
    work_of,
)

CARDS = {
    "3090": ("NVIDIA GeForce RTX 3090", 24.0),
    "4090": ("NVIDIA GeForce RTX 4090", 24.0),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 40.0),
    "a100": ("NVIDIA A100-SXM4-80GB", 80.0),
    "h100": ("NVIDIA H100 80GB HBM3", 80.0),
    "h200": ("NVIDIA H200", 141.0),
}
"""torch's name of each card, and its memory in GiB, by its name on the command line."""

MEASURED_MFU = 0.47
"""MFU of the 0.5B recipe on one H100, in a step under the profiler (docs/performance.md). A 3090 has four times the
memory bandwidth per FLOP, so that everything but matrix products should weigh less there; that is not measured."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions behind the projected speed; none of them is measured on the card in question."""

    card: str = "3090"
    memory_gib: float | None = None
    """Memory of the card in GiB, if not its own."""
    mfu: float = MEASURED_MFU
    """Share of its peak that one GPU reaches on its own stage."""
    bandwidth: float = 10.0
    """GB/s between two GPUs in each direction."""
    nodes: int = 1
    """Hosts, with equal numbers of GPUs."""
    network: float = Links.between
    """GB/s between two hosts in each direction."""

    def hosts(self, gpus: int) -> list[Host]:
        """The hosts of so many GPUs. Raises UsageError where they do not divide."""
        if gpus % self.nodes:
            raise UsageError(
                f"--nodes {self.nodes}: {gpus} GPUs do not divide by it; -n N gives another number of GPUs"
            )
        return [Host(f"node{number}", gpus // self.nodes) for number in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Projection:
    """Projected figures of one layout."""

    layout: Layout
    bounds: list[int]
    costs: LayerCosts
    memory: list[StageMemory]
    bubble: float
    """Share of the step that a GPU waits while the pipeline fills and drains."""
    imbalance: float
    """Share of the remaining step that the average stage waits for the slowest one."""
    communication_seconds: float
    """Seconds per step of communication that no computation hides: gradient reduction over replicas, the tied matrix
    between first and last stage, hidden states while the pipeline fills and drains."""
    step_seconds: float
    """Seconds of the average step."""
    tokens_per_second: float
    days: float
    placement: Choice
    """Ranks of the hosts' GPUs."""

    @property
    def memory_gib(self) -> float:
        """Memory of the fullest stage in GiB."""
        return max(stage.total for stage in self.memory) / 2**30


def plan(recipe: Recipe, settings: Settings, gpus: int, assumed: Assumptions) -> Iterator[str]:
    """Yield the lines of the plan.

    Args:
        recipe: the recipe.
        settings: its values with the places where they were written, for errors.
        gpus: number of GPUs.
        assumed: assumptions behind the projected speed.

    Raises:
        UsageError: an assumption cannot work, or no layout does.
    """
    if assumed.card not in CARDS:
        raise UsageError(f"--card {assumed.card}: expected one of {', '.join(CARDS)}")
    if not 0 < assumed.mfu <= 1:
        raise UsageError(f"--mfu {assumed.mfu}: expected a share above 0 and up to 1")
    if not assumed.bandwidth > 0:
        raise UsageError(f"--bandwidth {assumed.bandwidth}: expected more than 0 GB/s")
    if not assumed.network > 0:
        raise UsageError(f"--network {assumed.network}: expected more than 0 GB/s")
    hosts = assumed.hosts(gpus)
    if assumed.memory_gib is not None and not assumed.memory_gib > OUTSIDE_TORCH:
        raise UsageError(
            f"--memory {assumed.memory_gib}: expected more GiB than the {OUTSIDE_TORCH} that CUDA and NCCL use"
        )
    name, memory_gib = CARDS[assumed.card]
    card = (assumed.memory_gib or memory_gib) * 2**30
    limit = memory_limit(recipe, card)
    assert limit is not None
    limit_gib = limit.bytes / 2**30
    peak = peak_flops(name, recipe.logging.peak_tflops)
    assert peak is not None
    batch = recipe.batch.model_copy(update={"gradient_accumulation_steps": None})
    any_batch = recipe.model_copy(update={"batch": batch})
    devices = Devices(Device.CUDA, gpus, None, memory=int(card))
    case = planned_case(any_batch, settings, devices, stages=1)
    notes = warnings_of(case, [fit.length, exported.model])
    on_data = _on_data(case)
    choices, refused = [], []
    for stages in range(1, gpus + 1):
        if gpus % stages:
            continue
        try:
            layout = preflight(planned_case(any_batch, settings, devices, stages), (fit.layout, fit.dtypes)).layout
            choices.append(_estimate(recipe, layout, name, peak, limit, assumed))
        except MegazhError as error:
            errors = error.errors if isinstance(error, SeveralErrors) else [error]
            refused += [f"pp={stages} x dp={gpus // stages}: {each}" for each in errors]
    if not choices:
        raise UsageError(f"no layout of {gpus} GPUs works: {'; '.join(refused)}")
    choices.sort(key=lambda choice: (choice.memory_gib > limit_gib, choice.step_seconds))
    measured = choices[0].costs.unit == "seconds"
    yield from _describe_model(recipe, gpus, name, peak, limit_gib, assumed, measured)
    yield ""
    yield from _describe_choices(choices, limit_gib)
    if len(hosts) > 1:
        links = Links(assumed.bandwidth, assumed.network)
        yield f"on {len(hosts)} hosts of {hosts[0].slots} GPUs:"
        for choice in choices:
            yield f"  pp={choice.layout.stages} x dp={choice.layout.replicas}: {describe(choice.placement, links)}"
    yield from refused
    yield from (*on_data, *notes)
    yield ""
    yield from _projection(recipe, choices[0], name, limit_gib, assumed)
    space = space_of(recipe, work_of(recipe, choices[0].layout, recipe.precision.on(Device.CUDA)))
    yield f"checkpoints on disk: at most {space.describe()}"
    yield ""
    for choice in choices:
        yield from _describe_stages(recipe, choice, name)
        yield ""
    yield "total: gradients are reduced after activations and head are freed, so the larger of the two counts"
    yield from _reason(choices, limit_gib)


def _on_data(case: Case) -> list[str]:
    """What the checks of the data find. Data that does not fit, or is damaged, does not keep a plan from being made."""
    try:
        return warnings_of(case, DATA)
    except MegazhError as error:
        errors = error.errors if isinstance(error, SeveralErrors) else [error]
        return [f"a start will refuse this: {each}" for each in errors]


def _estimate(
    recipe: Recipe, layout: Layout, card: str, peak: float, limit: MemoryLimit, assumed: Assumptions
) -> Projection:
    work = work_of(recipe, layout, recipe.precision.on(Device.CUDA))
    costs = remembered_seconds(work, card) or costs_by_flops(work)
    try:
        bounds = fitting_bounds(recipe, work, costs, limit)
    except UsageError:  # shown nevertheless, as too large
        bounds = fitting_bounds(recipe, work, costs, None)
    blocks = recipe.model.num_hidden_layers
    costs_of_parts = costs.parts(blocks)
    per_second = 1.0 if costs.unit == "seconds" else peak * assumed.mfu
    stage_seconds = [sum(costs_of_parts[begin:end]) / per_second for begin, end in pairwise(bounds)]
    slowest, average = max(stage_seconds), sum(stage_seconds) / len(stage_seconds)
    split = work.defers_weight_gradients
    seconds = [costs.passes(begin, end, blocks, split) for begin, end in pairwise(bounds)]
    passes = [(f / per_second, b / per_second, w / per_second) for f, b, w in seconds]
    course = recipe.course
    steps = Counter(dict.fromkeys(course.sizes(), 0))
    for part in course.parts():
        steps[course.samples(part[0])] += len(part)
    batches = {size: layout.micro_batches_of(size) for size in steps}
    # Seconds, and micro-batches, of the average step.
    compute = sum(makespan(passes, batches[size]) * count for size, count in steps.items()) / course.steps
    micro_batches = sum(batches[size] * count for size, count in steps.items()) / course.steps
    trained = [trained_parameters(recipe.model, begin, end, work.lora) for begin, end in pairwise(bounds)]
    placement = place(
        layout,
        assumed.hosts(layout.ranks),
        traffic_of(work, trained, makespan(passes, layout.micro_batches)),
        Links(assumed.bandwidth, assumed.network),
    )
    communication_seconds = placement.best.seconds
    step_seconds = compute + communication_seconds
    return Projection(
        layout=layout,
        bounds=bounds,
        costs=costs,
        memory=memory_by_stage(work, bounds),
        bubble=max(0.0, 1 - micro_batches * slowest / compute),
        imbalance=1 - average / slowest,
        communication_seconds=communication_seconds,
        step_seconds=step_seconds,
        tokens_per_second=course.total_tokens / course.steps / step_seconds,
        days=course.steps * step_seconds / 86400,
        placement=placement,
    )


def _describe_model(
    recipe: Recipe, gpus: int, card: str, peak: float, limit_gib: float, assumed: Assumptions, measured: bool
) -> Iterator[str]:
    counts, flops = parameter_counts(recipe.model), recipe.flops_per_token
    course, seq_len = recipe.course, recipe.batch.seq_len
    tokens, sizes = course.total_tokens, course.sizes()
    yield (
        f"model       {counts.total:,} parameters: embedding {counts.embedding:,}, {counts.blocks} layers x "
        f"{counts.block:,}, last norm {counts.norm:,}, head {_head(counts.head)}"
    )
    if recipe.low_rank is not None:
        yield describe_trained(recipe)
    groups = f", in groups of {recipe.attention_group}" if recipe.attention_group else ""
    yield (
        f"FLOPs       {flops.total / 1e9:.3f} GFLOP per token (forward and backward, causal, {seq_len} tokens"
        f"{groups}): layer {flops.block / 1e6:.1f} M, head {flops.head / 1e6:.1f} M = {_in_blocks(flops):.1f} layers"
    )
    per_step = f" x {sizes[0] * seq_len:,} =" if len(sizes) == 1 else ","
    yield f"run         {course.steps:,} steps{per_step} {tokens:,} tokens"
    yield from describe_course(course)
    as_measured = " (one H100 without a pipeline)" if assumed.mfu == MEASURED_MFU else ""
    speed = "" if measured else f"MFU {assumed.mfu:.0%}{as_measured}, "
    yield (
        f"GPUs        {gpus} x {card}, {limit_gib:.1f} GiB for torch, {peak / 1e12:g} TFLOP/s peak; assumed: "
        f"{speed}{assumed.bandwidth:g} GB/s between GPUs"
    )
    if measured:
        yield f"layers      their times were measured on {card}; MFU counts in the rule of thumb only"
    factor = 8 if recipe.low_rank is None else 6  # frozen matrices have no gradient
    days = factor * tokens * counts.total / (gpus * peak * assumed.mfu) / 86400
    yield (
        f"rule of thumb: {factor} x tokens x parameters / (GPUs x peak x MFU) = {days:.2f} days ({factor}: everything "
        "computed forward twice)"
    )


def _head(parameters: int) -> str:
    return f"{parameters:,}" if parameters else "tied"


def _in_blocks(flops: Flops) -> float:
    return flops.head / flops.block


def _describe_choices(choices: list[Projection], limit_gib: float) -> Iterator[str]:
    yield "projected, best first; bubble and imbalance are shares of the step:"
    yield " pp  dp  micro-batches  bubble  imbalance    comm/step  memory GiB  tokens/s/GPU      days"
    for choice in choices:
        layout = choice.layout
        full = "  too large" if choice.memory_gib > limit_gib else ""
        yield (
            f"{layout.stages:>3} {layout.replicas:>3} {layout.micro_batches:>14} {choice.bubble:>7.1%} "
            f"{choice.imbalance:>10.1%} {choice.communication_seconds:>11.2f}s {choice.memory_gib:>11.1f} "
            f"{choice.tokens_per_second / layout.ranks:>13,.0f} {choice.days:>9.2f}{full}"
        )


def _projection(recipe: Recipe, best: Projection, card: str, limit_gib: float, assumed: Assumptions) -> Iterator[str]:
    """Speed and length of the best layout, beside the recipe's reference where that is for the same cards."""
    if best.memory_gib > limit_gib:
        return
    tokens = recipe.course.total_tokens
    yield (
        f"projection, not measured: {best.tokens_per_second:,.0f} tokens/s on {best.layout.ranks} x {card}, "
        f"{best.days:.2f} days for {tokens / 1e9:.1f} billion tokens"
    )
    log = recipe.logging
    if log.reference_days is None or log.reference_tokens is None:
        return
    if (log.reference_card, log.reference_gpus) == (assumed.card, best.layout.ranks):
        days = log.reference_days * tokens / log.reference_tokens
        yield f"the recipe's reference for these GPUs and tokens: {days:.2f} days, projected {best.days:.2f}"


def _describe_stages(recipe: Recipe, choice: Projection, card: str) -> Iterator[str]:
    source = f"seconds measured on {card}" if choice.costs.unit == "seconds" else "FLOPs; nothing measured yet"
    layout = choice.layout
    yield f"stages of pp={layout.stages} x dp={layout.replicas} (cut by {source}), GiB by component:"
    yield (
        "stage  holds                          parameters    share  weights  gradients  optimizer  activations  "
        "head  reduction  total"
    )
    parts = choice.costs.parts(recipe.model.num_hidden_layers)
    for stage, (begin, end) in enumerate(pairwise(choice.bounds)):
        memory = choice.memory[stage]
        gib = [
            component / 2**30
            for component in (
                memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.head, memory.reduction,
                memory.total,
            )
        ]  # fmt: skip
        parameters = stage_parameters(recipe.model, begin, end, recipe.low_rank)
        yield (
            f"{stage:>5}  {describe_parts(recipe, begin, end):<28} {parameters:>12,}  "
            f"{sum(parts[begin:end]) / sum(parts):>6.1%}  {gib[0]:>7.2f}  {gib[1]:>9.2f}  {gib[2]:>9.2f}  "
            f"{gib[3]:>11.2f}  {gib[4]:>4.2f}  {gib[5]:>9.2f}  {gib[6]:>5.2f}"
        )


def _reason(choices: list[Projection], limit_gib: float) -> Iterator[str]:
    best = choices[0]
    layout = best.layout
    if best.memory_gib > limit_gib:
        least = min(choices, key=lambda choice: choice.memory_gib)
        yield (
            f"nothing fits {limit_gib:.1f} GiB; the least is pp={least.layout.stages} with {least.memory_gib:.1f}: set "
            "activation_checkpointing=true, or a smaller micro_batch_size"
        )
        return
    why = []
    if layout.stages == 1:
        why.append("no bubble and no imbalance")
        why.append(f"communication costs {best.communication_seconds / best.step_seconds:.1%} of the step")
    else:
        flat = next((choice for choice in choices if choice.layout.stages == 1), None)
        if flat is None:
            why.append("one stage does not work with this batch")
        elif flat.memory_gib > limit_gib:
            why.append(f"one stage needs {flat.memory_gib:.1f} GiB and there are {limit_gib:.1f}")
        else:
            saved, lost = flat.communication_seconds - best.communication_seconds, best.bubble + best.imbalance
            why.append(f"communication takes {saved:.2f} s a step less than with one stage")
            why.append(f"bubble and imbalance cost {lost:.1%}")
    yield f"best: pp={layout.stages} x dp={layout.replicas}: {'; '.join(why)}"
    yield f"to use it: -p {layout.stages}"
