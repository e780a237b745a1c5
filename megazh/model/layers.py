"""The layers of the decoder by number: embedding 0, blocks 1 to L, last norm L + 1, head L + 2."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megazh.model.attention import Attend
from megazh.model.config import Mlp, ModelConfig, Norm
from megazh.model.dropout import Dropout, Site
from megazh.model.lora import Pair, Pairs, add_pairs, freeze
from megazh.model.lora_config import LoraConfig
from megazh.model.rope import rotate


def _vocabulary_matrix(config: ModelConfig) -> nn.Parameter:
    """Matrix of embedding or head, (padded_vocab_size, hidden); its attribute `rows` is the number that counts."""
    weight: Any = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
    weight.rows = config.vocab_size
    return weight


class Embedding(nn.Module):
    """Embedding of token ids; with tied weights, its matrix is also that of the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = _vocabulary_matrix(config)
        self.scale = config.embedding_scale

    def forward(self, tokens: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        """Embed integer token ids (batch, seq): (batch, seq, hidden)."""
        hidden = F.embedding(tokens, self.weight)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return hidden if dropout is None else dropout(hidden, Site.EMBEDDING)


class Head(nn.Module):
    """Output matrix. It has no forward pass, since the loss uses its weight directly (`megazh.model.loss`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = _vocabulary_matrix(config)


def make_norm(config: ModelConfig) -> nn.Module:
    """Make a norm over the hidden dimension."""
    if config.norm is Norm.LAYERNORM:
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return nn.RMSNorm(config.hidden_size, config.norm_eps)


class Linear(nn.Linear):
    """A linear layer, with low-rank pairs beside it where LoRA trains them.

    `initialize` sets its weights; torch would draw others first, from the global generator.
    """

    lora: Pairs | None
    """The pairs; None without LoRA."""

    def __init__(self, inputs: int, rows: int, bias: bool) -> None:
        super().__init__(inputs, rows, bias)
        self.register_module("lora", None)

    @property
    def pairs(self) -> list[Pair]:
        """The low-rank pairs."""
        return [] if self.lora is None else self.lora.all

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""

    def forward(self, inputs: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        """Compute the product: (..., inputs) to (..., rows); `dropout` acts on the input of low-rank pairs."""
        out = super().forward(inputs)
        return out if self.lora is None else self.lora(out, inputs, dropout)


class SelfAttention(nn.Module):
    """Query-key-value projection in one product, rotation, attention within documents, output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_size
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = Linear(config.attention_width, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Attend within documents: (batch, seq, hidden) to (batch, seq, hidden)."""
        batch, seq, _ = hidden.shape
        heads = self.qkv_proj(hidden, attend.dropout).view(batch, seq, self.heads + 2 * self.kv_heads, self.head_dim)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        query, key = rotate(query, attend.cos, attend.sin), rotate(key, attend.cos, attend.sin)
        attended = attend(self._layer, query, key, value)
        return self.o_proj(attended.reshape(batch, seq, self.heads * self.head_dim), attend.dropout)


class FeedForward(nn.Module):
    """MLP with SwiGLU or GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._gated = config.mlp is Mlp.SWIGLU
        width = config.intermediate_size
        self.up_proj = Linear(config.hidden_size, 2 * width if self._gated else width, bias=False)
        self.down_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        """Apply the MLP: (batch, seq, hidden) to (batch, seq, hidden). For SwiGLU, `up_proj` gives gate, then up."""
        states = self.up_proj(hidden, dropout)
        if self._gated:
            gate, up = states.chunk(2, -1)
            return self.down_proj(F.silu(gate) * up, dropout)
        return self.down_proj(F.gelu(states), dropout)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the hidden state; `megazh.model.fused` is the fast version."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Build block number `layer`, counted from 0."""
        super().__init__()
        self._layer, self._parallel = layer, config.parallel_residual
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Run the block: (batch, seq, hidden) to (batch, seq, hidden)."""
        dropout = attend.dropout
        added = self.attention(self.attention_norm(hidden), attend)
        attended = hidden + (added if dropout is None else dropout(added, Site.ATTENTION, self._layer))
        mlp_input = hidden if self._parallel else attended
        added = self.mlp(self.mlp_norm(mlp_input), dropout)
        return attended + (added if dropout is None else dropout(added, Site.MLP, self._layer))


def make_layer(config: ModelConfig, number: int, seed: int | None, lora: LoraConfig | None = None) -> nn.Module:
    """Make layer `number` of the model with its initial weights, in fp32 on the CPU.

    The weights depend on seed, number and shape only, and so are the same in every layout.

    Args:
        config: shape of the model.
        number: number of the layer, from 0 to `layer_count(config) - 1`.
        seed: seed of the initial weights; None leaves the layer on the meta device, without weights.
        lora: LoRA, which gives blocks low-rank pairs and freezes what it does not train; None trains all weights.
    """
    last = config.num_hidden_layers
    layer: nn.Module
    with torch.device("cpu" if seed is not None else "meta"):
        if number == 0:
            layer = Embedding(config)
        elif number <= last:
            layer = Block(config, number - 1)
        elif number == last + 1:
            layer = make_norm(config)
        else:
            layer = Head(config)
        if seed is not None:
            initialize(layer, config, number, seed)
        if lora is not None:
            if isinstance(layer, Block):
                add_pairs(layer, config, lora, number - 1, seed)
            names = {0: "embedding", last + 1: "norm", last + 2: "head"}
            freeze(layer, lora, names.get(number, "blocks"))
    return layer


def layer_count(config: ModelConfig) -> int:
    """Number of layers that `make_layer` can make, the head included."""
    return config.num_hidden_layers + 3


@torch.no_grad()
def initialize(layer: nn.Module, config: ModelConfig, number: int, seed: int) -> None:
    """Set matrices to normal random weights (`initializer_range`), biases to zero and weights of norms to one.

    Rows that pad embedding and head become zero.
    """
    digest = hashlib.sha256(f"megazh layer {number} of seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    small = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            feeds_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = small if feeds_residual and config.scale_residual_init else config.initializer_range
            rows = getattr(parameter, "rows", len(parameter))
            parameter[:rows].normal_(0.0, std, generator=generator)
            parameter[rows:].zero_()
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


def load_unpadded(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make tensors read from a file the weights of a layer, or of a whole `Decoder`, which may be on the meta device.

    Files hold embedding and head without padding: (vocab_size, hidden). Their rows are padded with zeros here. Dtype
    and device are those of the tensors.

    Args:
        layer: a layer made by `make_layer`, or a `Decoder`.
        tensors: its weights by name, such as `mlp.up_proj.weight`; a tied matrix under both of its names.

    Raises:
        RuntimeError: names or shapes are not those of the layer.
    """
    padded = dict(tensors)
    found = layer.named_parameters(remove_duplicate=False)
    rows = {name: each.rows for name, each in found if hasattr(each, "rows")}
    for name in rows.keys() & tensors.keys():
        tensor, stored = tensors[name], layer.get_parameter(name).shape
        if tensor.shape != (rows[name], stored[1]):
            raise RuntimeError(f"{name} is {tuple(tensor.shape)}, expected {(rows[name], stored[1])}")
        padded[name] = F.pad(tensor, (0, 0, 0, stored[0] - rows[name]))
    layer.load_state_dict(padded, assign=True)
    for name, count in rows.items():  # `assign` puts new parameters in place of those with the attribute
        setattr(layer.get_parameter(name), "rows", count)  # noqa: B010
