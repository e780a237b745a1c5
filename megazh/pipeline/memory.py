"""GPU memory that a stage needs, by component, from shapes and dtypes alone."""

from dataclasses import dataclass

from megazh.model.config import Mlp, ModelConfig
from megazh.model.counts import chunk_tokens, parameter_counts
from megazh.pipeline.passes import kept_micro_batches, weight_passes_deferred
from megazh.pipeline.precision import Dtype
from megazh.pipeline.tuning import REDUCE_BUCKET_ELEMENTS
from megazh.pipeline.work import Work


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the peak of a step. The CUDA context and NCCL (about 1 GiB) come on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Logits, and head gradients that are not accumulated in place."""
    reduction: float
    """Gradient copies of the data-parallel reduction; not alive together with activations and head."""

    @property
    def total(self) -> float:
        """Largest sum that is alive at one time."""
        steady = self.weights + self.gradients + self.optimizer
        return steady + max(self.activations + self.head, self.reduction)


def stage_memory(work: Work, stage: int, begin: int, end: int) -> StageMemory:
    """Memory of one stage.

    Args:
        work: the step's shapes and dtypes.
        stage: number of the stage, from 0.
        begin: its first part (embedding 0, blocks 1 to L, head L + 1).
        end: the part behind its last.
    """
    config, precision = work.model, work.precision
    last = config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    has_embedding, has_head = begin == 0, end == last + 1
    parameters = stage_parameters(config, begin, end)
    size = precision.compute.bytes
    hidden = work.tokens * config.hidden_size * size
    in_flight = min(work.stages - stage, work.micro_batches)
    if work.defers_weight_gradients and work.fused:
        in_flight = kept_micro_batches(stage, work.stages, work.micro_batches)
    kept = work.tokens * block_activations(config, size, work.fused)
    # Received hidden states of the micro-batches in flight. DeepSpeed's own paths keep a gradient buffer for each of
    # them; where sums are in place, there is only one further tensor that is being received.
    travelling = (2 * in_flight if not precision.sums_in_place else in_flight + 1) * hidden if stage > 0 else 0
    activations = in_flight * blocks * (hidden if work.activation_checkpointing else kept) + travelling
    if work.activation_checkpointing and blocks:
        activations += kept
    activations += in_flight * has_embedding * hidden + has_head * 3 * hidden
    # Without kernels, autograd holds a micro-batch's gradients until they are added to the sums.
    single = precision.compute is precision.accumulation or (precision.sums_in_place and work.fused)
    gradient_bytes = precision.accumulation.bytes if single else size + precision.accumulation.bytes
    return StageMemory(
        weights=parameters * size,
        gradients=parameters * gradient_bytes,
        optimizer=_optimizer_memory(work, parameters),
        activations=activations,
        head=_head_memory(work, stage) if has_head else 0,
        reduction=_reduction_memory(work, parameters),
    )


def checkpoint_bytes(work: Work, parameters: int) -> float:
    """Bytes of a checkpoint: the weights, and the optimizer state of all replicas.

    Args:
        work: the step's shapes and dtypes.
        parameters: parameters of all stages, a tied matrix once for each stage with a copy.
    """
    return (work.precision.compute.bytes + _state_bytes(work)) * parameters


def _optimizer_memory(work: Work, parameters: int) -> float:
    """Bytes of optimizer state of one rank: a shard, or all of it where the replicas do not share it."""
    return _state_bytes(work) * parameters / (work.replicas if work.shards_optimizer else 1)


def _state_bytes(work: Work) -> int:
    """Bytes per parameter of Adam's two averages, and of master weights where they are kept beside the weights."""
    return 12 if work.shards_optimizer or work.precision.compute is not Dtype.FP32 else 8


def _head_memory(work: Work, stage: int) -> float:
    """Bytes of logits, their gradient, and the gradient of the head's matrix where it is not accumulated in place."""
    config, size = work.model, work.precision.compute.bytes
    table = parameter_counts(config).embedding
    chunk = min(work.tokens, chunk_tokens(config.vocab_size, work.fused)) * config.vocab_size
    # With kernels the gradient overwrites the logits; else logits, a temporary and the rounded gradient are alive.
    logits = chunk * (size if work.fused else 8 + size)
    if work.defers_weight_gradients:
        waiting = min(1 + weight_passes_deferred(stage), work.micro_batches) * work.tokens * config.vocab_size * size
        logits = max(logits, waiting if work.fused else waiting + chunk * 8)
    return logits if work.precision.sums_in_place else logits + table * (4 + size)


def _reduction_memory(work: Work, parameters: int) -> float:
    precision = work.precision
    if work.replicas == 1:
        return 0
    bucket = min(parameters, REDUCE_BUCKET_ELEMENTS)
    if not precision.sums_in_place:
        return bucket * precision.accumulation.bytes
    if precision.communication is precision.accumulation:
        return 0
    return bucket * precision.communication.bytes * (1 + 1 / work.replicas)


def stage_parameters(config: ModelConfig, begin: int, end: int) -> int:
    """Parameters of a stage that holds parts `begin` up to `end`; a tied matrix counts on each stage with a copy."""
    counts, last = parameter_counts(config), config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    first, final = begin == 0, end == last + 1
    tables = first + final - (first and final and config.tie_word_embeddings)
    return tables * counts.embedding + blocks * counts.block + final * counts.norm


def block_activations(config: ModelConfig, size: int, fused: bool) -> float:
    """Bytes per token that a block keeps for its backward pass.

    Inputs of two norms and of four products, all of q, k and v, and the row sums of attention and norms; for SwiGLU
    gate, up and their product. Without kernels also rotated q and k, and the activated gate.

    Args:
        config: the model's shape.
        size: bytes per number of activations.
        fused: whether blocks run on Triton kernels.
    """
    width, kv_width = config.attention_width, config.kv_heads * config.head_size
    attention = (width + 2 * kv_width) + width + (0 if fused else width + kv_width)
    mlp = ((3 if fused else 4) if config.mlp is Mlp.SWIGLU else 2) * config.intermediate_size
    return size * (4 * config.hidden_size + attention + mlp) + 4 * (config.num_attention_heads + 2)
