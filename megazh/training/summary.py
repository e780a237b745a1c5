"""What a run says before it starts and after it ends."""

import shlex
from collections.abc import Iterator
from itertools import pairwise

import torch

from megazh.model.attention import why_not_fused
from megazh.model.counts import flops_per_token, parameter_counts
from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.memory import stage_parameters
from megazh.pipeline.precision import Precision, sums_in_place
from megazh.training.layout import Layout
from megazh.training.metrics import METRICS, read_metrics
from megazh.training.plot import plot_losses
from megazh.training.precision import accumulation, precision_on
from megazh.training.recipe import Kernels, Recipe, StageCosts
from megazh.training.run_folder import RunFolder
from megazh.training.stages import bounds_for, memory_of_stage

_SAMPLES = 2


def describe_layout(recipe: Recipe, layout: Layout, kind: str, run: RunFolder, detailed: bool = False) -> Iterator[str]:
    """The lines that say what is about to run.

    Args:
        kind: `cpu` or `cuda`.
        detailed: with a table of the stages, cut by FLOPs.
    """
    unit = "GPUs" if kind == "cuda" else "CPU processes"
    counts = parameter_counts(recipe.model)
    tokens = recipe.total_steps * recipe.batch_tokens
    yield f"{'run':<12}{run.path}"
    yield f"{'model':<12}{counts.total:,} parameters, {counts.blocks} layers x {recipe.model.hidden_size}"
    yield (
        f"{'layout':<12}{layout.ranks} {unit} = {layout.stages} stages x {layout.replicas} replicas, "
        f"{precision_on(recipe, kind)}"
    )
    yield (
        f"{'batch':<12}{layout.micro_batch_size} x {layout.micro_batches} micro-batches x {layout.replicas} replicas x "
        f"{recipe.seq_len} = {recipe.batch_tokens:,} tokens a step"
    )
    yield f"{'length':<12}{recipe.total_steps:,} steps, {tokens:,} tokens"
    if detailed:
        yield from describe_stages(recipe, layout, kind)


def describe_stages(recipe: Recipe, layout: Layout, kind: str) -> Iterator[str]:
    """A table of the stages: layers, parameters, share of FLOPs, memory."""
    precision = precision_on(recipe, kind)
    limit = recipe.memory_limit_gib * 2**30 if recipe.memory_limit_gib else None
    costs = costs_by_flops(recipe.model, recipe.seq_len, recipe.micro_batch_size, recipe.activation_checkpointing)
    bounds = recipe.stage_bounds or bounds_for(recipe, layout, precision, costs, limit)
    units = costs.units(recipe.model.num_hidden_layers)
    if kind == "cuda" and recipe.stage_bounds is None and recipe.stage_costs is not StageCosts.FLOPS:
        yield "stages by FLOPs; the run measures its layers first, and may cut elsewhere:"
    yield "stage  holds                          parameters   FLOPs   memory"
    for stage, (begin, end) in enumerate(pairwise(bounds)):
        memory = memory_of_stage(recipe, layout, precision, stage, begin, end)
        share = sum(units[begin:end]) / sum(units)
        parameters = stage_parameters(recipe.model, begin, end)
        yield (
            f"{stage:>5}  {describe_parts(recipe, begin, end):<28} {parameters:>12,}  {share:>5.1%}  "
            f"{memory.total / 2**30:>5.1f} GiB"
        )


def describe_kernels(recipe: Recipe, device: torch.device, precision: Precision, stages: int) -> str:
    """What computes blocks and loss on this GPU, and why not Triton's kernels where they do not."""
    if recipe.kernels is Kernels.TORCH:
        return "torch's, as kernels=torch wants"
    if reason := why_not_fused(recipe.model, device, precision.dtype):
        return f"torch's, slower than Triton's: {reason}"
    recorded = recipe.cuda_graph and stages == 1 and sums_in_place(precision, accumulation(recipe, precision))
    return "Triton's, a micro-batch recorded as one CUDA graph" if recorded else "Triton's"


def describe_parts(recipe: Recipe, begin: int, end: int) -> str:
    """`embedding + 18 layers`, `6 layers + head`."""
    last = recipe.model.num_hidden_layers + 1
    blocks = min(end, last) - max(begin, 1)
    parts = ["embedding"] if begin == 0 else []
    if blocks > 0:
        parts.append(f"{blocks} layer{'s' if blocks > 1 else ''}")
    if end == last + 1:
        parts.append("head")
    return " + ".join(parts)


def describe_end(run: RunFolder, recipe: Recipe, longer: str, anew: str) -> Iterator[str]:
    """The lines that say what a complete run has come to, and how to go on.

    Args:
        longer: the command that trains on, twice as long.
        anew: the command that begins another run of the same.
    """
    records = read_metrics(run.path)
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    samples = [record for record in records if record["kind"] == "sample"]
    yield ""
    yield f"{run.path}: complete, {recipe.total_steps:,} steps"
    if not steps:
        yield f"{'metrics':<12}no steps are in {run.path / METRICS}"
        return
    yield f"{'loss':<12}{steps[0]['loss']:.4f} at step {steps[0]['step']}, {steps[-1]['loss']:.4f} at the end"
    if validations:
        first, last = validations[0], validations[-1]
        yield (
            f"{'validation':<12}{first['loss']:.4f} before, {last['loss']:.4f} after; "
            f"{first['bits_per_byte']:.3f} and {last['bits_per_byte']:.3f} bits a byte"
        )
    for sample in samples[-_SAMPLES:]:
        yield f"{'sample':<12}{sample['prompt']}|{' '.join(sample['text'].split())}"
    plot_losses(run.path, run.plot)
    yield f"{'plot':<12}{run.plot}"
    flops = flops_per_token(recipe.model, recipe.seq_len).total
    seconds = sum(record["step_seconds"] for record in steps)
    operations = flops * recipe.batch_tokens * len(steps) / 1e12
    yield f"{'time':<12}{seconds:.0f} s in {len(steps)} steps, {operations:.1f} TFLOP"
    yield ""
    yield "go on:"
    prompt = recipe.sample_prompts[0] if recipe.sample_prompts else "从前，"
    yield f"  {shlex.join(['megazh', 'sample', str(run.path), prompt])}"
    yield f"  {shlex.join(['tensorboard', '--logdir', str(run.path / 'tensorboard')])}"
    yield f"  {longer}    # train on, twice as long"
    yield f"  {anew}    # another run from the start"
