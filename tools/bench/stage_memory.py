#!/usr/bin/env python3
"""Measure the GPU memory of each stage of a layout on one GPU, beside what `megazh plan` predicts.

    python tools/bench/stage_memory.py qwen0.5b_6x3090 -n 6 -p 1
    python tools/bench/stage_memory.py minillm_1.4b -n 6 -p 2

Engine, loop, stage and channels are those of a run with all ranks, but the other ranks are absent (`absent_ranks.py`):
what they would send is made up. So the memory is that of a real run, optimizer shard included, and the losses mean
nothing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from absent_ranks import BACKEND, join
    from train_data import make_mixture, untrained

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import UsageError, WorkerError
    from megazh.pipeline.costs import costs_by_flops
    from megazh.pipeline.precision import check_engine
    from megazh.pipeline.work import Work
    from megazh.run.folder import RunFolder
    from megazh.run.metrics import Metrics, StepRecord
    from megazh.training.layout import Layout, make_layout
    from megazh.training.recipe import Device, Recipe, load_recipe
    from megazh.training.recipe_files import recipe_path
    from megazh.training.stages import bounds_for, describe_parts, memory_by_stage, work_of
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/stage_memory.py qwen0.5b_6x3090 -n 6 -p 1
  python tools/bench/stage_memory.py minillm_1.4b -n 6 -p 2 --memory 22.5
  python tools/bench/stage_memory.py qwen0.5b_6x3090 -n 6 -p 2 micro_batch_size=16
  python tools/bench/stage_memory.py longlora_qwen0.5b_6x3090 -n 1 -p 1

torch may allocate at most --memory, as on a smaller card; a stage that does not fit is reported. Exits with 5 if a
stage does not fit, or needs over 10 % more or less than the plan."""
STEPS = 3
"""Steps to train: the first launches its kernels, the second is recorded as a CUDA graph, the third is replayed."""
TOLERANCE = 0.1
TIMEOUT = 600
"""Seconds that one stage may take."""


def call(arguments: argparse.Namespace) -> None:
    """Measure all stages, each in a process of its own."""
    if arguments.serve is not None:
        serve(arguments)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU; --device cpu runs the same steps without measuring")
    recipe, layout, planned_work = prepare(arguments)
    missed = []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="megazh-memory-") as name:
        folder = Path(name)
        tokens = (STEPS + 1) * layout.micro_batches * layout.micro_batch_size * recipe.batch.seq_len
        make_mixture(folder, tokens * layout.replicas, recipe.model.vocab_size, 500.0, 0)
        print(
            f"{arguments.recipe}: {layout.ranks} GPUs = {layout.stages} stages x {layout.replicas} replicas, "
            f"micro-batches of {layout.micro_batch_size} x {recipe.batch.seq_len}, torch capped at "
            f"{arguments.memory:g} GiB"
        )
        print("stage  holds                          allocated    reserved        plan  allocated / plan")
        bounds = recipe.parallel.stage_bounds or []
        plan = memory_by_stage(planned_work, bounds)
        for stage, (begin, end) in enumerate(pairwise(bounds)):
            measured = measure(folder, stage, arguments)
            planned, holds = plan[stage].total, describe_parts(recipe, begin, end)
            print(f"{stage:>5}  {holds:<28} {_figures(measured, planned)}", flush=True)
            found.append({"stage": stage, "holds": holds, "plan": planned, **measured})
            if measured["allocated"] and abs(measured["allocated"] / planned - 1) > TOLERANCE:
                missed.append(str(stage))
    if arguments.device == "cpu":
        print(f"{STEPS} steps taken by each stage; memory is measured on a GPU only")
    if arguments.json:
        arguments.json.write_text(json.dumps({"recipe": arguments.recipe, "stages": found}, indent=1) + "\n")
    if missed:
        stages = ", ".join(missed)
        raise WorkerError(f"stage {stages}: over {TOLERANCE:.0%} off the plan (megazh/pipeline/memory.py)")


def _figures(measured: dict[str, Any], planned: float) -> str:
    """The columns allocated, reserved, plan and allocated / plan."""
    sizes = (measured["allocated"], measured["reserved"], planned)
    columns = [f"{size / 2**30:>7.2f} GiB" if size else f"{'-':>11}" for size in sizes]
    share = f"{measured['allocated'] / planned:>14.3f} x" if measured["allocated"] else f"{'-':>16}"
    return " ".join((*columns, share))


