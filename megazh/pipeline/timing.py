"""Seconds that an embedding, a block and the head take on this card, kept in the cache for the next run."""

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megazh.config import from_mapping
from megazh.errors import UsageError
from megazh.files import cache_dir, write_atomic
from megazh.model.attention import Backend, Documents
from megazh.model.config import ModelConfig
from megazh.model.decoder import run_layers
from megazh.model.layers import layer_count, make_layer
from megazh.model.loss import loss_and_gradient, summed_cross_entropy
from megazh.pipeline.costs import LayerCosts

_VERSION = 2
_WARM_UP, _ROUNDS = 3, 7


def layer_seconds(
    config: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    checkpointing: bool,
) -> LayerCosts:
    """Forward and backward of a micro-batch through each kind of layer, by the clock; measured once a card and shape.

    Takes a few seconds and, for the while, the memory of one layer of each kind.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    known = remembered_seconds(config, seq_len, micro_batch_size, dtype, backend, card, checkpointing)
    if known is not None:
        return known
    costs = _measure(config, seq_len, micro_batch_size, dtype, backend, device, checkpointing)
    key = _key(config, seq_len, micro_batch_size, dtype, backend, card, checkpointing)
    note = json.dumps({**key, "costs": costs.model_dump()}, indent=1)
    with contextlib.suppress(OSError):  # without a cache, the next run measures again
        write_atomic(_path(key), note.encode(), durable=False)
    return costs


def remembered_seconds(
    config: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    backend: Backend,
    card: str,
    checkpointing: bool,
) -> LayerCosts | None:
    """What an earlier `layer_seconds` found on a card of this name; None: nothing, or its note is damaged."""
    path = _path(_key(config, seq_len, micro_batch_size, dtype, backend, card, checkpointing))
    try:
        return from_mapping(json.loads(path.read_bytes())["costs"], LayerCosts, str(path))
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def _key(
    config: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    backend: Backend,
    card: str,
    checkpointing: bool,
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "card": card,
        "torch": torch.__version__,
        "model": config.model_dump(mode="json"),
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
        "dtype": str(dtype),
        "backend": backend.value,
        "checkpointing": checkpointing,
    }


def _path(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "timings" / f"{digest[:32]}.json"


def _measure(
    config: ModelConfig,
    seq_len: int,
    batch: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    checkpointing: bool,
) -> LayerCosts:
    last = layer_count(config) - 1
    embedding: Any
    embedding, block, norm = (make_layer(config, number, seed=0).to(device, dtype) for number in (0, 1, last - 1))
    weight = make_layer(config, last, seed=0).get_parameter("weight").to(device, dtype).detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, seq_len), generator=generator).to(device)
    position_ids = torch.arange(seq_len, device=device).expand(batch, -1)
    cu_seqlens = torch.tensor([[0, seq_len]], dtype=torch.int32, device=device).expand(batch, -1)
    attend = Documents(config, backend)(position_ids, cu_seqlens, training=True)
    hidden = torch.randn(batch, seq_len, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(hidden)
    fused = backend is Backend.FUSED
    if fused:  # as in a run, where fused products add to sums
        for parameter in (*embedding.parameters(), *block.parameters(), *norm.parameters(), weight):
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    one = torch.ones((), device=device)

    def embed() -> None:
        run_layers(embedding, [], None, tokens, attend, checkpointing).backward(gradient)

    def through_block() -> None:
        run_layers(None, [block], None, hidden, attend, checkpointing).backward(gradient)

    def to_loss() -> None:
        normed = run_layers(None, [], norm, hidden, attend, checkpointing)
        if fused:
            normed.backward(loss_and_gradient(normed, weight, tokens, 0.0, one, fused)[1])
        else:
            summed_cross_entropy(normed, weight, tokens).backward()

    return LayerCosts(
        unit="seconds",
        embedding=_seconds(embed, device),
        block=_seconds(through_block, device),
        head=_seconds(to_loss, device),
    )


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The median of some rounds."""
    times = []
    for number in range(_WARM_UP + _ROUNDS):
        begun = _now(device)
        work()
        if number >= _WARM_UP:
            times.append(_now(device) - begun)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
