#!/usr/bin/env python3
"""Measure what a step costs beside training: records, guard, polling for stops and commands.

    python tools/bench/overhead.py

One process trains the same model on, in blocks of steps in turn: whole steps, as a run takes them, and bare ones, which
only call the engine. The part of a step that is spent outside of the engine is timed by itself, too: the GPU is idle
then.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from one_rank import make_trainer, parser, recipe_of
    from train_data import untrained

    from megazh.cli import run
    from megazh.cli.options import count
    from megazh.errors import UsageError
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
    from megazh.training.attempt_events import open_metrics

    steps = WARM_UP + 2 * arguments.blocks * arguments.steps
    recipe = untrained(recipe_of(arguments, folder, steps + 1, arguments.device))
    trainer = make_trainer(recipe, folder, 500.0)
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


def options() -> argparse.ArgumentParser:
    """The options."""
    found = parser("measure what a step costs beside training", EXAMPLES, call, micro_batches=8)
    add = found.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device (default: cuda)")
    add("--steps", type=count, default=4, metavar="N", help="steps per block (default: 4)")
    add("--blocks", type=count, default=10, metavar="N", help="blocks of each kind (default: 10)")
    return found


if __name__ == "__main__":
    sys.exit(run(options().parse_args()))
