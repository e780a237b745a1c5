"""Names of tensors: which rows of which parameter of a `Decoder` each tensor of a Hugging Face model is.

Both projections that a `Decoder` computes in one product are several tensors there: rows of `qkv_proj` are those of
`q_proj`, `k_proj` and `v_proj`, in this order, and rows of `up_proj` those of `gate_proj` and `up_proj`. Dimensions i
and i + half of a head are rotated together in both, so that no row moves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megazh.model.config import ModelConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face model."""

    name: str
    """Its name in files, such as `model.layers.3.self_attn.k_proj.weight`."""
    shape: tuple[int, ...]
    parameter: str
    """Name of the parameter in `Decoder`, such as `blocks.3.attention.qkv_proj.weight`."""
    parameter_shape: tuple[int, ...]
    """Shape of the whole parameter, without rows that only pad it."""
    begin: int
    """First row of the parameter that is in the tensor."""
    end: int
    """Row behind the last."""


def hf_tensors(config: ModelConfig) -> list[HfTensor]:
    """The tensors of a model in the order of its layers; a tied head is not among them.

    Args:
        config: a model that a family can express (see `megazh.exchange.families`).
    """
    return list(_tensors(config))


def _tensors(config: ModelConfig) -> Iterator[HfTensor]:
    table = (config.vocab_size, config.hidden_size)
    yield _whole(EMBEDDING, "embedding.weight", table)
    for number in range(config.num_hidden_layers):
        yield from _block(config, f"model.layers.{number}.", f"blocks.{number}.")
    yield _whole("model.norm.weight", "norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield _whole(HEAD, "head.weight", table)


def _block(config: ModelConfig, there: str, here: str) -> Iterator[HfTensor]:
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.attention_width, config.kv_heads * config.head_size
    qkv = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    yield _whole(f"{there}input_layernorm.weight", f"{here}attention_norm.weight", (width,))
    yield from _rows(there, "weight", qkv, f"{here}attention.qkv_proj", (width,))
    if config.qkv_bias:
        yield from _rows(there, "bias", qkv, f"{here}attention.qkv_proj", ())
    yield _whole(f"{there}self_attn.o_proj.weight", f"{here}attention.o_proj.weight", (width, queries))
    yield _whole(f"{there}post_attention_layernorm.weight", f"{here}mlp_norm.weight", (width,))
    yield from _rows(there, "weight", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, f"{here}mlp.up_proj", (width,))
    yield _whole(f"{there}mlp.down_proj.weight", f"{here}mlp.down_proj.weight", (width, inner))


def _whole(name: str, parameter: str, shape: tuple[int, ...]) -> HfTensor:
    return HfTensor(name, shape, parameter, shape, 0, shape[0])


def _rows(there: str, what: str, rows: dict[str, int], parameter: str, rest: tuple[int, ...]) -> Iterator[HfTensor]:
    """Tensors that lie one behind the other in the rows of one parameter."""
    whole, begin = (sum(rows.values()), *rest), 0
    for name, count in rows.items():
        yield HfTensor(f"{there}{name}.{what}", (count, *rest), f"{parameter}.{what}", whole, begin, begin + count)
        begin += count
