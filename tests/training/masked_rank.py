"""One rank that trains on conversations and plain text; see `test_masked.py`.

`python masked_rank.py FOLDER MANIFEST`.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pipeline.ladder_rank import SEED, stage_weights
from ranks import join_ranks, save_results
from recipes import make_recipe

from megazh.model.backend import Backend
from megazh.training.recipe import Recipe

STEPS = 2


def recipe_on(manifest: str) -> Recipe:
    """A recipe of eight samples a step."""
    return make_recipe(model={"vocab_size": 1000}, data={"manifest": manifest}, seq_len=32, dtype="fp32")


def train(recipe: Recipe) -> dict[str, Any]:
    """Losses by step as this rank reports them, its count of labels by step, and the weights in the end."""
    from megazh.pipeline.engine import make_engine, quiet
    from megazh.pipeline.module import DecoderPipeline
    from megazh.pipeline.precision import Dtype, Precision
    from megazh.training.feed import training_feed
    from megazh.training.layout import make_layout
    from megazh.training.optimizers.choose import rules
    from megazh.training.stages import work_of

    layout = make_layout(recipe, dist.get_world_size(), 1)
    work = work_of(recipe, layout, Precision(Dtype.FP32, Dtype.FP32, Dtype.FP32), Backend.MASKED)
    with quiet():
        module = DecoderPipeline(work, [0, 4], SEED)
    engine = make_engine(module, recipe.optimizer.name.value, rules(recipe.optimizer), work, 1.0)
    engine.optimizer.learning_rate = 1e-2
    replica = module.mpu().get_data_parallel_rank()
    feed = training_feed(recipe.open_mixture(), layout, replica, 0, 0, recipe.course)
    losses, labels = [], []
    for _ in range(STEPS):
        batches = list(itertools.islice(feed, layout.micro_batches))
        labels.append(sum(int((labels >= 0).sum()) for _, (labels, _) in batches))
        losses.append(float(engine.train_batch(iter(batches))))
    return {"losses": losses, "labels": labels, "weights": stage_weights(module)}


if __name__ == "__main__":
    join_ranks()
    save_results(Path(sys.argv[1]), train(recipe_on(sys.argv[2])))
    dist.barrier()
    dist.destroy_process_group()
