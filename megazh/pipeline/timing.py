"""Seconds per micro-batch of embedding, block and head on this card, kept in the cache for later runs."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megazh.caches import cache_dir, warn_not_kept
from megazh.config import from_mapping
from megazh.errors import UsageError
from megazh.files import write_atomic
from megazh.pipeline.costs import LayerCosts, weight_shares
from megazh.pipeline.work import Work

if TYPE_CHECKING:
    import torch

_VERSION = 5
_WARM_UP, _ROUNDS = 3, 7


def layer_seconds(work: Work, device: "torch.device") -> LayerCosts:
    """Forward plus backward pass of a micro-batch through each type of part, by the clock; once per card and shape.

    Takes a few seconds and, meanwhile, the memory of one layer of each type.
    """
    import torch

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    remembered = remembered_seconds(work, card)
    if remembered is not None:
        return remembered
    costs = _measure(work, device)
    key = _key(work, card)
    note = json.dumps({**key, "costs": costs.model_dump()}, indent=1)
    try:
        write_atomic(_path(key), note.encode(), durable=False)
    except OSError as error:  # the next run measures again
        warn_not_kept(cache_dir(), error)
    return costs


def remembered_seconds(work: Work, card: str) -> LayerCosts | None:
    """Return what an earlier `layer_seconds` measured on a card of this name; None if nothing, or a damaged note."""
    path = _path(_key(work, card))
    try:
        return from_mapping(json.loads(path.read_bytes())["costs"], LayerCosts, str(path))
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def _key(work: Work, card: str) -> dict[str, Any]:
    """Everything that the time of a layer depends on."""
    return {
        "version": _VERSION,
        "card": card,
        "torch": version("torch"),
        "model": work.model.model_dump(mode="json"),
        "seq_len": work.seq_len,
        "micro_batch_size": work.micro_batch_size,
        "dtype": work.precision.compute.value,
        "backend": work.backend.value,
        "checkpointing": work.activation_checkpointing,
        "attention_group": work.attention_group,
        "lora": None if work.lora is None else work.lora.model_dump(mode="json"),
    }


def _path(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "timings" / f"{digest[:32]}.json"


def _measure(work: Work, device: "torch.device") -> LayerCosts:
    import torch

    from megazh.model.attention import Documents
    from megazh.model.decoder import run_layers
    from megazh.model.dropout import Dropout
    from megazh.model.layers import layer_count, make_layer
    from megazh.model.loss import loss_and_gradient, summed_cross_entropy

    config, dtype, checkpointing = work.model, work.precision.compute.torch, work.activation_checkpointing
    rows, seq_len = work.micro_batch_size, work.seq_len
    last = layer_count(config) - 1
    embedding: Any
    embedding, block, norm = (
        make_layer(config, number, seed=0, lora=work.lora).to(device, dtype) for number in (0, 1, last - 1)
    )
    # A tied head is trained if the embedding is.
    of_head = make_layer(config, 0 if config.tie_word_embeddings else last, seed=0, lora=work.lora)
    weight = of_head.to(device, dtype).get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, seq_len), generator=generator).to(device)
    position_ids = torch.arange(seq_len, device=device).expand(rows, -1)
    cu_seqlens = torch.tensor([[0, seq_len]], dtype=torch.int32, device=device).expand(rows, -1)
    of_pairs = work.lora.dropout if work.lora else 0.0
    drops = config.has_dropout or of_pairs > 0
    dropout = Dropout(config, 0, torch.arange(rows, device=device), of_pairs) if drops else None
    attend = Documents(config, work.backend)(position_ids, cu_seqlens, dropout, work.attention_group)
    hidden = torch.randn(rows, seq_len, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(hidden)
    if work.fused:  # as in a run, where fused products add to fp32 sums
        for parameter in (*embedding.parameters(), *block.parameters(), *norm.parameters(), weight):
            if parameter.requires_grad:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    one = torch.ones((), device=device)

    def embed() -> None:
        out = run_layers(embedding, [], None, tokens, attend, checkpointing)
        if out.requires_grad:
            out.backward(gradient)

    def through_block() -> None:
        run_layers(None, [block], None, hidden, attend, checkpointing).backward(gradient)

    def to_loss() -> None:
        normed = run_layers(None, [], norm, hidden, attend, checkpointing)
        if work.fused:
            normed.backward(loss_and_gradient(normed, weight, tokens, 0.0, one, True, config.vocab_size)[1])
        else:
            summed_cross_entropy(normed, weight, tokens, vocab=config.vocab_size).backward()

    return LayerCosts(
        unit="seconds",
        embedding=_median_seconds(embed, device, work.recordable),
        block=_median_seconds(through_block, device, work.recordable),
        head=_median_seconds(to_loss, device, work.recordable),
        **weight_shares(work),
    )


def _median_seconds(call: Callable[[], None], device: "torch.device", recordable: bool) -> float:
    """Median time of some calls, after a few that are not counted; on CUDA of recorded kernels, as in a run."""
    import torch

    if device.type == "cuda" and recordable:
        from megazh.pipeline.recorded import new_pool, record

        for _ in range(_WARM_UP):
            call()
        call = record(call, new_pool())

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for number in range(_WARM_UP + _ROUNDS):
        begun = now()
        call()
        if number >= _WARM_UP:
            times.append(now() - begun)
    return statistics.median(times)
