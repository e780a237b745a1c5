"""Attention within documents: prepared once per micro-batch from its document boundaries, then used by every block.

Fused blocks (`megazh.model.fused`) read the boundaries as two numbers per token (`Packed`). Other blocks call an
`Attend`: `varlen` on CUDA in bf16 and fp16, SDPA with a boolean mask elsewhere, and a cache of keys and values for
generation. No token ever attends to another document or to the future. In training, attention may be limited to groups
(`megazh.model.shifted_groups`); then halves of the heads have boundaries of their own.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megazh.model.backend import Backend
from megazh.model.config import ModelConfig
from megazh.model.dropout import Dropout, Site
from megazh.model.rope import Rotary
from megazh.model.shifted_groups import group_bounds


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
    """Index of the first token that each token may attend to: (parts, tokens) int32, one row for each equal part of
    the heads. With full attention there is one part, and it is the first token of the document."""
    ends: torch.Tensor
    """Index one past the last token that may attend to each token: (parts, tokens) int32. With full attention, one past
    the last token of the document."""


class VarlenAttention:
    """Flash attention over the segments of all rows, concatenated; one call for each part of the heads."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        dropout: Dropout | None = None,
    ) -> None:
        """Prepare the attention of one micro-batch.

        Args:
            cos, sin, dropout: see `Attend`; attention weights are not dropped here.
            starts: see `Packed`.
            longest: largest number of tokens that a segment may have.
        """
        self.cos, self.sin, self.dropout = cos, sin, dropout
        index = torch.arange(starts.shape[1], device=starts.device, dtype=torch.int32)
        total = torch.full((1,), starts.shape[1], device=starts.device, dtype=torch.int32)
        # Only segments that have tokens: the kernel's time grows with their number, up to four times on an H200.
        # Looking for them makes the CPU wait for the GPU once per micro-batch, which costs far less.
        self._cu_seqlens = [torch.cat((index[index == part], total)) for part in starts]
        self._longest = longest

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        parts = _by_part(len(self._cu_seqlens), query, key, value)
        return _joined([self._attend(*part, at) for part, at in zip(parts, self._cu_seqlens, strict=True)])

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
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
            cu_seqlens,
            cu_seqlens,
            self._longest,
            self._longest,
            scale=head_dim**-0.5,
            window_size=(-1, 0),
            **options,
        )
        return attended[..., :head_dim].reshape(batch, seq, heads, head_dim)


class MaskedAttention:
    """SDPA with a boolean mask for each part of the heads, true where a token may attend."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        starts: torch.Tensor,
        dropout: Dropout | None = None,
    ) -> None:
        """Prepare the attention of one micro-batch.

        Args:
            cos, sin, dropout: see `Attend`.
            starts: (parts, batch, seq) int32, index in its row of the first token that each token may attend to.
        """
        self.cos, self.sin, self.dropout = cos, sin, dropout
        index = torch.arange(starts.shape[2], device=starts.device, dtype=torch.int32)
        past = index[:, None] >= index[None, :]
        self._masks = [(past & (index >= part[:, :, None]))[:, None] for part in starts]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        if self.dropout is None or not self.dropout.on_weights:
            parts = _by_part(len(self._masks), query, key, value)
            return _joined([attend_with_mask(*part, mask) for part, mask in zip(parts, self._masks, strict=True)])
        # SDPA draws its masks from the global generator: here the softmax is written out.
        heads = query.shape[2]
        key, value = (states.repeat_interleave(heads // states.shape[2], 2) for states in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
        mask = torch.cat(self._masks, 1).repeat_interleave(heads // len(self._masks), 1)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", self.dropout(weights, Site.WEIGHTS, layer), value)


def _by_part(
    parts: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cut the heads into equal parts, each with the key and value heads that it reads."""
    return zip(*(states.chunk(parts, 2) for states in (query, key, value)), strict=True)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The heads of all parts in order."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


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
        self,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        dropout: Dropout | None = None,
        group: int | None = None,
    ) -> Attend | Packed:
        """Prepare the attention of one micro-batch.

        Args:
            position_ids: (batch, seq) integers.
            cu_seqlens: (batch, segments + 1) int32, boundaries of the segments of each row, padded with seq.
            dropout: dropout of the micro-batch; None outside of training. A fused backend has none.
            group: tokens per group of shifted sparse attention, for training only; the model has an even number of key
                and value heads. None: full attention within documents.

        Returns:
            A `Packed` if the backend is fused, else an `Attend`.
        """
        cos, sin = self._rotary(position_ids)
        starts, ends = _bounds(cu_seqlens, position_ids.shape[1], group)
        if self._backend is Backend.MASKED:
            return MaskedAttention(cos, sin, starts, dropout)
        batch, seq_len = position_ids.shape
        row_starts = torch.arange(batch, device=cu_seqlens.device, dtype=torch.int32)[:, None] * seq_len
        starts, ends = ((each + row_starts).flatten(1) for each in (starts, ends))
        if self._backend is Backend.FUSED:
            return Packed(cos.flatten(0, 2), sin.flatten(0, 2), starts, ends)
        return VarlenAttention(cos, sin, starts, min(group or seq_len, seq_len), dropout)


def _bounds(cu_seqlens: torch.Tensor, seq_len: int, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token, the first that it may attend to and one past the last that may attend to it, by index in its row.

    Args:
        cu_seqlens: (batch, segments + 1) int32, boundaries of the segments of each row, padded with `seq_len`.
        seq_len: tokens per row.
        group: tokens per group of shifted sparse attention; None: full attention.

    Returns:
        (parts, batch, seq) int32 each; one row for each equal part of the heads.
    """
    index = torch.arange(seq_len, device=cu_seqlens.device, dtype=torch.int32).expand(len(cu_seqlens), -1).contiguous()
    segment_ends = cu_seqlens[:, 1:].contiguous()
    segment = torch.searchsorted(segment_ends, index, right=True)
    starts, ends = cu_seqlens.gather(1, segment), segment_ends.gather(1, segment)
    return (starts[None], ends[None]) if group is None else group_bounds(index, starts, ends, group)
