"""Embedding, blocks and last norm with Triton kernels, forward and backward written out.

A block returns two tensors whose sum is its output, so that the next norm kernel adds them as it reads them. The
backward pass computes input gradients in the order in which they are needed. It adds weight gradients to `main_grad`
where a weight has one (see `megazh.model.main_grad`).
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
    """Run consecutive layers of the decoder.

    Args:
        embedding: the embedding, if the layers start with it.
        blocks: any number of blocks.
        norm: the last norm, if the layers end with it.
        states: (batch, seq) token ids with an embedding, else (batch, seq, hidden) hidden states.
        packed: rotation and document boundaries of the micro-batch.
        recompute: keep only the input of each block and recompute its activations in the backward pass.

    Returns:
        (batch, seq, hidden).
    """
    batch, seq = states.shape[:2]
    if embedding is not None:
        states = embedding(states) if main_grad(embedding.weight) is None else _embed(states, embedding)
    residual, delta = states.flatten(0, 1), None
    for block in blocks:
        assert isinstance(block, Block)
        weights = _weights(block)
        residual = _reached_by_backward(residual, weights)
        residual, delta = _Block.apply(residual, delta, block, packed, recompute, *_for_autograd(weights))
    if norm is not None:
        weights = (_weight_and_eps(norm)[0],)
        residual = _reached_by_backward(residual, weights)
        out = _Norm.apply(residual, delta, norm, *_for_autograd(weights))
    else:
        out = residual if delta is None else residual + delta
    return out.view(batch, seq, -1)


_Weights = tuple[torch.Tensor | None, ...]


def _weights(block: Block) -> _Weights:
    attention, mlp = block.attention, block.mlp
    return (
        block.attention_norm.weight, attention.qkv_proj.weight, attention.qkv_proj.bias, attention.o_proj.weight,
        block.mlp_norm.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # type: ignore[return-value]  # fmt: skip


def _in_place(weights: _Weights) -> bool:
    """Whether gradients of a layer are added to `main_grad`. Frozen weights have none, whatever the others have."""
    return any(weight is not None and main_grad(weight) is not None for weight in weights)


def _for_autograd(weights: _Weights) -> _Weights:
    """The weights to pass to autograd: none of them where gradients are added to `main_grad`.

    Autograd waits for the stream on which it first saw a weight, and a CUDA graph cannot be recorded with that wait in
    it.
    """
    return () if _in_place(weights) else weights


def _reached_by_backward(states: torch.Tensor, weights: _Weights) -> torch.Tensor:
    """The states, made to require a gradient if weights that autograd does not know are trained on them.

    States do not require one where all layers before are frozen, and then no backward pass would run.
    """
    if states.requires_grad or not torch.is_grad_enabled() or not _in_place(weights):
        return states
    return states.detach().requires_grad_()


def _weight_and_eps(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight and epsilon of an RMS norm."""
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    return norm.weight, norm.eps


@dataclass
class _Saved:
    """Tensors that the backward pass of a block needs from its forward pass, (tokens, ...) except `lse`."""

    x: torch.Tensor
    """Input of the block."""
    x_rstd: torch.Tensor
    """Reciprocal root mean square of each row of `x`; likewise `middle_rstd`."""
    x_normed: torch.Tensor
    """Normed input of the attention; likewise `middle_normed` of the MLP."""
    qkv: torch.Tensor
    """Rotated queries and keys, and values."""
    attended: torch.Tensor
    """Output of the attention, before its output projection."""
    lse: torch.Tensor
    """Base-2 log-sum-exp of the attention scores, (heads, tokens)."""
    middle: torch.Tensor
    """Hidden state between attention and MLP."""
    middle_rstd: torch.Tensor
    middle_normed: torch.Tensor
    gate_up: torch.Tensor
    """Gate and up projection of the MLP, side by side."""
    product: torch.Tensor
    """Input of the down projection: silu(gate) * up."""


