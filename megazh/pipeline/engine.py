"""DeepSpeed's pipeline engine, set up so that its results are those of a single process."""

import contextlib
import io
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import WorkerError
from megazh.pipeline.deepspeed_config import deepspeed_config
from megazh.pipeline.module import DecoderPipeline
from megazh.pipeline.parameters import NamedParameter, named_parameters
from megazh.pipeline.sharded_optimizer import ShardedOptimizer
from megazh.pipeline.stage_engine import StageEngine, initialize
from megazh.pipeline.update_rule import UpdateRule
from megazh.pipeline.work import Work

RuleOf = Callable[[NamedParameter], tuple[UpdateRule, float]]
"""Update rule and weight decay of a parameter. Parameters with the same rule object share flat tensors."""


def make_engine(module: DecoderPipeline, name: str, rule_of: RuleOf, work: Work, max_grad_norm: float) -> StageEngine:
    """Make the engine of this rank. Every rank calls it with the same numbers.

    Args:
        module: this rank's stage.
        name: the recipe's name of the optimizer.
        rule_of: update rule and weight decay of each parameter that is trained.
        work: the step's shapes and dtypes.
        max_grad_norm: the norm that gradients are clipped to; 0 turns clipping off.
    """

    def make_optimizer(module: DecoderPipeline, grid: Any) -> ShardedOptimizer:
        replicas = grid.get_data_parallel_group() if work.replicas > 1 else None
        communication = work.precision.communication.torch
        tied = dict(module.get_tied_weights_and_groups())
        return ShardedOptimizer(name, named_parameters(module), rule_of, replicas, communication, max_grad_norm, tied)

    with quiet():
        return initialize(module, make_optimizer, deepspeed_config(work, max_grad_norm))


def use_no_compiled_operators() -> None:
    """Keep DeepSpeed in this process from compiling; call it before `deepspeed.init_distributed`.

    On the CPU DeepSpeed would build an all-reduce of its own at its first start: minutes with g++, an error without
    it, and a lock that makes every later start hang where the first one was killed. Without it, gloo does the work.
    On GPUs this spares the search for a CUDA toolkit, and its warnings.

    DeepSpeed also imports its Muon to see whether an optimizer is one, and torch prepares to compile that at its
    import, for seconds. megazh's optimizers never are: empty stand-ins answer the question.
    """
    import deepspeed.ops

    # The table of operators that can be built. DeepSpeed fills it at its first use, and then takes it as it is.
    deepspeed.ops.__compatible_ops__ = {}
    stand_ins = {
        "muon_optimizer.MuonWithAuxAdam": type("Muon", (torch.optim.Optimizer,), {}),
        "original_muon.muon_update": None,
    }
    for name, stand_in in stand_ins.items():
        module, _, attribute = name.partition(".")
        sys.modules[f"deepspeed.runtime.zero.muon.{module}"] = made = types.ModuleType(module)
        setattr(made, attribute, stand_in)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's own output off the terminal: it prints, and logs at several levels."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(before, logging.WARNING))


def check_tied(module: DecoderPipeline) -> None:
    """Compare the copies of the tied embedding on the first and last stage. All ranks call it.

    Raises:
        WorkerError: the copies differ; names both checksums.
    """
    if module.num_stages == 1 or not module.config.tie_word_embeddings:
        return
    weight = module.tied_weight()
    mine = torch.zeros(2, dtype=torch.int64, device=next(module.parameters()).device)
    if weight is not None:
        # Sums of the bits as integers: the same on every card, whatever the order of addition.
        bits = weight.detach().view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
        sums_of_rows = bits.sum(1, dtype=torch.int64)
        rows = torch.arange(1, len(bits) + 1, device=bits.device)
        mine = torch.stack((sums_of_rows.sum(), (sums_of_rows * rows).sum()))
    sums = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, mine)
    grid = module.mpu()
    holders = [
        rank for rank in range(len(sums)) if module.topology().get_coord(rank).pipe in (0, grid.pipe_parallel_size - 1)
    ]
    for rank in holders[1:]:
        if not torch.equal(sums[rank], sums[holders[0]]):
            raise WorkerError(
                f"the tied embedding differs between rank {holders[0]} (checksum {sums[holders[0]].tolist()}) and rank "
                f"{rank} ({sums[rank].tolist()}): training is stopped; resume from the last checkpoint"
            )
