"""The DeepSpeed configuration of a run; starts without torch and DeepSpeed."""

from typing import Any

from megazh.pipeline.precision import Dtype
from megazh.pipeline.work import Work


def deepspeed_config(work: Work, max_grad_norm: float) -> dict[str, Any]:
    """The configuration that DeepSpeed's engine gets.

    Args:
        work: the step's shapes and dtypes.
        max_grad_norm: the norm that gradients are clipped to; 0 turns clipping off. `ShardedOptimizer` clips.
    """
    precision = work.precision
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": work.micro_batch_size,
        "gradient_accumulation_steps": work.micro_batches,
        "train_batch_size": work.micro_batch_size * work.micro_batches * work.replicas,
        "steps_per_print": 1 << 60,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": precision.accumulation.value},
        "communication_data_type": precision.communication.value,
        "pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 0},
    }
    if precision.compute is Dtype.BF16:
        settings["bf16"] = {"enabled": True}
    return settings
