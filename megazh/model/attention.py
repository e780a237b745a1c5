"""Attention within documents: prepared once per micro-batch from its document boundaries, then used by every block.

Fused blocks (`megazh.model.fused`) read the boundaries as two numbers per token (`Packed`). Other blocks call an
`Attend`: `varlen` on CUDA in bf16 and fp16, SDPA with a boolean mask elsewhere, and a cache of keys and values for
generation. No token ever attends to another document or to the future.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megazh.model.backend import Backend
from megazh.model.config import ModelConfig
from megazh.model.dropout import Dropout, Site
from megazh.model.rope import Rotary


class Attend(Protocol):
    """Attention of one micro-batch, as torch blocks call it."""

    cos: torch.Tensor
    """Cosines of the rotation angles: (batch, seq, 1, rotary_dim / 2) fp32."""
    sin: torch.Tensor
    """Sines of the same angles, in the same shape and dtype."""
    dropout: Dropout | None
    """Dropout of the micro-batch; None outside of training, and for a model without dropout."""

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute the attention of block `layer`.

        Args:
            layer: number of the block, from 0.
            query: (batch, seq, heads, head_dim), rotated.
            key: (batch, seq, kv_heads, head_dim), rotated.
            value: (batch, seq, kv_heads, head_dim).

        Returns:
            (batch, seq, heads, head_dim).
        """
        ...


@dataclass(frozen=True)
class Packed:
    """Rotation and document boundaries of one micro-batch for fused blocks, with all rows concatenated."""

    cos: torch.Tensor
    """Cosines of the rotation angles: (tokens, rotary_dim / 2) fp32."""
    sin: torch.Tensor
    """Sines of the same angles, in the same shape and dtype."""
    starts: torch.Tensor
    """Index of the first token of each token's document: (tokens,) int32."""
    ends: torch.Tensor
    """Index one past the last token of each token's document: (tokens,) int32."""


class VarlenAttention:
    """Flash attention over the segments of all rows, concatenated."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seq_len: int,
        dropout: Dropout | None = None,
    ) -> None:
        """Prepare the attention of one micro-batch.

        Args:
            cos, sin, dropout: see `Attend`; attention weights are not dropped here.
            cu_seqlens: (batch, max_docs + 1) int32, boundaries of the segments of each row, padded with `seq_len`.
            seq_len: tokens per row.
        """
        self.cos, self.sin, self.dropout = cos, sin, dropout
        row_starts = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=torch.int32)[:, None] * seq_len
        total = torch.full((1,), len(cu_seqlens) * seq_len, device=cu_seqlens.device, dtype=torch.int32)
        # Drop the empty segments of the padding: the kernel's time grows with their number, up to four times on an
        # H200. Dropping them makes the CPU wait for the GPU once per micro-batch, which costs far less.
        self._cu_seqlens = torch.cat(((cu_seqlens[:, :-1] + row_starts)[cu_seqlens[:, :-1] < seq_len], total))
        self._longest = seq_len

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        from torch.nn.attention import varlen  # its kernels exist for CUDA only

        varlen_attn: Any = varlen.varlen_attn  # its signature differs between versions of torch
        batch, seq, heads, head_dim = query.shape
        grouped = key.shape[2] != heads
        options: dict[str, bool] = {}
        if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options = {"enable_gqa": True}  # not in torch 2.11
        elif grouped:
            key, value = (states.repeat_interleave(heads // key.shape[2], 2) for states in (key, value))
        padding = -head_dim % 8  # the kernel takes multiples of 8 only; zeros do not change the products
        flat = [F.pad(states, (0, padding)) if padding else states for states in (query, key, value)]
        attended = varlen_attn(
            *(states.reshape(batch * seq, states.shape[2], head_dim + padding) for states in flat),
            self._cu_seqlens,
            self._cu_seqlens,
            self._longest,
            self._longest,
            scale=head_dim**-0.5,
            window_size=(-1, 0),
            **options,
        )
        return attended[..., :head_dim].reshape(batch, seq, heads, head_dim)


class MaskedAttention:
    """SDPA with a boolean mask, true where a token may attend: its own document up to and including itself."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seq_len: int,
        dropout: Dropout | None = None,
    ) -> None:
        """Prepare the attention of one micro-batch.

        Args:
            cos, sin, dropout: see `Attend`.
            cu_seqlens: see `VarlenAttention`.
            seq_len: tokens per row.
        """
        self.cos, self.sin, self.dropout = cos, sin, dropout
        index = torch.arange(seq_len, device=cu_seqlens.device, dtype=torch.int32)
        segment_ends = cu_seqlens[:, 1:].contiguous()
        documents = torch.searchsorted(segment_ends, index.expand(len(segment_ends), -1).contiguous(), right=True)
        same = documents[:, :, None] == documents[:, None, :]
        self._mask = (same & (index[:, None] >= index[None, :]))[:, None]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        if self.dropout is None or not self.dropout.on_weights:
            return attend_with_mask(query, key, value, self._mask)
        # SDPA draws its masks from the global generator: here the softmax is written out.
        groups = query.shape[2] // key.shape[2]
        key, value = (states.repeat_interleave(groups, 2) for states in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
        weights = scores.masked_fill(~self._mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", self.dropout(weights, Site.WEIGHTS, layer), value)


def attend_with_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SDPA over (batch, seq, heads, head_dim); key and value may have fewer heads, and the boolean mask broadcasts."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return attended.transpose(1, 2)


class Documents:
    """Factory of attention objects: one per model or pipeline stage, called once per micro-batch."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._backend = backend
        self._rotary = Rotary(config)

    @torch.no_grad()
    def __call__(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, dropout: Dropout | None = None
    ) -> Attend | Packed:
        """Prepare the attention of one micro-batch.

        Args:
            position_ids: (batch, seq) integers.
            cu_seqlens: (batch, max_docs + 1) int32, boundaries of the segments of each row, padded with seq.
            dropout: dropout of the micro-batch; None outside of training. A fused backend has none.

        Returns:
            A `Packed` if the backend is fused, else an `Attend`.
        """
        cos, sin = self._rotary(position_ids)
        seq_len = position_ids.shape[1]
        if self._backend is Backend.FUSED:
            return _pack(cos, sin, cu_seqlens)
        if self._backend is Backend.VARLEN:
            return VarlenAttention(cos, sin, cu_seqlens, seq_len, dropout)
        return MaskedAttention(cos, sin, cu_seqlens, seq_len, dropout)


def _pack(cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor) -> Packed:
    """Concatenate the rows of cos and sin, (batch, seq, 1, rotary_dim / 2), and locate each token's document."""
    batch, seq = cos.shape[:2]
    index = torch.arange(seq, device=cu_seqlens.device, dtype=torch.int32).expand(batch, -1).contiguous()
    segment_ends = cu_seqlens[:, 1:].contiguous()
    segment = torch.searchsorted(segment_ends, index, right=True)
    row_starts = torch.arange(batch, device=cu_seqlens.device, dtype=torch.int32)[:, None] * seq
    starts = cu_seqlens.gather(1, segment) + row_starts
    ends = segment_ends.gather(1, segment) + row_starts
    return Packed(cos.flatten(0, 2), sin.flatten(0, 2), starts.flatten(), ends.flatten())
