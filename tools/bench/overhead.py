#!/usr/bin/env python3
"""Measure what a step costs beside training: records, guard, polling for stops and commands.

    python tools/bench/overhead.py

One process trains the same model on, in blocks of steps in turn: whole steps, as a run takes them, and bare ones, which
only call the engine. The part of a step that is spent outside of the engine is timed by itself, too: the GPU is idle
then.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from train_data import make_mixture, untrained

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import UsageError
    from megazh.run.folder import RunFolder
    from megazh.run.requests import Inbox
    from megazh.training.layout import make_layout
    from megazh.training.recipe import load_recipe
    from megazh.training.recipe_files import recipe_path
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/overhead.py                                     0.5B, one GPU
  python tools/bench/overhead.py --device cpu --recipe demo --set dtype=fp32 --micro-batches 2 --blocks 3

A step is --micro-batches micro-batches and one update of the weights. Each block is --steps steps."""
WARM_UP = 4


def call(arguments: argparse.Namespace) -> None:
    """Measure in this process, as the only rank."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU; give --device cpu")
    with tempfile.TemporaryDirectory(prefix="megazh-overhead-") as name:
        found = measure(arguments, Path(name))
    whole, bare, outside = (statistics.median(found[name]) for name in ("whole", "bare", "outside"))
    pairs = [1 - after / before for before, after in zip(found["whole_blocks"], found["bare_blocks"], strict=True)]
    print(f"{'whole step':<22}{whole * 1e3:>10.2f} ms")
    print(f"{'bare step':<22}{bare * 1e3:>10.2f} ms")
    print(f"{'outside of the engine':<22}{outside * 1e3:>10.3f} ms  {outside / whole:.3%} of a step")
    for name, seconds in found["parts"].items():
        print(f"  {name:<20}{statistics.median(seconds) * 1e3:>10.3f} ms")
    spread = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    print(
        f"{'whole against bare':<22}{statistics.median(pairs):>10.3%}  "
        f"(median of {len(pairs)} pairs of blocks, standard error of their mean {spread:.3%})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of whole and bare steps, and of what lies outside of the engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["DS_ACCELERATOR"] = arguments.device
    from megazh.training.attempt_events import open_metrics
    from megazh.training.control import Control
    from megazh.training.loop import Trainer
    from megazh.training.worker import join

    device = join(arguments.device)
    steps = WARM_UP + 2 * arguments.blocks * arguments.steps
    settings = [
        f"steps={steps + 1}", f"global_batch_size={arguments.micro_batch_size * arguments.micro_batches}",
        f"micro_batch_size={arguments.micro_batch_size}", "pipe_parallel_size=1", "stories=null", "num_gpus=1",
        f"data.manifest={folder / 'mixture.yaml'}", "gradient_accumulation_steps=null", f"device={arguments.device}",
        *arguments.settings,
    ]  # fmt: skip
    recipe = untrained(load_recipe(recipe_path(arguments.recipe), settings))
    make_mixture(folder, (steps + 3) * recipe.course.tokens(0), recipe.model.vocab_size, 500, 0)
    run_folder = RunFolder(folder / "run")
    run_folder.begin(recipe.to_yaml(), recipe.open_mixture())
    Inbox.clear(run_folder)  # so that the run listens to commands
    trainer = Trainer(run_folder, recipe, make_layout(recipe, 1), device, Control())
    engine = trainer.engine
    inside: list[float] = []
    plain = engine.train_batch

    def timed(feed: Any) -> Any:
        begun = time.perf_counter()
        loss = plain(feed)
        float(loss)  # waits for the GPU, as the loop does
        inside.append(time.perf_counter() - begun)
        return loss

    found: dict[str, Any] = {"whole": [], "bare": [], "outside": [], "whole_blocks": [], "bare_blocks": [], "parts": {}}

    def whole() -> None:
        engine.train_batch = timed
        begun = time.perf_counter()
        agreed = trainer.take_step()
        recorded = time.perf_counter()
        trainer.after_step(agreed)
        seconds = time.perf_counter() - begun
        found["whole"].append(seconds)
        found["outside"].append(seconds - inside[-1])
        found["parts"].setdefault("record", []).append(recorded - begun - inside[-1])
        found["parts"].setdefault("after the record", []).append(begun + seconds - recorded)

    def bare() -> None:
        begun = time.perf_counter()
        float(plain(trainer._feed))
        found["bare"].append(time.perf_counter() - begun)

    with open_metrics(trainer) as trainer.metrics:
        for _ in range(WARM_UP):
            trainer.after_step(trainer.take_step())
        for _ in range(arguments.blocks):
            for step, blocks in ((whole, "whole_blocks"), (bare, "bare_blocks")):
                begun = time.perf_counter()
                for _ in range(arguments.steps):
                    step()
                found[blocks].append((time.perf_counter() - begun) / arguments.steps)
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = standalone("measure what a step costs beside training", EXAMPLES)
    add = found.add_argument
    add("--recipe", default="qwen0.5b_6x3090_dp", metavar="NAME", help="model and settings (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device (default: cuda)")
    add("--micro-batch-size", type=count, default=16, metavar="N", help="rows per micro-batch (default: 16)")
    add("--micro-batches", type=count, default=8, metavar="N", help="micro-batches per step (default: 8)")
    add("--steps", type=count, default=4, metavar="N", help="steps per block (default: 4)")
    add("--blocks", type=count, default=10, metavar="N", help="blocks of each kind (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write all times to this file")
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
