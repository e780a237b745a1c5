"""Parameters and floating-point operations of a model, by kind of layer, from its shape alone."""

from dataclasses import dataclass

from megazh.model.config import Mlp, ModelConfig, Norm


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by kind of layer."""

    embedding: int
    block: int
    """Of one block."""
    blocks: int
    """How many blocks."""
    norm: int
    """The last one, before the head."""
    head: int
    """0 where it is the embedding's matrix."""

    @property
    def total(self) -> int:
        """All parameters, a tied matrix counted once."""
        return self.embedding + self.blocks * self.block + self.norm + self.head


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """The parameters of a model of this shape."""
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
    """Parameters of a block that take part in matrix products."""
    qkv_width = config.attention_width + 2 * config.kv_heads * config.head_size
    branches = 3 if config.mlp is Mlp.SWIGLU else 2
    attention = config.hidden_size * (qkv_width + config.attention_width)
    return attention + branches * config.hidden_size * config.intermediate_size


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token, forward and backward, by kind of layer.

    A matrix of n parameters takes 2n forward and 4n backward. Causal attention over T tokens takes
    2 * 2 * width * T / 2 forward and twice that backward: 6 * width * T. Norms, rotations and the look-up in the
    embedding count as nothing; neither does anything that is computed a second time.
    """

    embedding: float
    block: float
    head: float
    blocks: int

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.embedding + self.blocks * self.block + self.head


def flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """Operations of a training step a token of a sequence of `seq_len`, causal; the count behind MFU."""
    return Flops(
        embedding=0.0,
        block=6.0 * block_matrix(config) + 6.0 * config.attention_width * seq_len,
        head=6.0 * config.vocab_size * config.hidden_size,
        blocks=config.num_hidden_layers,
    )
