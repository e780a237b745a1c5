"""The work of one optimizer step: shapes and dtypes that all stages share."""

from dataclasses import dataclass

from megazh.model.backend import Backend
from megazh.model.config import ModelConfig
from megazh.pipeline.precision import Dtype, Precision


@dataclass(frozen=True)
class Work:
    """What the stages of a run have in common; engine, timing, costs and memory are computed from it."""

    model: ModelConfig
    stages: int
    """Pipeline stages."""
    replicas: int
    """Data-parallel replicas of the pipeline."""
    seq_len: int
    """Tokens per sample."""
    micro_batch_size: int
    """Samples per micro-batch."""
    micro_batches: int
    """Micro-batches per optimizer step and replica (gradient accumulation steps)."""
    precision: Precision
    activation_checkpointing: bool
    """Whether blocks are recomputed in the backward pass instead of keeping their activations."""
    backend: Backend
    """What computes blocks and loss."""
    zero_stage: int = 1
    """ZeRO stage: 1 shards the optimizer state over the replicas."""

    @property
    def shards_optimizer(self) -> bool:
        """Whether replicas share the optimizer state. DeepSpeed's bf16 optimizer always does."""
        return self.zero_stage > 0 or self.precision.compute is Dtype.BF16

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.seq_len * self.micro_batch_size

    @property
    def fused(self) -> bool:
        """Whether blocks and loss run on Triton kernels."""
        return self.backend is Backend.FUSED

    @property
    def recordable(self) -> bool:
        """Whether all kernels of a micro-batch can be recorded as one CUDA graph.

        With one stage only kernels, whose shapes never change, lie between a micro-batch and its gradients.
        """
        return self.fused and self.stages == 1 and self.precision.sums_in_place

    @property
    def defers_weight_gradients(self) -> bool:
        """Whether weight gradients, with the tensors they need, wait until input gradients are sent.

        See `megazh.model.main_grad`. Not with recomputation: recomputed activations would have to be kept after all.
        """
        return self.precision.sums_in_place and self.stages > 1 and not self.activation_checkpointing
