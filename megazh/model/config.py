"""The shape of a model: what a recipe says under `model:`."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from megazh.config import Config, choice


class Norm(StrEnum):
    """How hidden states are normalised."""

    RMSNORM = "rmsnorm"
    """Root mean square, a weight, no bias (arXiv 1910.07467)."""
    LAYERNORM = "layernorm"
    """Mean and variance, a weight and a bias (arXiv 1607.06450)."""


class Mlp(StrEnum):
    """What stands behind the attention in a block."""

    SWIGLU = "swiglu"
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
    GELU = "gelu"
    """down(gelu(up(x))), the exact GELU."""


class RopeScalingKind(StrEnum):
    """How rotary positions are stretched beyond the length a model was trained at."""

    LINEAR = "linear"
    """Positions divided by the factor (arXiv 2306.15595)."""
    YARN = "yarn"
    """Slow frequencies divided, fast ones kept, attention sharpened (arXiv 2309.00071)."""


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class RopeScaling(Config):
    """`rope_scaling:`; names as in Hugging Face configs."""

    type: Annotated[RopeScalingKind, choice(RopeScalingKind)]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    original_max_position_embeddings: Count | None = None
    """The length the model was trained at; yarn needs it."""
    beta_fast: Positive = 32.0
    """Yarn: frequencies that turn more often than this over the original length are kept."""
    beta_slow: Positive = 1.0
    """Yarn: frequencies that turn less often than this are divided by the factor."""
    attention_factor: Positive | None = None
    """Yarn: what queries and keys are multiplied with; default 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _complete(self) -> "RopeScaling":
        if self.type is RopeScalingKind.YARN and self.original_max_position_embeddings is None:
            raise ValueError("yarn needs original_max_position_embeddings, the length the model was trained at")
        return self


class ModelConfig(Config):
    """A decoder-only transformer with pre-normalisation."""

    vocab_size: Count
    """Rows of the embedding: at least the tokenizer's ids; the rest is padding and never drawn."""
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    """Fewer than the heads: grouped-query attention (arXiv 2305.13245). Default: as many."""
    head_dim: Count | None = None
    """Default: hidden_size / num_attention_heads."""
    intermediate_size: Count
    """Width of the MLP, of each of its two branches for swiglu."""
    norm: Annotated[Norm, choice(Norm)] = Norm.RMSNORM
    norm_eps: Positive = 1e-6
    mlp: Annotated[Mlp, choice(Mlp)] = Mlp.SWIGLU
    qkv_bias: bool = False
    """A bias on queries, keys and values (Qwen)."""
    rope_theta: Positive = 10000.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that is rotated."""
    rope_scaling: RopeScaling | None = None
    parallel_residual: bool = False
    """Attention and MLP read the same hidden state (GPT-NeoX), instead of one after the other."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""
    embedding_scale: Positive = 1.0
    """What embeddings are multiplied with."""
    residual_dropout: Share = 0.0
    """On what attention and MLP add to the hidden state, and on the embedding."""
    attention_dropout: Share = 0.0
    """On attention weights; only where attention runs with a mask (CPU, or fp32)."""
    initializer_range: Positive = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = False
    """Divide it by sqrt(2 * layers) for the two projections that add to the hidden state (GPT-2)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}; "
                "give head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads {self.kv_heads}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_size} rotates "
                f"{self.rotary_dim} dimensions; expected an even number of at least 2"
            )
        return self

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def attention_width(self) -> int:
        """Width of all heads together; differs from hidden_size where head_dim is given."""
        return self.num_attention_heads * self.head_size
