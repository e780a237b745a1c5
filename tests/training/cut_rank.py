"""One rank that agrees with others on stage bounds, although they measure other layer times; see `test_cut.py`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import save_results
from recipes import make_recipe

from megazh.model.backend import Backend
from megazh.pipeline.costs import LayerCosts
from megazh.training import cut
from megazh.training.layout import make_layout
from megazh.training.recipe import Device
from megazh.training.stages import work_of

RECIPE = make_recipe(model={"num_hidden_layers": 6}, stage_costs="measured", dtype="fp32")
RANKS = 3


def measured_costs(rank: int) -> LayerCosts:
    """Layer times that a rank measures: on the first rank the head is slow, on the others the embedding."""
    slow, fast = (1.0, 9.0) if rank else (9.0, 1.0)
    return LayerCosts(unit="seconds", embedding=fast, block=2.0, head=slow)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    cut.layer_seconds = lambda *_: measured_costs(int(os.environ["RANK"]))
    layout = make_layout(RECIPE, RANKS, RANKS)
    work = work_of(RECIPE, layout, RECIPE.precision.on(Device.CPU), Backend.MASKED)
    bounds = cut.agree_on_bounds(RECIPE, work, torch.device("cpu"))
    save_results(Path(sys.argv[1]), {"bounds": bounds})
    dist.barrier()
    dist.destroy_process_group()
