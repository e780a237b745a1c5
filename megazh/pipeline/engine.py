"""DeepSpeed's pipeline engine, set up so that its results are those of a single process."""

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megazh.errors import WorkerError
from megazh.pipeline.module import DecoderPipeline
from megazh.pipeline.precision import Precision
from megazh.pipeline.stage_engine import initialize

_REDUCE_ELEMENTS = 50_000_000
"""DeepSpeed's default of 5e8 is allocated anew in every step: 2 GB in fp32."""


def make_engine(
    module: DecoderPipeline,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    micro_batches: int,
    replicas: int,
    precision: Precision,
    grad_accum_dtype: Precision,
    communication_dtype: Precision,
    max_grad_norm: float,
    zero_stage: int = 1,
) -> Any:
    """The engine of this rank. Every rank calls it with the same numbers.

    Args:
        module: this rank's stage.
        optimizer: over its parameters.
        micro_batch_size: samples a micro-batch.
        micro_batches: a step and replica.
        replicas: data-parallel ones.
        grad_accum_dtype: of the sum over micro-batches.
        communication_dtype: of the sum over replicas.
        max_grad_norm: the gradient is scaled down to this norm; 0 does not clip.
        zero_stage: 1 shares the optimizer state out among the replicas.

    Returns:
        A `StageEngine`, a `deepspeed.runtime.pipe.engine.PipelineEngine`.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * replicas,
        "steps_per_print": 1 << 60,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": _REDUCE_ELEMENTS,
            "allgather_bucket_size": _REDUCE_ELEMENTS,
        },
        "data_types": {"grad_accum_dtype": grad_accum_dtype.value},
        "communication_data_type": communication_dtype.value,
        "pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 0},
    }
    if precision is Precision.BF16:
        settings["bf16"] = {"enabled": True}
    elif precision is Precision.FP16:
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16}
    with quiet():
        return initialize(module, optimizer, settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's chatter off the terminal: it prints, and logs at several levels."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(before, logging.WARNING))


def check_tied(module: DecoderPipeline) -> None:
    """Compare the copies of the tied embedding on first and last stage; call it on all ranks.

    Raises:
        WorkerError: they differ. Names both checksums.
    """
    if module.num_stages == 1 or not module.config.tie_word_embeddings:
        return
    weight = module.tied_weight()
    mine = torch.zeros(2, dtype=torch.int64, device=next(module.parameters()).device)
    if weight is not None:
        # Sums of the bits as whole numbers: the same on every card, whatever order it adds in.
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
