"""Small models, packed rows for them, and a reference decoder in float64, written with loops."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder

Floats = npt.NDArray[np.float64]

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen": {"qkv_bias": True, "rope_theta": 1e6},
    "grouped": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1, "qkv_bias": True},
    "head_dim 44": {"head_dim": 44, "num_key_value_heads": 2},
    "head_dim 48": {"head_dim": 48, "num_attention_heads": 3, "tie_word_embeddings": False},
    "neox": {
        "norm": "layernorm",
        "mlp": "gelu",
        "parallel_residual": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "norm_eps": 1e-5,
    },
    "scaled embedding": {"embedding_scale": 5.5, "mlp": "gelu"},
    "layernorm": {"norm": "layernorm", "partial_rotary_factor": 0.25, "qkv_bias": True},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
}
"""Changes to the small shape, by name of the case."""


def small(**changes: Any) -> ModelConfig:
    """Shape of a model of two blocks that runs in milliseconds; weights large enough that attention is not uniform."""
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "initializer_range": 0.2,
    }
    return ModelConfig.model_validate({**shape, **changes})


def decoder(config: ModelConfig, seed: int = 3, **options: Any) -> Decoder:
    """A model whose biases are not all zero and whose norm weights are not all one."""
    model = Decoder(config, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def packed(rows: Sequence[Sequence[int]], seq_len: int, seed: int = 0, vocab: int = 97) -> tuple[torch.Tensor, ...]:
    """Padded rows of documents of these lengths: tokens, labels, position_ids (rows, seq), cu_seqlens (rows, 7)."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, vocab, (len(rows), seq_len))
    labels = np.full((len(rows), seq_len), -100)
    positions = np.zeros((len(rows), seq_len), np.int64)
    cu_seqlens = np.full((len(rows), 7), seq_len)
    for row, lengths in enumerate(rows):
        filled = cu_seqlens[row, 0] = 0
        for number, length in enumerate([*lengths, seq_len - sum(lengths)]):
            positions[row, filled : filled + length] = np.arange(length)
            if number < len(lengths):
                labels[row, filled : filled + length - 1] = tokens[row, filled + 1 : filled + length]
                cu_seqlens[row, number + 1] = filled + length
            filled += length
    return tuple(torch.from_numpy(array.astype(np.int32)) for array in (tokens, labels, positions, cu_seqlens))


def alone(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (1, length) and boundaries (1, 2) of a row that is one document."""
    return torch.arange(length, dtype=torch.int32)[None], torch.tensor([[0, length]], dtype=torch.int32)


def logits(model: Decoder, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Logits (rows, seq, vocab) of a packed micro-batch."""
    return model.logits(model(tokens, model.attention(positions, cu_seqlens)))


def turning(config: ModelConfig) -> tuple[Floats, float]:
    """Angle per position of each pair of dimensions, and the multiplier that yarn applies to queries and keys."""
    dim = int(config.head_size * config.partial_rotary_factor)
    angles = np.array([config.rope_theta ** (-2 * pair / dim) for pair in range(dim // 2)])
    scaling = config.rope_scaling
    if scaling is None:
        return angles, 1.0
    if scaling.type == "linear":
        return angles / scaling.factor, 1.0
    length = scaling.original_max_position_embeddings
    assert length is not None
    # Fractional index of the pair that makes a given number of turns over the original length: pair i makes
    # theta^(-2i/dim) * length / 2 pi turns.
    fast, slow = (
        dim / 2 * math.log(length / (2 * math.pi * turns), config.rope_theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
    for pair in range(dim // 2):
        divided = min(max((pair - low) / (high - low), 0.0), 1.0)
        angles[pair] *= (1 - divided) + divided / scaling.factor
    return angles, scaling.attention_factor or 1 + 0.1 * math.log(scaling.factor)


def turned(heads: Floats, position: int, config: ModelConfig) -> Floats:
    """Rotate (heads, head_dim) by a position: each pair (i, i + half) is a complex number, times e^(i angle)."""
    angles, factor = turning(config)
    half = len(angles)
    complex_pairs = heads[:, :half] + 1j * heads[:, half : 2 * half]
    complex_pairs = complex_pairs * np.exp(1j * angles * position) * factor
    return np.concatenate((complex_pairs.real, complex_pairs.imag, heads[:, 2 * half :]), 1)


def reference_logits(
    model: Decoder, tokens: torch.Tensor, positions: torch.Tensor, documents: list[list[int]]
) -> Floats:
    """Logits (rows, seq, vocab) of the rows that `packed` makes of `documents`; token by token in float64."""
    config = model.config
    weights: dict[str, Floats] = {name: value.double().numpy() for name, value in model.state_dict().items()}
    seq_len = tokens.shape[1]
    found = []
    for row, lengths in enumerate(documents):
        boundaries = np.cumsum([0, *lengths, seq_len - sum(lengths)])
        states = weights["embedding.weight"][tokens[row].numpy()] * config.embedding_scale
        for layer in range(config.num_hidden_layers):
            own = {
                n.removeprefix(f"blocks.{layer}."): w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")
            }
            added = _attention(config, own, _norm(config, own, "attention_norm", states), positions[row], boundaries)
            mlp_input = states if config.parallel_residual else states + added
            states = states + added + _mlp(config, own, _norm(config, own, "mlp_norm", mlp_input))
        states = _norm(config, weights, "norm", states)
        head = weights["embedding.weight" if config.tie_word_embeddings else "head.weight"]
        found.append(states @ head[: config.vocab_size].T)
    return np.stack(found)


def _norm(config: ModelConfig, weights: dict[str, Floats], name: str, states: Floats) -> Floats:
    if config.norm == "layernorm":
        states = states - states.mean(1, keepdims=True)
    states = states / np.sqrt((states**2).mean(1, keepdims=True) + config.norm_eps)
    return states * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def _attention(
    config: ModelConfig,
    weights: dict[str, Floats],
    states: Floats,
    positions: torch.Tensor,
    boundaries: npt.NDArray[Any],
) -> Floats:
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
    qkv = states @ weights["attention.qkv_proj.weight"].T + weights.get("attention.qkv_proj.bias", 0.0)
    qkv = qkv.reshape(len(states), heads + 2 * kv_heads, size)
    queries, keys, values = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    queries = np.stack([turned(each, int(at), config) for each, at in zip(queries, positions, strict=True)])
    keys = np.stack([turned(each, int(at), config) for each, at in zip(keys, positions, strict=True)])
    attended = np.zeros((len(states), heads, size))
    for begin, end in itertools.pairwise(boundaries):
        for at in range(begin, end):
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = keys[begin : at + 1, group] @ queries[at, head] / math.sqrt(size)
                softmax = np.exp(scores - scores.max())
                attended[at, head] = softmax @ values[begin : at + 1, group] / softmax.sum()
    return attended.reshape(len(states), -1) @ weights["attention.o_proj.weight"].T


def _mlp(config: ModelConfig, weights: dict[str, Floats], states: Floats) -> Floats:
    inner = states @ weights["mlp.up_proj.weight"].T
    if config.mlp == "swiglu":
        gate, up = inner[:, : config.intermediate_size], inner[:, config.intermediate_size :]
        inner = gate / (1 + np.exp(-gate)) * up
    else:
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    return inner @ weights["mlp.down_proj.weight"].T