def _forward(
    residual: torch.Tensor, delta: torch.Tensor | None, block: Block, packed: Packed
) -> tuple[_Saved, torch.Tensor]:
    """Run a block; returns the tensors for its backward pass, and the MLP's output, not yet added to `middle`."""
    from megazh.kernels.attention import document_attention
    from megazh.kernels.norm import add_norm
    from megazh.kernels.rotary import rotate_
    from megazh.kernels.swiglu import swiglu

    attention, mlp = block.attention, block.mlp
    x, x_normed, x_rstd = add_norm(residual, delta, *_weight_and_eps(block.attention_norm))
    qkv = nn.functional.linear(x_normed, attention.qkv_proj.weight, attention.qkv_proj.bias)
    rotate_(qkv, packed.cos, packed.sin, attention.heads + attention.kv_heads, attention.head_dim)
    attended, lse = document_attention(qkv, packed.starts, attention.heads, attention.kv_heads)
    projected = attended @ attention.o_proj.weight.T
    middle, middle_normed, middle_rstd = add_norm(x, projected, *_weight_and_eps(block.mlp_norm))
    gate_up = middle_normed @ mlp.up_proj.weight.T
    product = swiglu(gate_up)
    kept = _Saved(
        x, x_rstd, x_normed, qkv, attended, lse, middle, middle_rstd, middle_normed, gate_up, product
    )  # fmt: skip
    return kept, product @ mlp.down_proj.weight.T


class _Block(torch.autograd.Function):
    """One block: (residual, delta) to (middle, output of the MLP); the sum of each pair is a hidden state."""

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
        kept, mlp_out = _forward(residual, delta, block, packed)
        ctx.block, ctx.packed, ctx.recompute = block, packed, recompute
        ctx.has_delta, ctx.ran_backward, ctx.weight_count = delta is not None, False, len(weights)
        ctx.save_for_backward(*([kept.x] if recompute else vars(kept).values()))
        return kept.middle, mlp_out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        from megazh.kernels.attention import document_attention_backward
        from megazh.kernels.norm import norm_backward
        from megazh.kernels.swiglu import swiglu_backward_

        if ctx.ran_backward:
            raise RuntimeError(
                "the backward pass of a fused block overwrites its saved activations and cannot run twice; "
                "run the forward pass again"
            )
        ctx.ran_backward = True
        grad_middle, grad_mlp_out = (gradient.contiguous() for gradient in gradients)
        block, packed = ctx.block, ctx.packed
        attention, mlp = block.attention, block.mlp
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        kept = _forward(saved[0], None, block, packed)[0] if ctx.recompute else _Saved(*saved)
        attention_gain, mlp_gain = block.attention_norm.weight, block.mlp_norm.weight

        grad_product = grad_mlp_out @ mlp.down_proj.weight
        grad_down = product_gradient(mlp.down_proj.weight, grad_mlp_out, kept.product)
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
            attention.kv_heads, packed.cos, packed.sin, bias is not None and bias.requires_grad,
        )  # fmt: skip
        grad_bias = None if bias is None or summed is None else vector_gradient(bias, summed)
        grad_normed = grad_qkv @ attention.qkv_proj.weight
        grad_weight = product_gradient(attention.qkv_proj.weight, grad_qkv, kept.x_normed)
        grad_x, gain = norm_backward(grad_normed, kept.x, kept.x_rstd, attention_gain, grad_middle)
        grad_attention_norm = vector_gradient(attention_gain, gain)
        weight_gradients = (
            grad_attention_norm, grad_weight, grad_bias, grad_o, grad_mlp_norm, grad_up, grad_down,
        )  # fmt: skip
        return grad_x, grad_x if ctx.has_delta else None, None, None, None, *weight_gradients[: ctx.weight_count]


class _Norm(torch.autograd.Function):
    """The last norm, over the sum of two tensors."""

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, delta: torch.Tensor | None, norm: nn.Module, *weights: torch.Tensor | None
    ) -> torch.Tensor:
        from megazh.kernels.norm import add_norm

        total, normed, rstd = add_norm(residual, delta, *_weight_and_eps(norm))
        ctx.has_delta, ctx.weight, ctx.weight_count = delta is not None, _weight_and_eps(norm)[0], len(weights)
        ctx.save_for_backward(total, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        from megazh.kernels.norm import norm_backward

        total, rstd = ctx.saved_tensors
        grad_x, gain = norm_backward(gradients[0].contiguous(), total, rstd, ctx.weight, None)
        grad_weight = vector_gradient(ctx.weight, gain)
        return grad_x, grad_x if ctx.has_delta else None, None, *(grad_weight,)[: ctx.weight_count]


def _embed(tokens: torch.Tensor, embedding: Embedding) -> torch.Tensor:
    """Like `Embedding`, but with its gradient added to `main_grad`."""
    # Autograd does not know the weight here, so that this empty tensor makes the hidden states require a gradient.
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
        add_embedding_gradient_(ctx.sums, tokens.flatten(), gradients[0].flatten(0, 1).contiguous())
        return None, None, None, None
