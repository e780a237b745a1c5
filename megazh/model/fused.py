"""Embedding, blocks and last norm with Triton's kernels, forward and backward written out.

A block hands on two tensors whose sum is its output, so that the next norm adds them where it reads them. Its backward
pass computes gradients of inputs in the order in which they are needed, and sums those of weights where they belong
(see `main_grad`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megazh.model.attention import Packed
from megazh.model.layers import Block, Embedding
from megazh.model.main_grad import main_grad, product_gradient, vector_gradient


def run_fused(
    embedding: Embedding | None,
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    states: torch.Tensor,
    packed: Packed,
    recompute: bool,
) -> torch.Tensor:
    """Some layers of the decoder in a row.

    Args:
        embedding: takes (batch, seq) ids; without it, `states` are hidden states.
        norm: the last one, behind the blocks.
        states: (batch, seq) ids, or (batch, seq, hidden).
        recompute: keep only the input of each block, and compute it again in the backward pass.

    Returns:
        (batch, seq, hidden).
    """
    batch, seq = states.shape[:2]
    if embedding is not None:
        states = embedding(states) if main_grad(embedding.weight) is None else _embed(states, embedding)
    residual, delta = states.flatten(0, 1), None
    for block in blocks:
        assert isinstance(block, Block)
        residual, delta = _Block.apply(residual, delta, block, packed, recompute, *_for_autograd(*_weights(block)))
    if norm is not None:
        out = _Norm.apply(residual, delta, norm, *_for_autograd(_gain(norm)[0]))
    else:
        out = residual if delta is None else residual + delta
    return out.view(batch, seq, -1)


def _weights(block: Block) -> tuple[torch.Tensor | None, ...]:
    attention, mlp = block.attention, block.mlp
    return (
        block.attention_norm.weight, attention.qkv_proj.weight, attention.qkv_proj.bias, attention.o_proj.weight,
        block.mlp_norm.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # type: ignore[return-value]  # fmt: skip


def _for_autograd(*weights: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What autograd must know of: nothing where gradients are summed in `main_grad`.

    It would wait for the stream that it first saw a weight on, and a CUDA graph cannot be recorded so.
    """
    return () if any(weight is not None and main_grad(weight) is not None for weight in weights) else weights


