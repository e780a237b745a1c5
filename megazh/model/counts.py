"""Counts that follow from the shape of a model: parameters, FLOPs, logits held at a time. Does not import torch."""

from dataclasses import dataclass

from megazh.model.config import Mlp, ModelConfig, Norm
from megazh.model.lora_config import LoraConfig, pair_parameters, trains_head


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by layer: embedding, block, last norm, head. Rows that pad a matrix do not count."""

    embedding: int
    """Parameters of the embedding."""
    block: int
    """Parameters of one block."""
    blocks: int
    """Number of blocks."""
    norm: int
    """Parameters of the last norm, before the head."""
    head: int
    """Parameters of the head; 0 where it is tied to the embedding."""

    @property
    def total(self) -> int:
        """Parameters of the whole model; a tied matrix counts once."""
        return self.embedding + self.blocks * self.block + self.norm + self.head


def trained_counts(config: ModelConfig, lora: LoraConfig | None = None) -> ParameterCounts:
    """Count the parameters that are trained: all, or with LoRA its pairs and what `train_embed_norm` adds."""
    if lora is None:
        return parameter_counts(config)
    whole = parameter_counts(config) if lora.train_embed_norm else None
    return ParameterCounts(
        embedding=whole.embedding if whole else 0,
        block=pair_parameters(config, lora) + (2 * whole.norm if whole else 0),
        blocks=config.num_hidden_layers,
        norm=whole.norm if whole else 0,
        head=0,
    )


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model of this shape, without low-rank pairs."""
    norm = config.hidden_size * (2 if config.norm is Norm.LAYERNORM else 1)
    qkv_width = config.attention_width + 2 * config.kv_heads * config.head_size
    bias = qkv_width if config.qkv_bias else 0
    table = config.vocab_size * config.hidden_size
    return ParameterCounts(
        embedding=table,
        block=block_matrix(config) + bias + 2 * norm,
        blocks=config.num_hidden_layers,
        norm=norm,
        head=0 if config.tie_word_embeddings else table,
    )


def block_matrix(config: ModelConfig) -> int:
    """Parameters of the weight matrices of one block, without norms and biases."""
    qkv_width = config.attention_width + 2 * config.kv_heads * config.head_size
    branches = 3 if config.mlp is Mlp.SWIGLU else 2
    attention = config.hidden_size * (qkv_width + config.attention_width)
    return attention + branches * config.hidden_size * config.intermediate_size


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of a training step, forward and backward, by layer.

    A matrix of n parameters takes 2n forward, 2n for the gradient of its input and 2n for its own, which a frozen one
    does not have. Causal attention over T tokens takes
    2 * 2 * width * T / 2 forward and twice that backward: 6 * width * T. Within groups, T is the mean length of the
    group of a token. Norms, rotation, the embedding look-up and recomputed activations count as zero.
    """

    embedding: float
    """Operations of the embedding."""
    block: float
    """Operations of one block."""
    head: float
    """Operations of the head."""
    blocks: int
    """Number of blocks."""
    block_forward: float
    """Operations of the forward pass of one block."""

    @property
    def total(self) -> float:
        """Operations of the whole model per token."""
        return self.embedding + self.blocks * self.block + self.head


def flops_per_token(
    config: ModelConfig, seq_len: int, group: int | None = None, lora: LoraConfig | None = None
) -> Flops:
    """Training operations per token of a causal sequence of `seq_len` tokens; MFU is computed from them.

    Args:
        config: the model's shape.
        seq_len: tokens of the sequence, which is one document.
        group: tokens per group of shifted sparse attention; None: full attention.
        lora: LoRA; None where all weights are trained.
    """
    attention = 2.0 * config.attention_width * _group_length(seq_len, group)
    pairs = 0 if lora is None else pair_parameters(config, lora)
    products = 4.0 if lora is not None and not trains_head(config, lora) else 6.0
    return Flops(
        embedding=0.0,
        block=(6.0 if lora is None else 4.0) * block_matrix(config) + 6.0 * pairs + 3 * attention,
        head=products * config.vocab_size * config.hidden_size,
        blocks=config.num_hidden_layers,
        block_forward=2.0 * (block_matrix(config) + pairs) + attention,
    )


def _group_length(seq_len: int, group: int | None) -> float:
    """Mean over tokens and heads of the length of a token's group; see `megazh.model.shifted_groups`."""
    if group is None or seq_len <= group:
        return seq_len
    half = group // 2
    shifted = half * half + _squares(seq_len - half, group)
    return (_squares(seq_len, group) + shifted) / 2 / seq_len


def _squares(tokens: int, group: int) -> int:
    """Sum of the squared lengths of the groups of this many tokens, of which the last may be shorter."""
    return tokens // group * group**2 + (tokens % group) ** 2


_CHUNK_LOGITS = 1 << 27
"""Logits held at a time without kernels: 512 MiB in fp32."""
_FUSED_CHUNK_LOGITS = 1 << 30
"""Logits held at a time with Triton kernels: 2 GiB in bf16, since matrix products are faster with many rows."""


def chunk_tokens(vocab_size: int, fused: bool = False) -> int:
    """Tokens whose logits `megazh.model.loss` holds at a time.

    Args:
        vocab_size: rows of the head's matrix, padding included.
        fused: whether Triton kernels compute the loss.
    """
    if fused:
        return max(256, _FUSED_CHUNK_LOGITS // vocab_size // 256 * 256)
    return max(64, _CHUNK_LOGITS // vocab_size // 64 * 64)
