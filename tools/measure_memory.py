#!/usr/bin/env python3
"""Measure what each stage of a layout needs of a GPU's memory, on one GPU, beside what `megazh plan` says.

    python tools/measure_memory.py qwen0.5b_6x3090 -n 6 -p 1

The engine, the loop and the stage are those of a run with all the ranks. The others are not there: nothing is sent or
summed (torch.distributed's "fake" backend), and what they would send is made up. So the memory is right, the share of
optimizer state included, and the losses mean nothing.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import torch
    from bench_train_data import make_mixture

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import UsageError, WorkerError
    from megazh.index.mixture import Mixture
    from megazh.pipeline.costs import costs_by_flops
    from megazh.training.layout import Layout, make_layout
    from megazh.training.precision import precision_on
    from megazh.training.recipe import Recipe, load_recipe, recipe_path
    from megazh.training.run_folder import RunFolder
    from megazh.training.stages import bounds_for, memory_of_stage
    from megazh.training.summary import describe_parts
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/measure_memory.py qwen0.5b_6x3090 -n 6 -p 1
  python tools/measure_memory.py minillm_1.4b -n 6 -p 2 --memory 22.5
  python tools/measure_memory.py qwen0.5b_6x3090 -n 6 -p 2 micro_batch_size=16

Torch's share is capped at --memory, as on a smaller card; a stage that does not fit says so. Exits with 5 if a stage
does not fit, or needs over 10 % more or less than the plan."""
STEPS = 3
"""The first one as it comes, the second one recorded, the third one replayed."""
TOLERANCE = 0.1


def call(arguments: argparse.Namespace) -> None:
    """Measure all stages, each in a process of its own."""
    if arguments.serve is not None:
        serve(arguments)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU; --device cpu goes through the motions without measuring")
    recipe, layout = prepare(arguments)
    missed = []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="megazh-memory-") as name:
        folder = Path(name)
        tokens = (STEPS + 1) * layout.micro_batches * layout.micro_batch_size * recipe.seq_len
        make_mixture(folder, tokens * layout.replicas, recipe.model.vocab_size, 500.0, 0)
        print(
            f"{arguments.recipe}: {layout.ranks} GPUs = {layout.stages} stages x {layout.replicas} replicas, "
            f"micro-batches of {layout.micro_batch_size} x {recipe.seq_len}, torch capped at {arguments.memory:g} GiB"
        )
        print("stage  holds                         allocated   reserved       plan  difference")
        for stage, (begin, end) in enumerate(pairwise(recipe.stage_bounds or [])):
            measured = measure(folder, stage, arguments)
            planned = memory_of_stage(recipe, layout, precision_on(recipe, "cuda"), stage, begin, end).total
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


def prepare(arguments: argparse.Namespace) -> tuple[Recipe, Layout]:
    """The recipe with a short step and a fixed cut, and its layout."""
    settings = [f"memory_limit_gib={arguments.memory}", f"steps={STEPS}", *arguments.settings]
    recipe = load_recipe(recipe_path(arguments.recipe), settings)
    if arguments.count % arguments.stages:
        raise UsageError(f"-n {arguments.count} GPUs do not divide into -p {arguments.stages} stages")
    batch = recipe.micro_batch_size * (arguments.count // arguments.stages) * (arguments.stages + 2)
    recipe = recipe.model_copy(update={"global_batch_size": batch, "gradient_accumulation_steps": None})
    layout = make_layout(recipe, arguments.count, arguments.stages)
    costs = costs_by_flops(recipe.model, recipe.seq_len, recipe.micro_batch_size, recipe.activation_checkpointing)
    limit = arguments.memory * 2**30
    bounds = recipe.stage_bounds or bounds_for(recipe, layout, precision_on(recipe, "cuda"), costs, limit)
    return recipe.model_copy(update={"stage_bounds": bounds, "pipe_parallel_size": arguments.stages}), layout


def measure(folder: Path, stage: int, arguments: argparse.Namespace) -> dict[str, int]:
    """Start a process that is one rank of stage number `stage`."""
    result = folder / f"stage-{stage}.json"
    command = [
        sys.executable, str(Path(__file__).resolve()), arguments.recipe, "-n", str(arguments.count), "-p",
        str(arguments.stages), "--memory", str(arguments.memory), "--device", arguments.device, "--folder", str(folder),
        "--serve", str(stage), *arguments.settings,
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": arguments.device, "LOCAL_RANK": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise WorkerError(f"stage {stage} ended with exit code {done.returncode}: {said[-1] if said else 'no message'}")
    return json.loads(result.read_text())


def serve(arguments: argparse.Namespace) -> None:
    """The process of `measure`."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megazh.pipeline.operators import use_no_compiled_operators
    from megazh.training.loop import Trainer
    from megazh.training.metrics import Metrics
    from megazh.training.stop import StopRequest

    stage: int = arguments.serve
    recipe, layout = prepare(arguments)
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
    data = recipe.data.model_copy(update={"manifest": str(arguments.folder / "mixture.yaml"), "stories": None})
    recipe = recipe.model_copy(update={"data": data})
    path = arguments.folder / f"run-{stage}"
    folder = RunFolder(path)
    mixture = Mixture(data.manifest, recipe.seq_len, data.packing, data.max_docs)
    folder.begin(recipe, mixture)
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
    """A channel to a stage that is not there: takes what is sent, and makes up what is received."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def send(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def expect(self, like: tuple[torch.Tensor, ...]) -> None:
        """Nothing."""

    def receive(self, like: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Random hidden states or gradients; a layout of one document a row."""
        made = []
        for tensor in like:
            if tensor.is_floating_point():
                made.append(torch.randn_like(tensor))
            else:
                layout = torch.full_like(tensor, self._seq_len)
                layout[:, : self._seq_len] = torch.arange(self._seq_len, device=tensor.device, dtype=tensor.dtype)
                layout[:, self._seq_len] = 0
                made.append(layout)
        return tuple(made)


def _stand_in(engine: Any, recipe: Recipe, max_docs: int) -> None:
    """Put absent neighbours in the place of this stage's."""
    absent = _Absent(recipe.seq_len)
    transfers = engine._transfers
    for name in ("from_previous", "to_previous", "from_next", "to_next"):
        if getattr(transfers, name) is not None:
            setattr(transfers, name, absent)
    rows = recipe.micro_batch_size
    dtype = next(engine.module.parameters()).dtype
    engine.first_output_send = False
    engine.pipe_recv_buf = (
        torch.empty(rows, recipe.seq_len, recipe.model.hidden_size, device=engine.device, dtype=dtype),
        torch.empty(rows, recipe.seq_len + max_docs + 1, device=engine.device, dtype=torch.int32),
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = standalone("measure what each stage of a layout needs of a GPU's memory, on one GPU", EXAMPLES)
    add = found.add_argument
    add("recipe", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    add("-n", "--count", type=count, required=True, metavar="N", help="GPUs of the layout")
    add("-p", "--stages", type=count, default=1, metavar="N", help="pipeline stages of the layout (default: 1)")
    add("--memory", type=float, default=22.5, metavar="GIB", help="what torch may use (default: 22.5, of a 3090)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--serve", type=int, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_intermixed_args()))
