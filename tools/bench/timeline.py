#!/usr/bin/env python3
"""Show what each GPU computes, sends and waits for during one training step.

    python tools/bench/timeline.py --num-gpus 2 --stages 2

Engine and loop are those of a run; the documents are made up, as in `train.py`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from profile_step import group_of
    from train_data import make_mixture

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.cluster.launchers.local import run_ranks
    from megazh.errors import UsageError, WorkerError
    from megazh.run.folder import RunFolder
    from megazh.training.recipe import load_recipe, run_recipe
    from megazh.training.recipe_files import recipe_path
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/timeline.py --num-gpus 2 --stages 2 --plot two_stages.png
  python tools/bench/timeline.py --num-gpus 2 --stages 1 --json replicas.json

Times are those of one step by the profiler's clock on the GPUs. "waits" is time in which a GPU runs no kernel but
those of NCCL; "profiled" is longer than "not profiled" by what the profiler costs."""
WARM_UP, TIMED = 4, 4
COMMUNICATION = "communication"

Event = tuple[float, float, str]
"""Begin and end in ms, and the name of a kernel."""


def call(arguments: argparse.Namespace) -> None:
    """Train on all GPUs, profile one step on each, print the table."""
    if arguments.rank:
        serve(arguments.rank)
        return
    if torch.cuda.device_count() < arguments.num_gpus:
        raise UsageError(f"--num-gpus {arguments.num_gpus}, and torch sees {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="megazh-timeline-") as name:
        folder = Path(name)
        batch = arguments.micro_batch_size * arguments.micro_batches * arguments.num_gpus
        settings = [
            f"seq_len={arguments.seq_len}", f"micro_batch_size={arguments.micro_batch_size}",
            f"steps={WARM_UP + TIMED + 1}", f"global_batch_size={batch}", "gradient_accumulation_steps=null",
            f"num_gpus={arguments.num_gpus}", f"pipe_parallel_size={arguments.stages}", "device=cuda",
            *arguments.settings, f"data.manifest={folder / 'mixture.yaml'}", "stories=null",
        ]  # fmt: skip
        recipe = load_recipe(recipe_path(arguments.recipe), settings)
        make_mixture(folder, (WARM_UP + TIMED + 2) * recipe.course.tokens(0), recipe.model.vocab_size, 500.0, 0)
        path = folder / "run"
        RunFolder(path).begin(recipe.to_yaml(), recipe.open_mixture())
        root = str(Path(__file__).resolve().parents[2])
        env = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        command = [str(Path(__file__).resolve()), "--rank", str(path)]
        code = run_ranks(command, arguments.num_gpus, env, list(range(arguments.num_gpus)), path / "logs")
        if code:
            raise WorkerError(f"the ranks ended with exit code {code}; their output is above")
        ranks = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(arguments.num_gpus)]
    print(
        f"{arguments.recipe} {' '.join(arguments.settings)}: one step of {recipe.course.tokens(0):,} tokens on "
        f"{arguments.num_gpus} x {torch.cuda.get_device_name()}, {arguments.stages} stages: "
        f"{ranks[0]['not_profiled_ms']:.1f} ms not profiled, {ranks[0]['profiled_ms']:.1f} ms profiled"
    )
    begin = min(event[0] for rank in ranks for event in rank["events"])
    for number, rank in enumerate(ranks):
        rank["events"] = [(event[0] - begin, event[1] - begin, event[2]) for event in rank["events"]]
        report(number, rank["events"], arguments.gaps)
    if arguments.json:
        arguments.json.write_text(json.dumps(ranks) + "\n")
    if arguments.plot:
        plot([rank["events"] for rank in ranks], arguments.plot)


