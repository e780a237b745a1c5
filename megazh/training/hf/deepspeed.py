"""The DeepSpeed configuration of `-t hf`: ZeRO-1 or 2 where there are several ranks. Starts without torch."""

from typing import Any

from megazh.pipeline.precision import Dtype, Precision
from megazh.training.layout import Layout
from megazh.training.recipe import Recipe


def zero_config(recipe: Recipe, layout: Layout, precision: Precision) -> dict[str, Any] | None:
    """What DeepSpeed gets from the Trainer; None where nothing is sharded: with `zero_stage` 0, and on one rank."""
    if not recipe.parallel.zero_stage or layout.ranks == 1:
        return None
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.micro_batches,
        "train_batch_size": layout.micro_batch_size * layout.micro_batches * layout.replicas,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "steps_per_print": 1 << 60,
        "bf16": {"enabled": precision.compute is Dtype.BF16},
        "data_types": {"grad_accum_dtype": precision.accumulation.value},
        "communication_data_type": precision.communication.value,
        "zero_optimization": {"stage": recipe.parallel.zero_stage},
    }
