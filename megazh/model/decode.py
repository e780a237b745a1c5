"""Decoding of a batch of sequences with a cache; on CUDA a step is recorded as a CUDA graph and replayed.

A step of a small model launches hundreds of kernels that each take microseconds, and launching them takes longer than
running them. A graph launches them together. It has fixed shapes, so it reads a fixed number of slots of the cache and
masks those that are empty; there is one graph for each power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megazh.errors import UsageError
from megazh.model.backend import Backend, choose_backend
from megazh.model.decoder import Decoder
from megazh.model.kv_cache import CachedAttention, KeyValueCache
from megazh.model.layers import Block

_FIRST_BOUND = 256
"""Slots that the first graph reads."""
_WARM_UP = 2
"""Steps that are run before a graph is recorded, in which libraries allocate and kernels are compiled."""


@dataclass(frozen=True)
class _Graph:
    """A recorded step."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    """Output, (rows, vocab) fp32, which each replay overwrites."""


class Decoding:
    """Sequences that are decoded together, each as it would be alone.

    Args:
        model: the model, in evaluation mode.
        capacity: length of the longest sequence in tokens, prompt included.
        rows: number of sequences.
        graphs: whether to record CUDA graphs. Default: on CUDA.

    Raises:
        UsageError: graphs without CUDA.
    """

    def __init__(self, model: Decoder, capacity: int, rows: int = 1, graphs: bool | None = None) -> None:
        weight = model.head.weight
        self._model, self._device = model, weight.device
        self._cache = KeyValueCache(model.config, capacity, weight.device, weight.dtype, rows)
        on_cuda = weight.device.type == "cuda"
        if graphs and not on_cuda:
            raise UsageError(f"CUDA graphs on {weight.device}: they exist on CUDA only; leave them out")
        self._records = on_cuda if graphs is None else graphs
        self._fused = choose_backend(model.config, weight.device, weight.dtype) is Backend.FUSED
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None  # torch has no public name for the type
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
        self._slot = torch.zeros(1, dtype=torch.long, device=weight.device)

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Forget earlier sequences and feed one prompt per row.

        Args:
            prompts: token ids, at least one each; shorter ones are padded on the left.

        Returns:
            Logits of the next token of each row, (rows, vocab) fp32.

        Raises:
            UsageError: a prompt is empty, there are more or fewer than rows, or one exceeds the capacity.
        """
        if len(prompts) != self._cache.rows:
            raise UsageError(f"{len(prompts)} prompts for {self._cache.rows} rows: give one for each row")
        if not all(prompts):
            raise UsageError("the prompt is empty: give at least one character")
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        if self._cache.padded or any(padding):
            self._graphs.clear()  # they were recorded for the padding of the prompts before
            self._pool = None  # it ended with them
        self._cache.clear(padding)
        return self.append([[*[0] * empty, *prompt] for empty, prompt in zip(padding, prompts, strict=True)])

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens of each row. Raises as `KeyValueCache.keep`."""
        self._cache.keep(count)

    @torch.no_grad()
    def append(self, tokens: Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        """Feed the same number of tokens to each row, behind those before.

        Args:
            tokens: (rows, n) token ids.

        Returns:
            Logits of the next token of each row, (rows, vocab) fp32; the next call may overwrite them.

        Raises:
            UsageError: they exceed the capacity.
        """
        ids = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(tokens, device=self._device)
        if self._records and ids.shape[1] == 1 and self._cache.length:
            return self._replayed(ids)
        return self._logits(ids, self._cache.extend(ids.shape[1]))

    def _logits(self, ids: torch.Tensor, attend: CachedAttention) -> torch.Tensor:
        step = _fused_hidden if self._fused and ids.shape[1] == 1 else _last_hidden
        return self._model.logits(step(self._model, ids, attend))

    def _replayed(self, ids: torch.Tensor) -> torch.Tensor:
        self._cache.check_room(1)
        self._tokens.copy_(ids)
        self._slot.fill_(self._cache.length)
        self._cache.length += 1
        bound = _FIRST_BOUND
        while bound < self._cache.length:
            bound *= 2
        bound = min(bound, self._cache.capacity)
        if bound not in self._graphs:
            self._graphs[bound] = self._recorded(bound)
        recorded = self._graphs[bound]
        recorded.graph.replay()
        return recorded.logits

    def _recorded(self, bound: int) -> _Graph:
        def step() -> torch.Tensor:
            return self._logits(self._tokens, self._cache.attention(self._slot, bound))

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step()  # writes the same slot again and again
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        self._pool = graph.pool()
        return _Graph(graph, logits)


def _last_hidden(model: Decoder, ids: torch.Tensor, attend: CachedAttention) -> torch.Tensor:
    """Hidden state after the last norm of the last token of each row, (rows, hidden)."""
    return model(ids, attend)[:, -1]


def _fused_hidden(model: Decoder, ids: torch.Tensor, attend: CachedAttention) -> torch.Tensor:
    """Like `_last_hidden`, for one token a row, with the Triton kernels of training for all but the attention."""
    from megazh.kernels.norm import add_norm
    from megazh.kernels.rotary import rotate_
    from megazh.kernels.swiglu import swiglu

    rows, eps = len(ids), model.config.norm_eps
    cos, sin = (each.reshape(-1, each.shape[-1]).expand(rows, -1).contiguous() for each in (attend.cos, attend.sin))
    residual, delta = model.embedding(ids)[:, 0], None
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        residual, normed, _ = add_norm(residual, delta, block.attention_norm.weight, eps)  # type: ignore[arg-type]
        qkv = attention.qkv_proj(normed)
        rotate_(qkv, cos, sin, attention.heads + attention.kv_heads, attention.head_dim)
        heads = qkv.view(rows, 1, -1, attention.head_dim)
        query, key, value = heads.split((attention.heads, attention.kv_heads, attention.kv_heads), 2)
        delta = attention.o_proj(attend(layer, query, key, value).reshape(rows, -1))
        residual, normed, _ = add_norm(residual, delta, block.mlp_norm.weight, eps)  # type: ignore[arg-type]
        delta = mlp.down_proj(swiglu(mlp.up_proj(normed)))
    return add_norm(residual, delta, model.norm.weight, eps)[1]  # type: ignore[arg-type]
