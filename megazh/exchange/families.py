"""The families of Hugging Face models whose computation is that of a `ModelConfig`, and what none of them can express.

What each family can express is what its code computes alike in transformers 4.46.3 and 5.24 (`models/llama`, `qwen2`
and `mistral`, their `configuration_*.py` and `modeling_*.py`).
"""

import itertools
from collections.abc import Iterator
from enum import StrEnum

from megazh.errors import UsageError
from megazh.model.config import Mlp, ModelConfig, Norm


class Family(StrEnum):
    """Families of Hugging Face models, by their `model_type`."""

    LLAMA = "llama"
    """No bias; any head_dim, as long as the heads divide hidden_size."""
    QWEN2 = "qwen2"
    """Bias on the query, key and value projections; the heads fill hidden_size."""
    MISTRAL = "mistral"
    """No bias, any head_dim, no scaling of rotary positions."""

    @property
    def architecture(self) -> str:
        """Name of the class in transformers, such as `LlamaForCausalLM`."""
        return f"{self.value.capitalize()}ForCausalLM"


def choose_family(config: ModelConfig, wanted: Family | None = None) -> Family:
    """The family that a model is exported as: the first that can express it, or the one that is wanted.

    Raises:
        UsageError: no family, or not the wanted one, can express the model; names every key that is in the way.
    """
    if wanted is not None:
        if reasons := list(_reasons(config, wanted)):
            raise UsageError(f"--family {wanted}: cannot express {'; '.join(reasons)}")
        return wanted
    if reasons := inexpressible(config):
        raise UsageError(
            f"no family of Hugging Face models ({', '.join(Family)}) can express {'; '.join(reasons)}: this model can "
            "be used with megazh alone"
        )
    return next(family for family in Family if not any(_reasons(config, family)))


def inexpressible(config: ModelConfig) -> list[str]:
    """The keys of a model that no family can express, each with the reason; empty if a family can express the model."""
    if any(not any(_reasons(config, family)) for family in Family):
        return []
    nearest = [Family.QWEN2] if config.qkv_bias else [Family.LLAMA, Family.MISTRAL]
    own = [list(_own_reasons(config, family)) for family in nearest]
    return [*_common_reasons(config), *(itertools.chain(*own) if all(own) else [])]


def _reasons(config: ModelConfig, family: Family) -> Iterator[str]:
    yield from _common_reasons(config)
    yield from _own_reasons(config, family)


def _common_reasons(config: ModelConfig) -> Iterator[str]:
    """What is in the way of every family."""
    if config.norm is not Norm.RMSNORM:
        yield f"model.norm={config.norm} (only {Norm.RMSNORM})"
    if config.mlp is not Mlp.SWIGLU:
        yield f"model.mlp={config.mlp} (only {Mlp.SWIGLU})"
    if config.parallel_residual:
        yield "model.parallel_residual=true (attention and MLP come in sequence)"
    if config.partial_rotary_factor != 1:
        yield f"model.partial_rotary_factor={config.partial_rotary_factor:g} (the whole of each head is rotated)"
    if config.embedding_scale != 1:
        yield f"model.embedding_scale={config.embedding_scale:g} (embeddings are not scaled)"


def _own_reasons(config: ModelConfig, family: Family) -> Iterator[str]:
    """What is in the way of this family alone."""
    heads, width = config.num_attention_heads, config.hidden_size
    if family is Family.QWEN2:
        if not config.qkv_bias:
            yield "model.qkv_bias=false (qwen2 has biases)"
        if config.attention_width != width:
            yield f"model.head_dim={config.head_size} (in qwen2, {heads} heads fill hidden_size {width})"
        return
    if config.qkv_bias:
        extra = ", or one on o_proj, too" if family is Family.LLAMA else ""
        yield f"model.qkv_bias=true ({family} has no bias{extra})"
    if family is Family.LLAMA and width % heads:
        yield f"model.num_attention_heads={heads} (in llama, they divide hidden_size {width})"
    if family is Family.MISTRAL and config.rope_scaling is not None:
        yield f"model.rope_scaling={config.rope_scaling.type} (mistral has none)"
