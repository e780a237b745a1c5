"""The lines that describe a run before it starts: layout, batch, length, stages, kernels."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from megazh.model.backend import why_not_fused
from megazh.model.counts import parameter_counts, trained_counts
from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.memory import stage_parameters
from megazh.training.checks.hf import describe_engine
from megazh.training.course import Course
from megazh.training.cpu_time import describe_cpu_time
from megazh.training.recipe import Device, Kernels, Recipe, StageCosts
from megazh.training.stages import describe_parts, fitting_bounds, memory_by_stage, memory_limit, work_of

if TYPE_CHECKING:
    import torch

    from megazh.pipeline.work import Work
    from megazh.training.job import Job


def describe_job(job: Job, detailed: bool = False) -> Iterator[str]:
    """The lines that say what is about to run; `detailed` adds a table of the stages, cut by FLOPs."""
    recipe, layout = job.recipe, job.layout
    unit = "GPUs" if job.device is Device.CUDA else "CPU processes"
    counts = parameter_counts(recipe.model)
    course = recipe.course
    tokens, largest = course.total_tokens, max(course.sizes())
    yield f"{'run':<12}{job.run.path}"
    yield f"{'model':<12}{counts.total:,} parameters, {counts.blocks} layers x {recipe.model.hidden_size}"
    if recipe.low_rank is not None:
        yield describe_trained(recipe)
    yield (
        f"{'layout':<12}{layout.ranks} {unit} = {layout.stages} stages x {layout.replicas} replicas, "
        f"{job.precision.compute}"
    )
    yield (
        f"{'batch':<12}{layout.micro_batch_size} x {layout.micro_batches} micro-batches x {layout.replicas} replicas x "
        f"{recipe.batch.seq_len} = {largest * recipe.batch.seq_len:,} tokens per step"
        f"{', the largest' if len(course.sizes()) > 1 else ''}"
    )
    if job.engine == "hf":
        yield f"{'engine':<12}{describe_engine(recipe, layout.ranks)}"
    if recipe.attention_group is not None:
        yield (
            f"{'attention':<12}in groups of {recipe.attention_group} tokens, shifted by half of one for half of the "
            "heads; full in validation and sampling"
        )
    yield f"{'length':<12}{course.steps:,} steps, {tokens:,} tokens"
    yield from describe_course(course)
    if job.device is Device.CPU:
        operations = recipe.flops_per_token.total * tokens
        yield f"{'time':<12}{describe_cpu_time(operations)}"
    if detailed and job.engine == "ds_pp":
        yield from describe_stages(job)


def describe_course(course: Course) -> Iterator[str]:
    """The learning rate of a run on one line, and a table of its parts where batch or length of segments change."""
    schedule = course.schedule
    rise = f" after {schedule.warmup:,} steps of warm-up" if schedule.warmup else ""
    last = course.rate(course.steps - 1)
    end = f", {last:.2e} at the end" if last != schedule.peak else ""
    if schedule.decay:
        begun = schedule.steps - schedule.decay
        end = f", held to step {begun:,}, then {schedule.decay:,} steps of decay to {last:.2e}"
    yield f"{'rate':<12}{course.kind}: {schedule.peak:.2e}{rise}{end}"
    parts = list(course.parts())
    if len(parts) == 1 and course.cut_of(0) is None:
        return
    yield f"{'course':<12}from step   tokens so far    batch   length    first rate   last rate"
    for part in parts:
        yield (
            f"{'':<12}{part[0] + 1:>9,} {course.tokens_before(part[0]):>15,} {course.samples(part[0]):>8,} "
            f"{course.length(part[0]):>8,} {course.rate(part[0]):>13.2e} {course.rate(part[-1]):>11.2e}"
        )


def describe_trained(recipe: Recipe) -> str:
    """A line about a LoRA run: the number of trained parameters, and what they are."""
    lora, trained = recipe.lora, trained_counts(recipe.model, recipe.low_rank).total
    share, whole = trained / parameter_counts(recipe.model).total, ", embedding and norms" * lora.train_embed_norm
    return f"{'trained':<12}{trained:,} parameters ({share:.2%}): rank {lora.rank} on {', '.join(lora.targets)}{whole}"


def describe_stages(job: Job) -> Iterator[str]:
    """A table of the stages: parts, parameters, share of FLOPs, memory."""
    recipe, parallel = job.recipe, job.recipe.parallel
    work = work_of(recipe, job.layout, job.precision)
    costs = costs_by_flops(work)
    bounds = fitting_bounds(recipe, work, costs, memory_limit(recipe, job.devices.memory))
    parts = costs.parts(recipe.model.num_hidden_layers)
    if job.device is Device.CUDA and parallel.stage_bounds is None and parallel.stage_costs is not StageCosts.FLOPS:
        yield "stages by FLOPs; the run measures its layers first, and may cut elsewhere:"
    yield "stage  holds                          parameters   FLOPs   memory"
    memory = memory_by_stage(work, bounds)
    for stage, (begin, end) in enumerate(pairwise(bounds)):
        parameters = stage_parameters(recipe.model, begin, end, recipe.low_rank)
        yield (
            f"{stage:>5}  {describe_parts(recipe, begin, end):<28} {parameters:>12,}  "
            f"{sum(parts[begin:end]) / sum(parts):>5.1%}  {memory[stage].total / 2**30:>5.1f} GiB"
        )


def describe_kernels(recipe: Recipe, device: torch.device, work: Work) -> str:
    """A line for the log: the implementation of blocks and loss on this GPU, with the reason if it is not Triton."""
    if recipe.parallel.kernels is Kernels.TORCH:
        return "torch (kernels=torch)"
    if reason := why_not_fused(recipe.model, device, work.precision.compute.torch, work.lora):
        return f"torch, slower than Triton: {reason}"
    recorded = work.recordable and recipe.parallel.cuda_graph
    return "Triton, each pass of a micro-batch one CUDA graph" if recorded else "Triton"


def describe_devices(device: torch.device) -> list[str]:
    """The devices of all ranks by host, such as `node1: 6 x NVIDIA GeForce RTX 3090`. All ranks call it."""
    import torch

    from megazh.training.collect import gather

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return [
        f"{host}: {count} x {each}" for (host, each), count in Counter(gather((socket.gethostname(), name))).items()
    ]
