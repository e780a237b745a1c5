"""One rank that agrees on bounds, each with another clock; see `test_cut.py`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import tell
from recipes import make_recipe

from megazh.model.backend import Backend
from megazh.pipeline.costs import LayerCosts
from megazh.training import cut
from megazh.training.layout import make_layout
from megazh.training.recipe import Device
from megazh.training.stages import work_of

RECIPE = make_recipe(model={"num_hidden_layers": 6}, stage_costs="measured", dtype="fp32")
RANKS = 3


def clock(rank: int) -> LayerCosts:
    """Layer times that this rank measures: on the first rank heads are slow, on the others embeddings."""
    slow, fast = (1.0, 9.0) if rank else (9.0, 1.0)
    return LayerCosts(unit="seconds", embedding=fast, block=2.0, head=slow)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    cut.layer_seconds = lambda *_: clock(int(os.environ["RANK"]))
    layout = make_layout(RECIPE, RANKS, RANKS)
    work = work_of(RECIPE, layout, RECIPE.precision.on(Device.CPU), Backend.MASKED)
    found = cut.agree_on_bounds(RECIPE, work, torch.device("cpu"))
    tell(Path(sys.argv[1]), {"bounds": found})
    dist.barrier()
    dist.destroy_process_group()
