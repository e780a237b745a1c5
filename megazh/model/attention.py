"""Attention within documents: where a micro-batch's documents begin and end, made once and used by every block.

Fused blocks (`megazh.model.fused`) get it as two numbers a token. Others call it: `varlen` on CUDA in bf16 and fp16, a
block mask with SDPA elsewhere, and, for generation, a cache of keys and values. None lets a token see another document
or the future.
"""

import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megazh.errors import UsageError
from megazh.kernels.support import why_not
from megazh.model.config import Mlp, ModelConfig, Norm
from megazh.model.rope import Rotary


class Backend(StrEnum):
    """How blocks and their packed attention are computed."""

    FUSED = "fused"
    """Triton's kernels, blocks written out both ways (`megazh.model.fused`); CUDA from sm80 on, bf16 and fp16."""
    VARLEN = "varlen"
    """`torch.nn.attention.varlen`: flash attention over segments; CUDA from sm80 on, bf16 and fp16."""
    MASKED = "masked"
    """`scaled_dot_product_attention` with a boolean mask of (batch, 1, seq, seq)."""


class Attend(Protocol):
    """What a block needs to know of its micro-batch."""

    cos: torch.Tensor
    """(batch, seq, 1, rotary_dim / 2) fp32."""
    sin: torch.Tensor

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of block `layer`: (batch, seq, heads, head_dim) from rotated queries and keys, and values."""
        ...


@dataclass(frozen=True)
class Packed:
    """What fused blocks need to know of a micro-batch, whose rows lie end to end."""

    cos: torch.Tensor
    """(tokens, rotary_dim / 2) fp32."""
    sin: torch.Tensor
    starts: torch.Tensor
    """(tokens,) int32: where the document of each token begins."""
    ends: torch.Tensor
    """(tokens,) int32: behind its last token."""


_MOST_HEAD_DIM = 128


def unfit_for_kernels(config: ModelConfig) -> str | None:
    """Why blocks of this model do not run fused on any card; None: they do."""
    unfit = {
        "layernorm has no kernel": config.norm is not Norm.RMSNORM,
        "only swiglu has a kernel": config.mlp is not Mlp.SWIGLU,
        "parallel_residual has no kernel": config.parallel_residual,
        "dropout has no kernel": bool(config.residual_dropout or config.attention_dropout),
        f"heads of more than {_MOST_HEAD_DIM} dimensions have no kernel": config.head_size > _MOST_HEAD_DIM,
    }
    return next((reason for reason, applies in unfit.items() if applies), None)


def why_not_fused(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why blocks of this model do not run fused here; None: they do."""
    return unfit_for_kernels(config) or why_not(device, dtype)


def choose_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: bool = True) -> Backend:
    """The backend for this device and dtype.

    Args:
        kernels: whether Triton's may serve.

    Raises:
        UsageError: the model wants attention dropout, and the backend has none.
    """
    if kernels and device.type == "cuda" and why_not_fused(config, device, dtype) is None:
        return Backend.FUSED
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        if config.attention_dropout:
            raise UsageError(
                f"attention_dropout {config.attention_dropout}: flash attention on CUDA in {dtype} has no dropout; "
                "set model.attention_dropout=0 (residual_dropout works), or precision=fp32"
            )
        return Backend.VARLEN
    return Backend.MASKED


class VarlenAttention:
    """Flash attention over the segments of all rows, laid end to end."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor, seq_len: int) -> None:
        """`cu_seqlens`: (batch, max_docs + 1) int32, where segments begin and end, filled up with `seq_len`."""
        self.cos, self.sin = cos, sin
        rows = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=torch.int32)[:, None] * seq_len
        total = torch.full((1,), len(cu_seqlens) * seq_len, device=cu_seqlens.device, dtype=torch.int32)
        # Without the empty segments behind the last one: the kernel's time grows with their number, to four times as
        # much on an H200. To leave them out is to wait for the GPU once a micro-batch, which costs far less.
        self._cu_seqlens = torch.cat(((cu_seqlens[:, :-1] + rows)[cu_seqlens[:, :-1] < seq_len], total))
        self._longest = seq_len

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        from torch.nn.attention import varlen  # its kernels are for CUDA alone

        varlen_attn: Any = varlen.varlen_attn  # its signature differs between versions of torch
        batch, seq, heads, head_dim = query.shape
        grouped = key.shape[2] != heads
        options: dict[str, bool] = {}
        if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options = {"enable_gqa": True}  # torch 2.11 cannot
        elif grouped:
            key, value = (states.repeat_interleave(heads // key.shape[2], 2) for states in (key, value))
        padding = -head_dim % 8  # the kernel takes multiples of 8 only; zeros change no product
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
    """SDPA with a mask that is true where a token may look: back, within its own document."""

    def __init__(
        self, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor, seq_len: int, dropout: float = 0.0
    ) -> None:
        """`cu_seqlens` as for `VarlenAttention`; `dropout` on attention weights, 0 outside of training."""
        self.cos, self.sin, self._dropout = cos, sin, dropout
        places = torch.arange(seq_len, device=cu_seqlens.device, dtype=torch.int32)
        inner = cu_seqlens[:, 1:].contiguous()
        documents = torch.searchsorted(inner, places.expand(len(inner), -1).contiguous(), right=True)
        same = documents[:, :, None] == documents[:, None, :]
        self._mask = (same & (places[:, None] >= places[None, :]))[:, None]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        return attend_with_mask(query, key, value, self._mask, self._dropout)


def attend_with_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """SDPA over (batch, seq, heads, head_dim), grouped heads allowed, with a boolean mask that broadcasts."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return attended.transpose(1, 2)


class Documents:
    """Makes the attention of a micro-batch from its packing; one for a model or a stage."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._config, self._backend = config, backend
        self._rotary = Rotary(config)

    @torch.no_grad()
    def __call__(self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, training: bool) -> Attend | Packed:
        """The attention of one micro-batch.

        Args:
            position_ids: (batch, seq) integers.
            cu_seqlens: (batch, max_docs + 1) int32, filled up with seq.
            training: whether dropout applies.
        """
        cos, sin = self._rotary(position_ids)
        seq_len = position_ids.shape[1]
        if self._backend is Backend.FUSED:
            return _pack(cos, sin, cu_seqlens)
        if self._backend is Backend.VARLEN:
            return VarlenAttention(cos, sin, cu_seqlens, seq_len)
        dropout = self._config.attention_dropout if training else 0.0
        return MaskedAttention(cos, sin, cu_seqlens, seq_len, dropout)


def _pack(cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor) -> Packed:
    """From cosines and sines, (batch, seq, 1, rotary_dim / 2), and boundaries, (batch, max_docs + 1) int32."""
    batch, seq = cos.shape[:2]
    places = torch.arange(seq, device=cu_seqlens.device, dtype=torch.int32).expand(batch, -1).contiguous()
    inner = cu_seqlens[:, 1:].contiguous()
    segment = torch.searchsorted(inner, places, right=True)
    rows = torch.arange(batch, device=cu_seqlens.device, dtype=torch.int32)[:, None] * seq
    starts, ends = cu_seqlens.gather(1, segment) + rows, inner.gather(1, segment) + rows
    return Packed(cos.flatten(0, 2), sin.flatten(0, 2), starts.flatten(), ends.flatten())
