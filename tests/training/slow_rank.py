"""One of two ranks that train, one of them slowed on purpose or none; see `test_slow_ranks.py`.

`python slow_rank.py FOLDER MANIFEST`.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import join_ranks, save_results
from recipes import TINY_RUN, make_recipe

from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training import slow_ranks
from megazh.training.control import Control
from megazh.training.layout import make_layout

SLOWED = 1
"""The rank that is slowed."""


def slowed(call: Callable[..., Any], begin: int) -> Callable[..., Any]:
    """A function that takes five times as long from some call on."""
    calls = itertools.count()

    def slow(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments, **options)
        if next(calls) >= begin:
            time.sleep(4 * (time.perf_counter() - begun) + 0.002)
        return result

    return slow


def train(folder: Path, manifest: str, engine: type, stages: int, steps: int, slow_from: int | None) -> list[Any]:
    """Train two ranks; returns the events about slow ranks, as (step, name, rank, text)."""
    recipe = make_recipe(
        **{**TINY_RUN, "data": {"manifest": manifest}, "num_gpus": 2, "pipe_parallel_size": stages, "steps": steps},
        checkpoint_every=0, slow_ranks_every=4,
        zero_stage=int(engine.engine_name == "ds_pp"),  # type: ignore[attr-defined]
    )  # fmt: skip
    run = RunFolder(folder)
    if dist.get_rank() == 0:
        run.begin(recipe.to_yaml(), recipe.open_mixture(), engine=engine.engine_name)  # type: ignore[attr-defined]
    dist.barrier()
    session = engine(run, recipe, make_layout(recipe, 2, stages), torch.device("cpu"), Control())
    if slow_from is not None and dist.get_rank() == SLOWED:
        module = session.engine.module if hasattr(session, "engine") else session._model
        module.forward = slowed(module.forward, slow_from)
    session.run()
    dist.barrier()
    records = [record for record in read_metrics(folder) if record["kind"] == "event"]
    return [
        [record["step"], record["name"], record["details"].get("rank"), record["text"]]
        for record in records
        if record["name"].startswith("slow_rank")
    ]


if __name__ == "__main__":
    # Other programs may slow a rank of some milliseconds a step by 10 % three times in a row. The slowed one takes five
    # times as long. The limit itself has tests without a clock.
    slow_ranks.SLOWER = 1.0
    join_ranks()
    from megazh.training.hf.loop import HfRun
    from megazh.training.loop import Trainer

    where, stories = Path(sys.argv[1]), sys.argv[2]
    save_results(
        where,
        {
            "even": train(where / "even", stories, Trainer, 1, 24, None),
            "replicas": train(where / "replicas", stories, Trainer, 1, 20, 0),
            # Of four micro-batches a step; slow from step 25 on, five comparisons after the first one.
            "stages": train(where / "stages", stories, Trainer, 2, 40, 4 * 24),
            "hf": train(where / "hf", stories, HfRun, 1, 20, 0),
        },
    )
    dist.barrier()
    dist.destroy_process_group()
