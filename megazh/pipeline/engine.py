"""DeepSpeed's pipeline engine, set up so that its results are those of a single process."""

import contextlib
import io
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import WorkerError
from megazh.pipeline.module import DecoderPipeline
from megazh.pipeline.precision import Dtype
from megazh.pipeline.stage_engine import StageEngine, initialize
from megazh.pipeline.tuning import REDUCE_BUCKET_ELEMENTS
from megazh.pipeline.work import Work


def make_engine(
    module: DecoderPipeline, optimizer: torch.optim.Optimizer, work: Work, max_grad_norm: float, zero_stage: int = 1
) -> StageEngine:
    """Make the engine of this rank. Every rank calls it with the same numbers.

    Args:
        module: this rank's stage.
        optimizer: an optimizer over the module's parameters.
        work: the step's shapes and dtypes.
        max_grad_norm: the norm that gradients are clipped to; 0 turns clipping off.
        zero_stage: 1 shards the optimizer state over the replicas, 0 does not.
    """
    precision = work.precision
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": work.micro_batch_size,
        "gradient_accumulation_steps": work.micro_batches,
        "train_batch_size": work.micro_batch_size * work.micro_batches * work.replicas,
        "steps_per_print": 1 << 60,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
        },
        "data_types": {"grad_accum_dtype": precision.accumulation.value},
        "communication_data_type": precision.communication.value,
        "pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 0},
    }
    if precision.compute is Dtype.BF16:
        settings["bf16"] = {"enabled": True}
    elif precision.compute is Dtype.FP16:
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16}
    with quiet():
        return initialize(module, optimizer, settings)


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
