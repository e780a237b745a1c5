"""One rank of a pipeline on fused blocks, whose weight gradients wait; see `test_fused_stages.py`.

`python fused_rank.py FOLDER STAGES NAME...` trains two steps of each case of `ladder_rank.CASES`.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pipeline.ladder_rank import CASES, feed, make_pipeline
from ranks import join_ranks, save_results

from megazh.model.backend import Backend

STEPS = 2


def train(name: str, stages: int) -> dict[str, Any]:
    """Losses and norms by step; gradients of the first step; deferred products by weight pass of that step."""
    from megazh.model.main_grad import add_postponed
    from megazh.pipeline import stage_engine

    module, engine = make_pipeline(CASES[name], stages, backend=Backend.FUSED)
    gradients, products = {}, []
    reduce_gradients = engine.optimizer.reduce_gradients

    def reduce_and_keep() -> None:
        reduce_gradients()  # which adds the gradients of the two copies of a tied matrix
        for number, layer in enumerate(module.forward_funcs, module._local_start):
            for key, parameter in layer.named_parameters():
                assert hasattr(parameter, "main_grad") == parameter.requires_grad, key
                if parameter.requires_grad:
                    gradients.setdefault(f"{number}.{key}", parameter.main_grad.clone())

    def add_and_count(waiting: Any) -> None:
        products.append(len(waiting))
        add_postponed(waiting)

    engine.optimizer.reduce_gradients, stage_engine.add_postponed = reduce_and_keep, add_and_count
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(float(engine.train_batch(feed(step, 0, 1))))
        norms.append(float(engine.get_global_grad_norm()))
    stage_engine.add_postponed = add_postponed
    blocks = len(module._blocks)
    return {
        "losses": losses, "norms": norms, "gradients": gradients, "products": products, "blocks": blocks,
        "trained_head": module.is_last and module._head.weight.requires_grad,
    }  # fmt: skip


if __name__ == "__main__":
    join_ranks()
    results = {name: train(name, int(sys.argv[2])) for name in sys.argv[3:]}
    save_results(Path(sys.argv[1]), results)
    dist.barrier()
    dist.destroy_process_group()
