"""What a stage needs of a GPU's memory, by part, from its shape alone."""

from dataclasses import dataclass

from megazh.model.config import Mlp, ModelConfig
from megazh.model.counts import parameter_counts
from megazh.model.loss import chunk_tokens
from megazh.pipeline.passes import kept_micro_batches, weights_left
from megazh.pipeline.precision import Precision, sums_in_place

_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2}
_REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed flattens gradients before it sums them over replicas, so many at a time."""
BUCKET_ELEMENTS = 50_000_000
"""Gradients summed over replicas at a time by megazh's own engine, where they travel in another dtype."""


@dataclass(frozen=True)
class Work:
    """What all stages of a run have in common."""

    stages: int
    replicas: int
    seq_len: int
    micro_batch_size: int
    micro_batches: int
    """A step and replica."""
    precision: Precision
    accumulated: Precision
    """What gradients of micro-batches are summed in."""
    communicated: Precision
    """What gradients of replicas are summed in."""
    checkpointing: bool
    fused: bool
    """Whether blocks and loss run with Triton's kernels."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.seq_len * self.micro_batch_size

    @property
    def in_place(self) -> bool:
        """Whether gradients are added where they are summed (`megazh.pipeline.stage_engine`)."""
        return sums_in_place(self.precision, self.accumulated)

    @property
    def postpones(self) -> bool:
        """Whether gradients of weights wait (`megazh.model.main_grad`), and what they are made of with them."""
        return self.in_place and self.stages > 1 and not self.checkpointing


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the fullest moment of a step; what the CUDA context and NCCL take (about 1 GiB) comes on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Logits, and gradients of the head that are not summed in place."""
    reduction: float
    """Copies of gradients while they are summed over replicas; not at the same time as activations and head."""

    @property
    def total(self) -> float:
        """The largest sum that is needed at one time."""
        steady = self.weights + self.gradients + self.optimizer
        return steady + max(self.activations + self.head, self.reduction)


def stage_memory(config: ModelConfig, work: Work, stage: int, begin: int, end: int) -> StageMemory:
    """The memory of stage number `stage` that holds the parts `begin` to `end` (embedding 0, blocks, head last)."""
    last = config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    has_embedding, has_head = begin == 0, end == last + 1
    parameters = stage_parameters(config, begin, end)
    size, sum_size = _BYTES[work.precision], _BYTES[work.accumulated]
    hidden = work.tokens * config.hidden_size * size
    in_flight = min(work.stages - stage, work.micro_batches)
    if work.postpones and work.fused:
        in_flight = kept_micro_batches(stage, work.stages, work.micro_batches)
    kept = work.tokens * block_activations(config, size, work.fused)
    # Received and to be sent back; with megazh's engine one more is on its way.
    travelling = (2 * in_flight if not work.in_place else in_flight + 1) * hidden if stage > 0 else 0
    activations = in_flight * blocks * (hidden if work.checkpointing else kept) + travelling
    if work.checkpointing and blocks:
        activations += kept
    activations += in_flight * has_embedding * hidden + has_head * 3 * hidden
    # Without kernels autograd holds a micro-batch's gradients until they are added to the sums.
    one = work.precision is work.accumulated or (work.in_place and work.fused)
    gradients = sum_size if one else size + sum_size
    return StageMemory(
        weights=parameters * size,
        gradients=parameters * gradients,
        optimizer=12 * parameters / work.replicas,
        activations=activations,
        head=_head_memory(config, work, stage) if has_head else 0,
        reduction=_reduction_memory(work, parameters),
    )


def _head_memory(config: ModelConfig, work: Work, stage: int) -> float:
    """Logits, their gradient, and the gradient of the head's matrix where it is not summed in place."""
    size, table = _BYTES[work.precision], parameter_counts(config).embedding
    chunk = min(work.tokens, chunk_tokens(config.vocab_size, work.fused)) * config.vocab_size
    # With kernels the gradient is written over the logits; else logits, a temporary and the rounded gradient.
    logits = chunk * (size if work.fused else 8 + size)
    if work.postpones:
        waiting = min(1 + weights_left(stage), work.micro_batches) * work.tokens * config.vocab_size * size
        logits = max(logits, waiting if work.fused else waiting + chunk * 8)
    return logits if work.in_place else logits + table * (4 + size)


def _reduction_memory(work: Work, parameters: int) -> float:
    if work.replicas == 1:
        return 0
    if not work.in_place:
        return min(parameters, _REDUCE_ELEMENTS) * _BYTES[work.accumulated]
    if work.communicated is work.accumulated:
        return 0
    return min(parameters, BUCKET_ELEMENTS) * _BYTES[work.communicated] * (1 + 1 / work.replicas)


def stage_parameters(config: ModelConfig, begin: int, end: int) -> int:
    """Parameters of a stage that holds the parts `begin` to `end`; a tied matrix counts where there is a copy."""
    counts, last = parameter_counts(config), config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    first, final = begin == 0, end == last + 1
    tables = first + final - (first and final and config.tie_word_embeddings)
    return tables * counts.embedding + blocks * counts.block + final * counts.norm


def block_activations(config: ModelConfig, size: int, fused: bool) -> float:
    """Bytes a token that a block keeps for its backward pass.

    Inputs of two norms and of four products, the whole of q, k and v, and the row sums of attention and norms; for
    SwiGLU gate and up, and their product. Without kernels also rotated q and k, and the activated gate.
    """
    width, kv_width = config.attention_width, config.kv_heads * config.head_size
    attention = (width + 2 * kv_width) + width + (0 if fused else width + kv_width)
    mlp = ((3 if fused else 4) if config.mlp is Mlp.SWIGLU else 2) * config.intermediate_size
    return size * (4 * config.hidden_size + attention + mlp) + 4 * (config.num_attention_heads + 2)
