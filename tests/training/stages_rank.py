"""One rank that agrees on bounds, each with another clock; see `test_stages.py`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import tell
from recipes import make_recipe

from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.precision import Precision
from megazh.training import stages
from megazh.training.layout import make_layout

RECIPE = make_recipe(model={"num_hidden_layers": 6}, stage_costs="measured")
RANKS = 3


def clock(rank: int) -> LayerCosts:
    """What the card of this rank says: the first finds heads slow, the others embeddings."""
    slow, fast = (1.0, 9.0) if rank else (9.0, 1.0)
    return LayerCosts(unit="seconds", embedding=fast, block=2.0, head=slow)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    stages.layer_seconds = lambda *_: clock(int(os.environ["RANK"]))
    layout = make_layout(RECIPE, RANKS, RANKS)
    found = stages.agree_on_bounds(RECIPE, layout, torch.device("cpu"), Precision.FP32)
    tell(Path(sys.argv[1]), {"bounds": found})
    dist.barrier()
    dist.destroy_process_group()
