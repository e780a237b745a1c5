#!/usr/bin/env python3
"""Measure the GPU memory of each stage of a layout on one GPU, and compare it with `megazh plan`.

    python tools/bench/stage_memory.py qwen0.5b_6x3090 -n 6 -p 1

Engine, loop and stage are those of a run with all ranks, but the other ranks are absent: nothing is sent or reduced
(torch.distributed's "fake" backend), and received tensors are made up. So the memory is that of a real run, optimizer
shard included, and the losses mean nothing. Known defect: on a GPU it ends with an error (docs/performance.md, Memory).
"""

import argparse
import json
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
    from train_data import make_mixture

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import UsageError, WorkerError
    from megazh.pipeline.costs import costs_by_flops
    from megazh.pipeline.work import Work
    from megazh.run.folder import RunFolder
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

torch may allocate at most --memory, as on a smaller card; a stage that does not fit is reported. Exits with 5 if a
stage does not fit, or needs over 10 % more or less than the plan."""
STEPS = 3
"""Steps to train: the first launches its kernels, the second is recorded as a CUDA graph, the third is replayed."""
TOLERANCE = 0.1


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
        print("stage  holds                         allocated   reserved       plan  difference")
        bounds = recipe.parallel.stage_bounds or []
        plan = memory_by_stage(planned_work, bounds)
        for stage, (begin, end) in enumerate(pairwise(bounds)):
            measured = measure(folder, stage, arguments)
            planned = plan[stage].total
            off = measured["allocated"] / planned - 1
            print(
                f"{stage:>5}  {describe_parts(recipe, begin, end):<28} {measured['allocated'] / 2**30:>6.2f} GiB "
                f"{measured['reserved'] / 2**30:>6.2f} GiB {planned / 2**30:>6.2f} GiB  {off:>+9.1%}",
                flush=True,
            )
            found.append({"stage": stage, "holds": describe_parts(recipe, begin, end), "plan": planned, **measured})
            if abs(off) > TOLERANCE and arguments.device == "cuda":
                missed.append(str(stage))
    if arguments.json:
        arguments.json.write_text(json.dumps({"recipe": arguments.recipe, "stages": found}, indent=1) + "\n")
    if missed:
        stages = ", ".join(missed)
        raise WorkerError(f"stage {stages}: over {TOLERANCE:.0%} off the plan (megazh/pipeline/memory.py)")


def prepare(arguments: argparse.Namespace) -> tuple[Recipe, Layout, Work]:
    """The recipe with a short step and a fixed cut, its layout, and the work that the plan counts with."""
    path, stages = recipe_path(arguments.recipe), arguments.stages
    if arguments.num_gpus % stages:
        raise UsageError(f"-n {arguments.num_gpus} GPUs do not divide into -p {stages} stages")
    settings = [
        f"memory_limit_gib={arguments.memory}", f"steps={STEPS}", "gradient_accumulation_steps=null",
        f"num_gpus={arguments.num_gpus}", f"pipe_parallel_size={stages}", f"device={arguments.device}",
        *arguments.settings,
    ]  # fmt: skip
    batch = load_recipe(path, settings).batch.micro_batch_size * (arguments.num_gpus // stages) * (stages + 2)
    settings.append(f"global_batch_size={batch}")
    if arguments.folder:
        settings += [f"data.manifest={arguments.folder / 'mixture.yaml'}", "stories=null"]
    recipe = load_recipe(path, settings)
    layout = make_layout(recipe, arguments.num_gpus)
    work = work_of(recipe, layout, recipe.precision.on(Device.CUDA))
    bounds = recipe.parallel.stage_bounds or bounds_for(work, costs_by_flops(work), arguments.memory * 2**30)
    return load_recipe(path, [*settings, f"stage_bounds={bounds}"]), layout, work


def measure(folder: Path, stage: int, arguments: argparse.Namespace) -> dict[str, int]:
    """Start a process that is one rank of stage number `stage`."""
    result = folder / f"stage-{stage}.json"
    command = [
        sys.executable, str(Path(__file__).resolve()), arguments.recipe, "-n", str(arguments.num_gpus), "-p",
        str(arguments.stages), "--memory", str(arguments.memory), "--device", arguments.device, "--folder", str(folder),
        "--serve", str(stage), *arguments.settings,
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": arguments.device, "LOCAL_RANK": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else "no message"
        raise WorkerError(f"stage {stage} ended with exit code {done.returncode}: {last}")
    return json.loads(result.read_text())


def serve(arguments: argparse.Namespace) -> None:
    """The process of `measure`: one rank of one stage."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megazh.run.metrics import Metrics
    from megazh.training.loop import Trainer
    from megazh.training.stop import StopRequest

    stage: int = arguments.serve
    from megazh.pipeline.engine import use_no_compiled_operators

    recipe, layout, _ = prepare(arguments)
    use_no_compiled_operators()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed numbers its ranks stage by stage.
    rank = stage * layout.replicas
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    import deepspeed

    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False)
    path = arguments.folder / f"run-{stage}"
    folder = RunFolder(path)
    mixture = recipe.open_mixture()
    folder.begin(recipe.to_yaml(), mixture)
    trainer = Trainer(folder, recipe, layout, device, StopRequest())
    if layout.stages > 1:
        _stand_in(trainer.engine, recipe, mixture.shape.max_docs)
    with Metrics(path, 0, quiet=True) as metrics:
        for _ in range(STEPS):
            trainer.take_step(metrics)
    if trainer.engine.skipped_steps:
        raise WorkerError("a step was skipped, and its optimizer state is missing: made-up numbers were not finite")
    on_gpu = device.type == "cuda"
    found = {
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
    }
    (arguments.folder / f"stage-{stage}.json").write_text(json.dumps(found))


class _Absent:
    """A channel to an absent stage: drops what is sent, and makes up what is received."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def send(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def expect(self, like: tuple[torch.Tensor, ...]) -> None:
        """Do nothing."""

    def receive(self, like: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return random hidden states or gradients, or a document map of one document per row."""
        made = []
        for tensor in like:
            if tensor.is_floating_point():
                made.append(torch.randn_like(tensor))
            else:
                document_map = torch.full_like(tensor, self._seq_len)
                positions = torch.arange(self._seq_len, device=tensor.device, dtype=tensor.dtype)
                document_map[:, : self._seq_len] = positions
                document_map[:, self._seq_len] = 0
                made.append(document_map)
        return tuple(made)


def _stand_in(engine: Any, recipe: Recipe, max_docs: int) -> None:
    """Replace this stage's channels by channels to absent stages."""
    absent = _Absent(recipe.batch.seq_len)
    transfers = engine._transfers
    for name in ("from_previous", "to_previous", "from_next", "to_next"):
        if getattr(transfers, name) is not None:
            setattr(transfers, name, absent)
    rows = recipe.batch.micro_batch_size
    dtype = next(engine.module.parameters()).dtype
    engine.first_output_send = False
    engine.pipe_recv_buf = (
        torch.empty(rows, recipe.batch.seq_len, recipe.model.hidden_size, device=engine.device, dtype=dtype),
        torch.empty(rows, recipe.batch.seq_len + max_docs + 1, device=engine.device, dtype=torch.int32),
    )


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
