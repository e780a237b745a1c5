"""GPU memory that a stage needs, by component, from shapes and dtypes alone."""

from dataclasses import dataclass, replace

from megazh.model.config import Mlp, ModelConfig
from megazh.model.counts import ParameterCounts, block_matrix, chunk_tokens, parameter_counts, trained_counts
from megazh.model.lora_config import LoraConfig, pair_parameters, places, trains_head
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
    """Gradient copies of the data-parallel reduction, or temporaries of the update, whichever is larger; not alive
    together with activations and head."""

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
    work = _as_stored(work)
    config, precision = work.model, work.precision
    last = config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    has_embedding, has_head = begin == 0, end == last + 1
    parameters = stage_parameters(config, begin, end, work.lora)
    trained = trained_parameters(config, begin, end, work.lora)
    size = precision.compute.bytes
    hidden = work.tokens * config.hidden_size * size
    in_flight = min(work.stages - stage, work.micro_batches)
    if work.defers_weight_gradients and work.fused:
        in_flight = kept_micro_batches(stage, work.stages, work.micro_batches)
    kept = work.tokens * block_activations(config, size, work.fused, work.lora)
    # Received hidden states of the micro-batches in flight, and one tensor that is being received.
    travelling = (in_flight + 1) * hidden if stage > 0 else 0
    activations = in_flight * blocks * (hidden if work.activation_checkpointing else kept) + travelling
    if work.activation_checkpointing and blocks:
        activations += kept
    activations += in_flight * has_embedding * hidden + has_head * 3 * hidden
    # Without kernels, autograd holds a micro-batch's gradients until they are added to the sums.
    gradient_bytes = 4 if work.fused else 4 + size
    return StageMemory(
        weights=parameters * size,
        gradients=trained * gradient_bytes,
        optimizer=_optimizer_bytes(work, begin, end) / work.replicas,
        activations=activations,
        head=_head_memory(work, stage) if has_head else 0,
        reduction=max(_reduction_memory(work, trained), _update_memory(work, begin, end)),
    )


def checkpoint_bytes(work: Work) -> float:
    """Bytes of a checkpoint: weights, masters where the model does not compute in fp32, and optimizer state."""
    last = work.model.num_hidden_layers + 2
    parameters = stage_parameters(work.model, 0, last, work.lora)
    return work.precision.compute.bytes * parameters + _optimizer_bytes(work, 0, last)


def _optimizer_bytes(work: Work, begin: int, end: int) -> float:
    """Bytes of masters and optimizer state of parts `begin` up to `end`, over all replicas together."""
    master = 4 if work.precision.compute is not Dtype.FP32 else 0  # fp32 weights are their own masters
    parameters, matrices = trained_parameters(work.model, begin, end, work.lora), _matrices(work, begin, end)
    return (master + work.optimizer.other) * (parameters - matrices) + (master + work.optimizer.matrix) * matrices


def _update_memory(work: Work, begin: int, end: int) -> float:
    """Bytes that the update of a shard needs besides the state."""
    return work.optimizer.update * _matrices(work, begin, end) / work.replicas


def _matrices(work: Work, begin: int, end: int) -> int:
    """Parameters of the trained 2-D weights of the blocks among parts `begin` up to `end`."""
    blocks = max(0, min(end, work.model.num_hidden_layers + 1) - max(begin, 1))
    return blocks * (block_matrix(work.model) if work.lora is None else pair_parameters(work.model, work.lora))


def _head_memory(work: Work, stage: int) -> float:
    """Bytes of logits, their gradient, and the gradient of the head's matrix where it is not accumulated in place."""
    config, size = work.model, work.precision.compute.bytes
    chunk = min(work.tokens, chunk_tokens(config.vocab_size, work.fused)) * config.vocab_size
    # With kernels the gradient overwrites the logits; else logits, a temporary and the rounded gradient are alive.
    logits = chunk * (size if work.fused else 8 + size)
    if work.defers_weight_gradients and (work.lora is None or trains_head(config, work.lora)):
        waiting = min(1 + weight_passes_deferred(stage), work.micro_batches) * work.tokens * config.vocab_size * size
        logits = max(logits, waiting if work.fused else waiting + chunk * 8)
    return logits


def _reduction_memory(work: Work, parameters: int) -> float:
    precision = work.precision
    if work.replicas == 1:
        return 0
    bucket = min(parameters, REDUCE_BUCKET_ELEMENTS)
    if precision.communication is precision.accumulation:
        return 0
    return bucket * precision.communication.bytes * (1 + 1 / work.replicas)


def _as_stored(work: Work) -> Work:
    """The same work with all rows of embedding and head that are stored, those that pad them included."""
    return replace(work, model=work.model.model_copy(update={"vocab_size": work.model.padded_vocab_size}))


def stage_parameters(config: ModelConfig, begin: int, end: int, lora: LoraConfig | None = None) -> int:
    """Parameters of a stage that holds parts `begin` up to `end`; a tied matrix counts on each stage with a copy."""
    found, pairs = _in_stage(config, parameter_counts(config), begin, end), 0
    if lora is not None:
        pairs = max(0, min(end, config.num_hidden_layers + 1) - max(begin, 1)) * pair_parameters(config, lora)
    return found + pairs


def trained_parameters(config: ModelConfig, begin: int, end: int, lora: LoraConfig | None = None) -> int:
    """Those of them that are trained."""
    return _in_stage(config, trained_counts(config, lora), begin, end, lora is None)


def _in_stage(config: ModelConfig, counts: ParameterCounts, begin: int, end: int, with_head: bool = True) -> int:
    last = config.num_hidden_layers + 1
    blocks = max(0, min(end, last) - max(begin, 1))
    first, final = begin == 0, end == last + 1 and (with_head or config.tie_word_embeddings)
    tables = first + final - (first and final and config.tie_word_embeddings)
    return tables * counts.embedding + blocks * counts.block + (end == last + 1) * counts.norm


def block_activations(config: ModelConfig, size: int, fused: bool, lora: LoraConfig | None = None) -> float:
    """Bytes per token that a block keeps for its backward pass.

    Inputs of two norms and of four products, all of q, k and v, and the row sums of attention and norms; for SwiGLU
    gate, up and their product. Without kernels also rotated q and k, and the activated gate. With LoRA, the input of a
    product only where a pair is trained on it.

    Args:
        config: the model's shape.
        size: bytes per number of activations.
        fused: whether blocks run on Triton kernels.
        lora: LoRA; None where all weights are trained.
    """
    width, kv_width = config.attention_width, config.kv_heads * config.head_size
    attention = (width + 2 * kv_width) + width + (0 if fused else width + kv_width)
    mlp = ((3 if fused else 4) if config.mlp is Mlp.SWIGLU else 2) * config.intermediate_size
    kept = size * (4 * config.hidden_size + attention + mlp) + 4 * (config.num_attention_heads + 2)
    return kept if lora is None else kept + _difference(config, size, fused, lora)


def _difference(config: ModelConfig, size: int, fused: bool, lora: LoraConfig) -> float:
    """Bytes per token that a block keeps more with LoRA than where all of its weights are trained."""
    widths = {
        "attention.qkv_proj": config.hidden_size,
        "mlp.up_proj": config.hidden_size,
        "mlp.down_proj": config.intermediate_size,
    }
    found = places(config, lora)
    trained = set() if lora.dropout else {place.product for place in found}
    more = -size * sum(width for product, width in widths.items() if product not in trained)
    if not fused:  # inputs of B
        more += size * lora.rank * len(found)
    if lora.dropout:  # each pair has an input of its own, and its mask
        more += (size + 1) * sum(place.inputs for place in found)
    return more
