"""Which layout of stages and replicas suits a recipe on given GPUs: memory, bubble, speed, days; best first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megazh.errors import UsageError
from megazh.model.counts import Flops, flops_per_token, parameter_counts
from megazh.pipeline.costs import LayerCosts, costs_by_flops
from megazh.pipeline.memory import StageMemory, stage_parameters
from megazh.pipeline.passes import makespan
from megazh.pipeline.precision import Precision, sums_in_place
from megazh.pipeline.timing import remembered_seconds
from megazh.training.layout import Layout, make_layout
from megazh.training.peaks import peak_flops
from megazh.training.precision import accumulation, communication, precision_on
from megazh.training.recipe import Recipe
from megazh.training.stages import OUTSIDE_TORCH, bounds_for, memory_of_stage, usual_backend, work_of
from megazh.training.summary import describe_parts

CARDS = {
    "3090": ("NVIDIA GeForce RTX 3090", 24.0),
    "4090": ("NVIDIA GeForce RTX 4090", 24.0),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 40.0),
    "a100": ("NVIDIA A100-SXM4-80GB", 80.0),
    "h100": ("NVIDIA H100 80GB HBM3", 80.0),
    "h200": ("NVIDIA H200", 141.0),
}
"""By the name on the command line: torch's name of the card, and its GiB."""


MEASURED_MFU = 0.47
"""Of the 0.5B recipe on one H100, in a step under the profiler (docs/performance.md). A 3090 has four times the memory
bandwidth for each of its FLOPs, so that there the rest weighs less beside products; that has not been measured."""


@dataclass(frozen=True)
class Assumptions:
    """What speed is estimated from; on the card in question none of it is measured."""

    card: str = "3090"
    memory_gib: float | None = None
    """Instead of the card's."""
    mfu: float = MEASURED_MFU
    """What one GPU reaches on its own part of the work, of its peak."""
    bandwidth: float = 10.0
    """GB/s between GPUs, each direction."""


@dataclass(frozen=True)
class Choice:
    """One layout, estimated."""

    layout: Layout
    bounds: list[int]
    costs: LayerCosts
    memory: list[StageMemory]
    bubble: float
    """Share of the step that a GPU waits for others to fill and drain the pipeline."""
    imbalance: float
    """Share of the rest that the average stage waits for the slowest."""
    communication_seconds: float
    """A step: gradients over replicas, the tied matrix between first and last, and what travels between stages unless
    they compute meanwhile."""
    step_seconds: float
    tokens_per_second: float
    days: float

    @property
    def memory_gib(self) -> float:
        """Of the fullest stage."""
        return max(part.total for part in self.memory) / 2**30


def plan(recipe: Recipe, gpus: int, assumed: Assumptions) -> Iterator[str]:
    """The lines of the plan.

    Raises:
        UsageError: an assumption cannot work, or no layout does.
    """
    if assumed.card not in CARDS:
        raise UsageError(f"--card {assumed.card}: expected one of {', '.join(CARDS)}")
    if not 0 < assumed.mfu <= 1:
        raise UsageError(f"--mfu {assumed.mfu}: expected a share above 0 and up to 1")
    if not assumed.bandwidth > 0:
        raise UsageError(f"--bandwidth {assumed.bandwidth}: expected more than 0 GB/s")
    if assumed.memory_gib is not None and not assumed.memory_gib > OUTSIDE_TORCH:
        raise UsageError(
            f"--memory {assumed.memory_gib}: expected more GiB than the {OUTSIDE_TORCH} that CUDA and NCCL take"
        )
    name, memory_gib = CARDS[assumed.card]
    limit_gib = (assumed.memory_gib or memory_gib) - OUTSIDE_TORCH
    peak = peak_flops(name, recipe.peak_tflops)
    assert peak is not None
    choices, refused = [], []
    for stages in range(1, gpus + 1):
        if gpus % stages:
            continue
        try:
            layout = make_layout(recipe.model_copy(update={"gradient_accumulation_steps": None}), gpus, stages)
            choices.append(_estimate(recipe, layout, name, peak, limit_gib, assumed))
        except UsageError as error:
            refused.append(f"pp={stages} x dp={gpus // stages}: {error}")
    if not choices:
        raise UsageError(f"no layout of {gpus} GPUs works: {'; '.join(refused)}")
    choices.sort(key=lambda choice: (choice.memory_gib > limit_gib, choice.step_seconds))
    yield from _describe_model(recipe, gpus, name, peak, limit_gib, assumed)
    yield ""
    yield from _describe_choices(choices, limit_gib)
    yield from refused
    yield ""
    yield from _projection(recipe, choices[0], name, limit_gib)
    yield ""
    for choice in choices:
        yield from _describe_stages(recipe, choice)
        yield ""
    yield "total: gradients are summed when activations and head are free again, so the larger of the two counts"
    yield from _reason(choices, limit_gib)