def _gain(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight and epsilon."""
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    return norm.weight, norm.eps


@dataclass
class _Kept:
    """What the backward pass of a block wants from its forward pass, (tokens, ...) each."""

    x: torch.Tensor
    x_rstd: torch.Tensor
    x_normed: torch.Tensor
    qkv: torch.Tensor
    """Queries and keys rotated."""
    attended: torch.Tensor
    lse: torch.Tensor
    middle: torch.Tensor
    """Between attention and MLP."""
    middle_rstd: torch.Tensor
    middle_normed: torch.Tensor
    gate_up: torch.Tensor
    product: torch.Tensor


def _forward(
    residual: torch.Tensor, delta: torch.Tensor | None, block: Block, packed: Packed
) -> tuple[_Kept, torch.Tensor]:
    """All of a block; returns what to keep, and what the MLP adds to `middle`."""
    from megazh.kernels.attention import document_attention
    from megazh.kernels.norm import add_norm
    from megazh.kernels.rotary import rotate_
    from megazh.kernels.swiglu import swiglu

    attention, mlp = block.attention, block.mlp
    x, x_normed, x_rstd = add_norm(residual, delta, *_gain(block.attention_norm))
    qkv = nn.functional.linear(x_normed, attention.qkv_proj.weight, attention.qkv_proj.bias)
    rotate_(qkv, packed.cos, packed.sin, attention.heads + attention.kv_heads, attention.head_dim)
    attended, lse = document_attention(qkv, packed.starts, attention.heads, attention.kv_heads)
    projected = attended @ attention.o_proj.weight.T
    middle, middle_normed, middle_rstd = add_norm(x, projected, *_gain(block.mlp_norm))
    gate_up = middle_normed @ mlp.up_proj.weight.T
    product = swiglu(gate_up)
    kept = _Kept(
        x, x_rstd, x_normed, qkv, attended, lse, middle, middle_rstd, middle_normed, gate_up, product
    )  # fmt: skip
    return kept, product @ mlp.down_proj.weight.T


class _Block(torch.autograd.Function):
    """(residual, delta) to (middle, what the MLP adds)."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        block: Block,
        packed: Packed,
        recompute: bool,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept, added = _forward(residual, delta, block, packed)
        ctx.block, ctx.packed, ctx.recompute = block, packed, recompute
        ctx.adds, ctx.done, ctx.weights_known = delta is not None, False, len(weights)
        ctx.save_for_backward(*([kept.x] if recompute else vars(kept).values()))
        return kept.middle, added

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        from megazh.kernels.attention import document_attention_backward
        from megazh.kernels.norm import norm_backward
        from megazh.kernels.swiglu import swiglu_backward_

        if ctx.done:
            raise RuntimeError("a fused block's backward pass writes over what it kept, and cannot run twice")
        ctx.done = True
        grad_middle, grad_added = (gradient.contiguous() for gradient in gradients)
        block, packed = ctx.block, ctx.packed
        attention, mlp = block.attention, block.mlp
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        kept = _forward(saved[0], None, block, packed)[0] if ctx.recompute else _Kept(*saved)
        attention_gain, mlp_gain = block.attention_norm.weight, block.mlp_norm.weight

        grad_product = grad_added @ mlp.down_proj.weight
        grad_down = product_gradient(mlp.down_proj.weight, grad_added, kept.product)
        grad_gate_up = swiglu_backward_(kept.gate_up, grad_product)
        grad_normed = grad_gate_up @ mlp.up_proj.weight
        grad_up = product_gradient(mlp.up_proj.weight, grad_gate_up, kept.middle_normed)
        grad_middle, gain = norm_backward(grad_normed, kept.middle, kept.middle_rstd, mlp_gain, grad_middle)
        grad_mlp_norm = vector_gradient(mlp_gain, gain)

        grad_attended = grad_middle @ attention.o_proj.weight
        grad_o = product_gradient(attention.o_proj.weight, grad_middle, kept.attended)
        bias = attention.qkv_proj.bias
        grad_qkv, summed = document_attention_backward(
            grad_attended, kept.qkv, packed.starts, packed.ends, kept.attended, kept.lse, attention.heads,
            attention.kv_heads, packed.cos, packed.sin, bias is not None,
        )  # fmt: skip
        grad_bias = None if bias is None or summed is None else vector_gradient(bias, summed)
        grad_normed = grad_qkv @ attention.qkv_proj.weight
        grad_weight = product_gradient(attention.qkv_proj.weight, grad_qkv, kept.x_normed)
        grad_x, gain = norm_backward(grad_normed, kept.x, kept.x_rstd, attention_gain, grad_middle)
        grad_attention_norm = vector_gradient(attention_gain, gain)
        gradients_of_weights = (
            grad_attention_norm, grad_weight, grad_bias, grad_o, grad_mlp_norm, grad_up, grad_down,
        )  # fmt: skip
        known = ctx.weights_known
        return grad_x, grad_x if ctx.adds else None, None, None, None, *gradients_of_weights[:known]


class _Norm(torch.autograd.Function):
    """The norm of the sum of two tensors."""

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, delta: torch.Tensor | None, norm: nn.Module, *weights: torch.Tensor | None
    ) -> torch.Tensor:
        from megazh.kernels.norm import add_norm

        total, normed, rstd = add_norm(residual, delta, *_gain(norm))
        ctx.adds, ctx.weight, ctx.weights_known = delta is not None, _gain(norm)[0], len(weights)
        ctx.save_for_backward(total, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        from megazh.kernels.norm import norm_backward

        total, rstd = ctx.saved_tensors
        grad_x, gain = norm_backward(gradients[0].contiguous(), total, rstd, ctx.weight, None)
        grad_weight = vector_gradient(ctx.weight, gain)
        return grad_x, grad_x if ctx.adds else None, None, *(grad_weight,)[: ctx.weights_known]


def _embed(tokens: torch.Tensor, embedding: Embedding) -> torch.Tensor:
    """Like `Embedding`, with a gradient that is summed in `main_grad`."""
    # Where no weight is known to autograd, this is what makes the states want a gradient.
    anchor = torch.empty(0, device=tokens.device, requires_grad=True)
    hidden = _Embed.apply(tokens, anchor, embedding.weight.detach(), main_grad(embedding.weight))
    return hidden if embedding.scale == 1.0 else hidden * embedding.scale


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, anchor: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        ctx.sums = sums
        ctx.save_for_backward(tokens)
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        from megazh.kernels.embedding import add_embedding_gradient_

        (tokens,) = ctx.saved_tensors
        add_embedding_gradient_(ctx.sums, tokens.flatten(), gradients[0].flatten(0, 1).contiguous(), 1.0)
        return None, None, None, None
