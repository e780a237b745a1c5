"""The work of one optimizer step: shapes and dtypes that all stages share."""

from dataclasses import dataclass

from megazh.model.backend import Backend
from megazh.model.config import ModelConfig
from megazh.model.lora_config import LoraConfig
from megazh.pipeline.precision import Precision


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state per parameter, without master weights; by default AdamW's two averages in fp32."""

    matrix: float = 8
    """Of a 2-D weight inside of a block."""
    other: float = 8
    """Of embedding, head, norms and biases."""
    update: float = 0
    """Bytes per parameter of a 2-D weight inside of a block that are needed only while a shard is updated."""


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
    optimizer: StateBytes = StateBytes()
    """Bytes of the optimizer's state."""
    attention_group: int | None = None
    """Tokens per group of shifted sparse attention; None: full attention."""
    lora: LoraConfig | None = None
    """LoRA; None where all weights are trained."""
    neftune_alpha: float = 0.0
    """Strength of the noise on embedded tokens (see `megazh.model.embedding_noise`); 0: none."""

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
        """Whether the kernels of a pass can be recorded as a CUDA graph.

        Those of fused blocks never change shape; noise is seeded anew for each sample, which no graph can do.
        """
        return self.fused and not self.neftune_alpha

    @property
    def defers_weight_gradients(self) -> bool:
        """Whether weight gradients, with the tensors they need, wait until input gradients are sent.

        See `megazh.model.main_grad`. Not with recomputation: recomputed activations would have to be kept after all.
        """
        return self.stages > 1 and not self.activation_checkpointing