def _estimate(recipe: Recipe, layout: Layout, card: str, peak: float, limit_gib: float, assumed: Assumptions) -> Choice:
    precision = precision_on(recipe, "cuda")
    costs = remembered_seconds(
        recipe.model,
        recipe.seq_len,
        recipe.micro_batch_size,
        precision.dtype,
        usual_backend(recipe, precision),
        card,
        recipe.activation_checkpointing,
    ) or costs_by_flops(recipe.model, recipe.seq_len, recipe.micro_batch_size, recipe.activation_checkpointing)
    if recipe.stage_bounds and len(recipe.stage_bounds) == layout.stages + 1:
        bounds = recipe.stage_bounds
    else:
        try:
            bounds = bounds_for(recipe, layout, precision, costs, limit_gib * 2**30)
        except UsageError:  # shown all the same, as too large
            bounds = bounds_for(recipe, layout, precision, costs, None)
    memory = [
        memory_of_stage(recipe, layout, precision, stage, begin, end)
        for stage, (begin, end) in enumerate(pairwise(bounds))
    ]
    units = costs.units(recipe.model.num_hidden_layers)
    per_second = 1.0 if costs.unit == "seconds" else peak * assumed.mfu
    parts = [sum(units[begin:end]) / per_second for begin, end in pairwise(bounds)]
    slowest, average = max(parts), sum(parts) / len(parts)
    postpones = work_of(recipe, layout, precision).postpones
    seconds = [costs.passes(begin, end, recipe.model.num_hidden_layers, postpones) for begin, end in pairwise(bounds)]
    compute = makespan([(f / per_second, b / per_second, w / per_second) for f, b, w in seconds], layout.micro_batches)
    largest = max(stage_parameters(recipe.model, begin, end) for begin, end in pairwise(bounds))
    communication_seconds = _bytes_moved(recipe, layout, precision, largest) / (assumed.bandwidth * 1e9)
    step_seconds = compute + communication_seconds
    rate = recipe.batch_tokens / step_seconds
    return Choice(
        layout=layout,
        bounds=bounds,
        costs=costs,
        memory=memory,
        bubble=max(0.0, 1 - layout.micro_batches * slowest / compute),
        imbalance=1 - average / slowest,
        communication_seconds=communication_seconds,
        step_seconds=step_seconds,
        tokens_per_second=rate,
        days=recipe.total_steps * step_seconds / 86400,
    )


def _bytes_moved(recipe: Recipe, layout: Layout, precision: Precision, parameters: int) -> float:
    """What the busiest GPU sends in a step while it does not compute.

    A ring moves every byte but the share of one rank: of the gradient once where each replica gets its share of the
    sum, twice where it gets all of it (DeepSpeed's own engine: fp32, fp16), and of the gathered weights once. The first
    and last stage sum the gradient of a tied matrix. Each micro-batch's hidden state goes forward and its gradient
    back; DeepSpeed's own engine waits for that.
    """
    size = {Precision.FP32: 4}.get(precision, 2)
    accumulated = accumulation(recipe, precision)
    sums = {Precision.FP32: 4}.get(communication(recipe, accumulated), 2)
    share = (layout.replicas - 1) / layout.replicas
    in_place = sums_in_place(precision, accumulated)
    moved = ((1 if in_place else 2) * sums + size) * share * parameters
    if layout.stages > 1:
        hidden = recipe.seq_len * layout.micro_batch_size * recipe.model.hidden_size * size
        moved += 0 if in_place else 2 * layout.micro_batches * hidden
        if recipe.model.tie_word_embeddings:
            moved += {Precision.FP32: 4}.get(accumulated, 2) * parameter_counts(recipe.model).embedding
    return moved