def prepare(arguments: argparse.Namespace) -> tuple[Recipe, Layout, Work]:
    """The recipe with a short step and a fixed cut, its layout, and the work that the plan counts with."""
    path, stages = recipe_path(arguments.recipe), arguments.stages
    if arguments.num_gpus % stages:
        raise UsageError(f"-n {arguments.num_gpus} GPUs do not divide into -p {stages} stages")
    settings = [
        f"memory_limit_gib={arguments.memory}", f"steps={STEPS}", "gradient_accumulation_steps=null",
        "warmup=0", f"num_gpus={arguments.num_gpus}", f"pipe_parallel_size={stages}", f"device={arguments.device}",
        *arguments.settings,
    ]  # fmt: skip
    batch = load_recipe(path, settings).batch.micro_batch_size * (arguments.num_gpus // stages) * (stages + 2)
    settings.append(f"global_batch_size={batch}")
    if arguments.folder:
        settings += [f"data.manifest={arguments.folder / 'mixture.yaml'}", "stories=null"]
    recipe = load_recipe(path, settings)
    layout = make_layout(recipe, arguments.num_gpus)
    precision = recipe.precision.on(Device.CUDA)
    check_engine(precision, recipe.parallel.zero_stage)
    work = work_of(recipe, layout, precision)
    bounds = recipe.parallel.stage_bounds or bounds_for(work, costs_by_flops(work), arguments.memory * 2**30)
    return untrained(load_recipe(path, [*settings, f"stage_bounds={bounds}"])), layout, work


def measure(folder: Path, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start a process that is one rank of stage number `stage`; returns what `serve` has written."""
    result = folder / f"stage-{stage}.json"
    command = [
        sys.executable, str(Path(__file__).resolve()), arguments.recipe, "-n", str(arguments.num_gpus), "-p",
        str(arguments.stages), "--memory", str(arguments.memory), "--device", arguments.device, "--folder", str(folder),
        "--serve", str(stage), *arguments.settings,
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": arguments.device, "LOCAL_RANK": "0"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"stage {stage} was ended: {STEPS} steps took over {TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "no message"
        raise WorkerError(f"stage {stage} ended with exit code {done.returncode}: {last}")
    return json.loads(result.read_text())


class _Steps(Metrics):
    """Keeps the records of steps, and writes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 0, quiet=True)
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        """Keep the record."""
        self.records.append(record)


def serve(arguments: argparse.Namespace) -> None:
    """The process of `measure`: one rank of one stage."""
    from megazh.pipeline.engine import use_no_compiled_operators
    from megazh.training.control import Control
    from megazh.training.loop import Trainer

    stage: int = arguments.serve
    recipe, layout, _ = prepare(arguments)
    use_no_compiled_operators()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed numbers its ranks stage by stage.
    rank = stage * layout.replicas
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.ranks))
    join(rank, layout.ranks, recipe.batch.seq_len)
    import deepspeed

    deepspeed.init_distributed(dist_backend=BACKEND, auto_mpi_discovery=False)
    path = arguments.folder / f"run-{stage}"
    folder = RunFolder(path)
    mixture = recipe.open_mixture()
    folder.begin(recipe.to_yaml(), mixture)
    trainer = Trainer(folder, recipe, layout, device, Control())
    if stage > 0:
        _tell_shapes(trainer.engine, recipe, mixture.shape.segments)
    with _Steps(path) as steps:
        trainer.metrics = steps
        for _ in range(STEPS):
            trainer.take_step()
    _check(steps.records)
    on_gpu = device.type == "cuda"
    found = {
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "losses": [record.loss for record in steps.records] if trainer.engine.is_last_stage() else None,
        "grad_norms": [record.grad_norm for record in steps.records],
    }
    (arguments.folder / f"stage-{stage}.json").write_text(json.dumps(found))


def _check(records: list[StepRecord]) -> None:
    """Refuse steps whose memory is not that of a real step.

    Raises:
        WorkerError: a step was skipped, so that it made no optimizer state, or a number was not finite.
    """
    for record in records:
        if record.skipped:
            raise WorkerError(f"step {record.step} was skipped, so that its optimizer state is missing")
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            raise WorkerError(f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}")


def _tell_shapes(engine: Any, recipe: Recipe, segments: int) -> None:
    """Make the buffers for what the stage before sends; in a run, its first message tells the shapes."""
    rows, seq_len = recipe.batch.micro_batch_size, recipe.batch.seq_len
    dtype = next(engine.module.parameters()).dtype
    hidden = engine._allocate_or_extend_buffers(0, [rows, seq_len, recipe.model.hidden_size], dtype)
    document_map = engine._allocate_or_extend_buffers(1, [rows, seq_len + segments + 3], torch.int32)
    engine.pipe_recv_buf = (hidden, document_map)
    engine._grad_layer_buf.clear()  # as the engine does


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = standalone("measure the GPU memory of each stage of a layout on one GPU", EXAMPLES)
    add = found.add_argument
    add("recipe", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    add("-n", "--num-gpus", type=count, default=6, metavar="N", help="GPUs of the layout (default: 6)")
    add("-p", "--stages", type=count, default=1, metavar="N", help="pipeline stages of the layout (default: 1)")
    add(
        "--memory",
        type=float,
        default=22.5,
        metavar="GIB",
        help="memory that torch may use (default: 22.5, as on a 3090)",
    )
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--serve", type=int, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_intermixed_args()))
