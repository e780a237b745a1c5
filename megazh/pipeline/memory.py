"""What a stage needs of a GPU's memory, by part, from its shape alone."""

from dataclasses import dataclass

from megazh.model.config import Mlp, ModelConfig
from megazh.model.counts import parameter_counts
from megazh.model.loss import chunk_tokens
from megazh.pipeline.precision import Precision

_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2}
_REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed flattens gradients before it sums them over replicas, so many at a time (bf16)."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the fullest moment of a step; what the CUDA context and NCCL take (about 1 GiB) comes on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Logits of a chunk, and the gradient of the head's matrix."""
    reduction: float
    """Copies of gradients while they are summed over replicas; not at the same time as activations and head."""

    @property
    def total(self) -> float:
        """The largest sum that is needed at one time."""
        steady = self.weights + self.gradients + self.optimizer
        return steady + max(self.activations + self.head, self.reduction)


def stage_memory(
    config: ModelConfig,
    begin: int,
    end: int,
    stage: int,
    stages: int,
    replicas: int,
    seq_len: int,
    micro_batch_size: int,
    micro_batches: int,
    precision: Precision,
    accumulated: Precision,
    checkpointing: bool,
) -> StageMemory:
    """The memory of a stage that holds the parts `begin` to `end` (embedding 0, blocks, head last)."""
    last = config.num_hidden_layers + 1
    blocks = min(end, last) - max(begin, 1)
    table = parameter_counts(config).embedding
    has_embedding, has_head = begin == 0, end == last + 1
    parameters = stage_parameters(config, begin, end)
    size, sum_size = _BYTES[precision], _BYTES[accumulated]
    tokens = seq_len * micro_batch_size
    hidden = tokens * config.hidden_size * size
    in_flight = min(stages - stage, micro_batches)
    kept = tokens * block_activations(config, size)
    received = 2 * hidden if stage > 0 else 0
    if checkpointing:
        activations = in_flight * (blocks * hidden + received) + (kept if blocks else 0)
    else:
        activations = in_flight * (blocks * kept + received)
    activations += in_flight * has_embedding * hidden + has_head * 3 * hidden
    logits = min(tokens, chunk_tokens(config.vocab_size)) * config.vocab_size
    # fp32 gradient of the matrix, its rounded copy, and of a chunk the logits, a temporary and the rounded gradient.
    head = has_head * (table * (4 + size) + logits * (8 + size))
    return StageMemory(
        weights=parameters * size,
        gradients=parameters * (size + (sum_size if precision is not accumulated else 0)),
        optimizer=12 * parameters / replicas,
        activations=activations,
        head=head,
        reduction=min(parameters, _REDUCE_ELEMENTS) * sum_size if replicas > 1 else 0,
    )


def stage_parameters(config: ModelConfig, begin: int, end: int) -> int:
    """Parameters of a stage that holds the parts `begin` to `end`; a tied matrix counts where there is a copy."""
    counts, last = parameter_counts(config), config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    first, final = begin == 0, end == last + 1
    tables = first + final - (first and final and config.tie_word_embeddings)
    return tables * counts.embedding + blocks * counts.block + final * counts.norm


def block_activations(config: ModelConfig, size: int) -> float:
    """Bytes a token that a block keeps for its backward pass.

    Inputs of two norms and of four products, the whole of q, k and v (v is a part of it), rotated q and k, and the
    row sums of attention; for SwiGLU both branches, the activated gate and their product.
    """
    width, kv_width = config.attention_width, config.kv_heads * config.head_size
    attention = (width + 2 * kv_width) + (width + kv_width) + width
    mlp = (4 if config.mlp is Mlp.SWIGLU else 2) * config.intermediate_size
    return size * (4 * config.hidden_size + attention + mlp) + 4 * (config.num_attention_heads + 2)