def _describe_model(
    recipe: Recipe, gpus: int, card: str, peak: float, limit_gib: float, assumed: Assumptions
) -> Iterator[str]:
    counts, flops = parameter_counts(recipe.model), flops_per_token(recipe.model, recipe.seq_len)
    tokens = recipe.total_steps * recipe.batch_tokens
    yield (
        f"model       {counts.total:,} parameters: embedding {counts.embedding:,}, {counts.blocks} layers x "
        f"{counts.block:,}, last norm {counts.norm:,}, head {_head(counts.head)}"
    )
    yield (
        f"FLOPs       {flops.total / 1e9:.3f} GFLOP a token (forward and backward, causal, {recipe.seq_len} tokens): "
        f"layer {flops.block / 1e6:.1f} M, head {flops.head / 1e6:.1f} M = {_in_blocks(flops):.1f} layers"
    )
    yield f"run         {recipe.total_steps:,} steps x {recipe.batch_tokens:,} = {tokens:,} tokens"
    yield (
        f"GPUs        {gpus} x {card}, {limit_gib:.1f} GiB for torch, {peak / 1e12:g} TFLOP/s peak; assumed: MFU "
        f"{assumed.mfu:.0%}, {assumed.bandwidth:g} GB/s between GPUs"
    )
    days = 8 * tokens * counts.total / (gpus * peak * assumed.mfu) / 86400
    yield (
        f"rule of thumb: 8 x tokens x parameters / (GPUs x peak x MFU) = {days:.2f} days (8: everything computed "
        "forward twice)"
    )


def _head(parameters: int) -> str:
    return f"{parameters:,}" if parameters else "tied"


def _in_blocks(flops: Flops) -> float:
    return flops.head / flops.block


def _describe_choices(choices: list[Choice], limit_gib: float) -> Iterator[str]:
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


def _projection(recipe: Recipe, best: Choice, card: str, limit_gib: float) -> Iterator[str]:
    """What the best layout comes to, beside what is known from elsewhere."""
    if best.memory_gib > limit_gib:
        return
    tokens = recipe.total_steps * recipe.batch_tokens
    beside = ""
    if recipe.reference_days is not None:
        beside = f"; the recipe's reference: {recipe.reference_days:g} days ({recipe.reference_days / best.days:.2f} x)"
    yield (
        f"projection, not measured: {best.tokens_per_second:,.0f} tokens/s on {best.layout.ranks} x {card}, "
        f"{best.days:.2f} days for {tokens / 1e9:.1f} billion tokens{beside}"
    )


def _describe_stages(recipe: Recipe, choice: Choice) -> Iterator[str]:
    source = "seconds measured on this card" if choice.costs.unit == "seconds" else "FLOPs; nothing measured yet"
    layout = choice.layout
    yield f"stages of pp={layout.stages} x dp={layout.replicas} (cut by {source}), GiB by part:"
    yield (
        "stage  holds                          parameters    share  weights  gradients  optimizer  activations  "
        "head  reduction  total"
    )
    units = choice.costs.units(recipe.model.num_hidden_layers)
    for stage, (begin, end) in enumerate(pairwise(choice.bounds)):
        part = choice.memory[stage]
        gib = [
            value / 2**30
            for value in (
                part.weights, part.gradients, part.optimizer, part.activations, part.head, part.reduction, part.total
            )
        ]  # fmt: skip
        parameters = stage_parameters(recipe.model, begin, end)
        yield (
            f"{stage:>5}  {describe_parts(recipe, begin, end):<28} {parameters:>12,}  "
            f"{sum(units[begin:end]) / sum(units):>6.1%}  {gib[0]:>7.2f}  {gib[1]:>9.2f}  {gib[2]:>9.2f}  "
            f"{gib[3]:>11.2f}  {gib[4]:>4.2f}  {gib[5]:>9.2f}  {gib[6]:>5.2f}"
        )


def _reason(choices: list[Choice], limit_gib: float) -> Iterator[str]:
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
        why.append("no bubble, and all stages are equal because there is one")
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
    yield f"take it with: -p {layout.stages}"
