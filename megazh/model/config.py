"""Shape of a model: the keys under `model:` in a recipe."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from megazh.config import Config, choice


class Norm(StrEnum):
    """Norms of the hidden state."""

    RMSNORM = "rmsnorm"
    """Root mean square norm with a weight and no bias (arXiv 1910.07467)."""
    LAYERNORM = "layernorm"
    """Norm by mean and variance with a weight and a bias (arXiv 1607.06450)."""


class Mlp(StrEnum):
    """Forms of the MLP in a block."""

    SWIGLU = "swiglu"
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
    GELU = "gelu"
    """down(gelu(up(x))), the exact GELU."""


class RopeScalingMethod(StrEnum):
    """Methods that extend rotary positions beyond the length a model was trained at."""

    LINEAR = "linear"
    """All positions divided by the factor (arXiv 2306.15595)."""
    YARN = "yarn"
    """Low frequencies divided by the factor, high ones kept, attention logits scaled up (arXiv 2309.00071)."""


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

_VOCAB_MULTIPLE = 64
"""Divisor of the rows of embedding and head as they are stored: matrix products with other numbers of rows are slow."""


class RopeScaling(Config):
    """Keys under `rope_scaling:`, named as in Hugging Face configs."""

    type: Annotated[RopeScalingMethod, choice(RopeScalingMethod)]
    """Method of scaling: linear or yarn."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Ratio of the new context length to the original one, at least 1."""
    original_max_position_embeddings: Count | None = None
    """Context length in tokens that the model was trained at. Required by yarn, not used by linear."""
    beta_fast: Positive = 32.0
    """Number of turns over the original length above which yarn keeps a frequency as it is."""
    beta_slow: Positive = 1.0
    """Number of turns over the original length below which yarn divides a frequency by the factor."""
    attention_factor: Positive | None = None
    """Multiplier that yarn applies to the rotated dimensions of queries and keys. Default: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _complete(self) -> "RopeScaling":
        if self.type is RopeScalingMethod.YARN and self.original_max_position_embeddings is None:
            raise ValueError("yarn needs original_max_position_embeddings, the length the model was trained at")
        return self


class ModelConfig(Config):
    """Shape of a decoder-only transformer with a norm before attention and before the MLP."""

    vocab_size: Count
    """Rows of the embedding matrix, at least the number of ids in the tokenizer. Rows that no id uses are never
    sampled. Any number trains at full speed, see `padded_vocab_size`."""
    hidden_size: Count
    """Width of the hidden state, which runs through all blocks."""
    num_hidden_layers: Count
    """Number of transformer blocks."""
    num_attention_heads: Count
    """Number of attention (query) heads per block."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads per block; fewer than num_attention_heads is grouped-query attention
    (arXiv 2305.13245). Default: num_attention_heads."""
    head_dim: Count | None = None
    """Dimensions of each attention head. Default: hidden_size / num_attention_heads."""
    intermediate_size: Count
    """Width of the MLP's inner layer; for swiglu, width of the gate and of the up projection each."""
    norm: Annotated[Norm, choice(Norm)] = Norm.RMSNORM
    """Norm before attention, before the MLP and before the head."""
    norm_eps: Positive = 1e-6
    """Constant that each norm adds to the mean square (rmsnorm) or variance (layernorm) before the square root."""
    mlp: Annotated[Mlp, choice(Mlp)] = Mlp.SWIGLU
    """MLP of each block."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections, as in Qwen."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies: of d rotated dimensions, pair i turns by rope_theta^(-2i/d) per position."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's dimensions that is rotated."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions beyond the length the model was trained at. Default: that of the model in `from`.
    A recipe that begins with trained weights may have one word here: linear, yarn or theta (a larger rope_theta), by
    the factor seq_len / context of those weights, or none; also `{type: yarn, factor: auto}`."""
    parallel_residual: bool = False
    """Parallel residual branches: attention and MLP read the same hidden state (GPT-NeoX) instead of in sequence."""
    tie_word_embeddings: bool = True
    """Weight tying: one matrix serves as token embedding and as output head."""
    embedding_scale: Positive = 1.0
    """Multiplier of the token embeddings."""
    residual_dropout: Share = 0.0
    """Dropout probability on the embedding and on what attention and MLP add to the hidden state."""
    attention_dropout: Share = 0.0
    """Dropout probability on attention weights. Only attention with a mask has it: on a CPU, in fp32, or on GPUs below
    compute capability 8.0."""
    initializer_range: Positive = 0.02
    """Standard deviation of the normal distribution from which initial weights are drawn."""
    scale_residual_init: bool = False
    """Smaller initial weights for the two projections that add to the hidden state, as in GPT-2: initializer_range
    divided by sqrt(2 * num_hidden_layers)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.kv_heads}; change one of them"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_size} rotates "
                f"{self.rotary_dim} dimensions; expected an even number of at least 2"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows with which embedding and head are stored in memory: `vocab_size` rounded up to a multiple of 64.

        Rows beyond `vocab_size` are zero and stay so. They count nowhere but in memory: not among the parameters, in
        the softmax, in logits that are returned, in FLOPs or in files.
        """
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    @property
    def has_dropout(self) -> bool:
        """Whether training drops anything."""
        return bool(self.residual_dropout or self.attention_dropout)

    @property
    def head_size(self) -> int:
        """Dimensions of each attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of each head that are rotated."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; can differ from hidden_size where head_dim is given."""
        return self.num_attention_heads * self.head_size