def serve(path: Path) -> None:
    """One rank of `call`."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    import torch.distributed as dist

    from megazh.run.metrics import Metrics
    from megazh.training.control import Control
    from megazh.training.layout import make_layout
    from megazh.training.loop import Trainer
    from megazh.training.worker import join, leave

    device = join("cuda")
    folder = RunFolder(path)
    recipe = run_recipe(folder)
    trainer = Trainer(folder, recipe, make_layout(recipe, dist.get_world_size()), device, Control())
    with Metrics(path, 0, quiet=dist.get_rank() != 0) as trainer.metrics:

        def steps(number: int) -> float:
            torch.cuda.synchronize()
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(number):
                trainer.take_step()
            torch.cuda.synchronize()
            return (time.perf_counter() - begun) * 1e3 / number

        steps(WARM_UP)
        found: dict[str, Any] = {"not_profiled_ms": steps(TIMED)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            found["profiled_ms"] = steps(1)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    found["events"] = sorted(
        (event.start_ns() / 1e6, (event.start_ns() + event.duration_ns()) / 1e6, event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    (path / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def waits_of(events: list[Event]) -> list[tuple[float, float, str, str]]:
    """Times in which no kernel of the model runs: begin, end, the kernel before and the kernel behind."""
    found = []
    end, before = events[0][0], "the step's begin"
    for begin, stop, name in events:
        if group_of(name) == COMMUNICATION:
            continue
        if begin > end:
            found.append((end, begin, before, name))
        if stop > end:
            end, before = stop, name
    last = max(event[1] for event in events)
    return [*found, (end, last, before, "the step's end")] if last > end else found


def report(rank: int, events: list[Event], count: int) -> None:
    """Print the time of each group of kernels on one GPU, then its longest waits."""
    groups: dict[str, list[float]] = defaultdict(list)
    for begin, end, name in events:
        groups[group_of(name)].append(end - begin)
    waits = waits_of(events)
    waited = sum(end - begin for begin, end, *_ in waits)
    span = max(event[1] for event in events) - events[0][0]
    print(f"GPU {rank}: {span:.1f} ms from the first kernel to the end of the last, waits {waited:.1f} ms")
    for name, times in sorted(groups.items(), key=lambda item: -sum(item[1])):
        print(f"  {name:<26} {len(times):>7} {sum(times):>9.2f} ms {sum(times) / span:>7.1%}")
    longest = sorted(sorted(waits, key=lambda wait: wait[0] - wait[1])[:count])
    print(
        f"  the {len(longest)} longest of {len(waits)} waits, {sum(end - begin for begin, end, *_ in longest):.1f} ms"
    )
    for begin, end, before, behind in longest:
        print(f"  at {begin:>8.2f} ms for {end - begin:>7.3f} ms, after {before[:48]}, before {behind[:48]}")


def plot(ranks: list[list[Event]], path: Path) -> None:
    """Draw two rows for each GPU, kernels of the model and kernels of NCCL, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(16, 1 + len(ranks)), layout="constrained")
    for row, events in enumerate(ranks):
        for communication, color in ((False, "tab:blue"), (True, "tab:orange")):
            spans = [(b, e - b) for b, e, name in events if (group_of(name) == COMMUNICATION) is communication]
            axes.broken_barh(spans, (-row - 0.4 * communication, 0.36), facecolors=color)
    axes.set_yticks([-row + 0.1 for row in range(len(ranks))], [f"GPU {row}" for row in range(len(ranks))])
    axes.set_xlabel("ms; kernels of the model above, of NCCL below")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = standalone("show what each GPU computes, sends and waits for in a training step", EXAMPLES)
    add = found.add_argument
    add("--recipe", default="qwen0.5b_6x3090_dp", metavar="NAME", help="model and settings (default: %(default)s)")
    add("--num-gpus", type=count, default=2, metavar="N", help="default: 2")
    add("--stages", type=count, default=2, metavar="N", help="pipeline stages (default: 2)")
    add("--seq-len", type=count, default=1024, metavar="N", help="tokens per row (default: 1024)")
    add("--micro-batch-size", type=count, default=16, metavar="N", help="rows per micro-batch (default: 16)")
    add("--micro-batches", type=count, default=8, metavar="N", help="micro-batches per GPU and step (default: 8)")
    add("--gaps", type=count, default=12, metavar="N", help="number of waits to list (default: 12)")
    add("--plot", type=Path, metavar="FILE", help="draw the step into this file (.png, .svg)")
    add("--json", type=Path, metavar="FILE", help="write all kernels with their times to this file")
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    add("--rank", type=Path, help=argparse.SUPPRESS)
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
