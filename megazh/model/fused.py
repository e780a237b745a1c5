"""Embedding, blocks and last norm with Triton kernels, forward and backward written out.

A block returns two tensors whose sum is its output, so that the next norm kernel adds them as it reads them. The
backward pass computes input gradients in the order in which they are needed. It adds weight gradients to `main_grad`
where a weight has one (see `megazh.model.main_grad`). Frozen weights cost no product, and inputs of products are kept
only where a weight or a low-rank pair is trained on them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megazh.model.attention import Packed
from megazh.model.embedding_noise import EmbeddingNoise
from megazh.model.layers import Block, Embedding, Linear
from megazh.model.main_grad import main_grad, product_gradient, vector_gradient


def run_fused(
    embedding: Embedding | None,
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    states: torch.Tensor,
    packed: Packed,
    recompute: bool,
    noise: EmbeddingNoise | None = None,
) -> torch.Tensor:
    """Run consecutive layers of the decoder.

    Args:
        embedding: the embedding, if the layers start with it.
        blocks: any number of blocks.
        norm: the last norm, if the layers end with it.
        states: (batch, seq) token ids with an embedding, else (batch, seq, hidden) hidden states.
        packed: rotation and document boundaries of the micro-batch.
        recompute: keep only the input of each block and recompute its activations in the backward pass.
        noise: noise on the embedded tokens, if the layers start with the embedding.

    Returns:
        (batch, seq, hidden).
    """
    batch, seq = states.shape[:2]
    if embedding is not None:
        states = embedding(states) if main_grad(embedding.weight) is None else _embed(states, embedding)
        states = states if noise is None else noise(states)
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


_Weights = tuple[torch.Tensor, ...]


def _weights(block: Block) -> _Weights:
    """All parameters of a block, those of low-rank pairs included."""
    return tuple(block.parameters())


def _in_place(weights: _Weights) -> bool:
    """Whether gradients of a layer are added to `main_grad`. Frozen weights have none, whatever the others have."""
    return any(main_grad(weight) is not None for weight in weights)


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
    x_normed: torch.Tensor | None
    """Normed input of the attention; likewise `middle_normed` of the MLP. None where nothing is trained on it."""
    qkv: torch.Tensor
    """Rotated queries and keys, and values."""
    attended: torch.Tensor
    """Output of the attention, before its output projection."""
    lse: torch.Tensor
    """Base-2 log-sum-exp of the attention scores, (heads, tokens)."""
    middle: torch.Tensor
    """Hidden state between attention and MLP."""
    middle_rstd: torch.Tensor
    middle_normed: torch.Tensor | None
    gate_up: torch.Tensor
    """Gate and up projection of the MLP, side by side."""
    product: torch.Tensor | None
    """Input of the down projection: silu(gate) * up. None where nothing is trained on it."""


def _project(linear: Linear, inputs: torch.Tensor) -> torch.Tensor:
    """A product with its low-rank pairs: (tokens, inputs) to (tokens, rows)."""
    out = nn.functional.linear(inputs, linear.weight, linear.bias)
    for pair in linear.pairs:
        pair.add_(out, inputs)
    return out


def _if_trained(linear: Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """The input of a product, if its backward pass needs it."""
    return inputs if linear.weight.requires_grad or linear.pairs else None


_Gradients = dict[torch.Tensor, torch.Tensor | None]


def _project_backward(
    linear: Linear, grad: torch.Tensor, inputs: torch.Tensor | None, found: _Gradients
) -> torch.Tensor:
    """Backward pass of `_project`; returns the gradient of its input.

    Args:
        linear: the product.
        grad: gradient of its output; the caller must not overwrite it.
        inputs: its input; None where nothing is trained on it.
        found: takes the gradients of the matrices that have no `main_grad`.
    """
    grad_inputs = grad @ linear.weight
    if inputs is not None:
        found[linear.weight] = product_gradient(linear.weight, grad, inputs)
        for pair in linear.pairs:
            found.update(pair.backward_(grad_inputs, grad, inputs))
    return grad_inputs


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
    qkv = _project(attention.qkv_proj, x_normed)
    rotate_(qkv, packed.cos, packed.sin, attention.heads + attention.kv_heads, attention.head_dim)
    attended, lse = document_attention(qkv, packed.starts, attention.heads, attention.kv_heads)
    projected = _project(attention.o_proj, attended)
    middle, middle_normed, middle_rstd = add_norm(x, projected, *_weight_and_eps(block.mlp_norm))
    gate_up = _project(mlp.up_proj, middle_normed)
    product = swiglu(gate_up)
    kept = _Saved(
        x, x_rstd, _if_trained(attention.qkv_proj, x_normed), qkv, attended, lse, middle, middle_rstd,
        _if_trained(mlp.up_proj, middle_normed), gate_up, _if_trained(mlp.down_proj, product),
    )  # fmt: skip
    return kept, _project(mlp.down_proj, product)


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
        *weights: torch.Tensor,
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
        found: _Gradients = {}

        grad_product = _project_backward(mlp.down_proj, grad_mlp_out, kept.product, found)
        grad_gate_up = swiglu_backward_(kept.gate_up, grad_product)
        grad_normed = _project_backward(mlp.up_proj, grad_gate_up, kept.middle_normed, found)
        grad_middle, gain = norm_backward(
            grad_normed, kept.middle, kept.middle_rstd, mlp_gain, grad_middle, mlp_gain.requires_grad
        )
        if gain is not None:
            found[mlp_gain] = vector_gradient(mlp_gain, gain)

        grad_attended = _project_backward(attention.o_proj, grad_middle, kept.attended, found)
        bias = attention.qkv_proj.bias
        grad_qkv, summed = document_attention_backward(
            grad_attended, kept.qkv, packed.starts, packed.ends, kept.attended, kept.lse, attention.heads,
            attention.kv_heads, packed.cos, packed.sin, bias is not None and bias.requires_grad,
        )  # fmt: skip
        if summed is not None:
            found[bias] = vector_gradient(bias, summed)
        grad_normed = _project_backward(attention.qkv_proj, grad_qkv, kept.x_normed, found)
        grad_x, gain = norm_backward(
            grad_normed, kept.x, kept.x_rstd, attention_gain, grad_middle, attention_gain.requires_grad
        )
        if gain is not None:
            found[attention_gain] = vector_gradient(attention_gain, gain)
        gradients_of_weights = [found.get(weight) for weight in _weights(block)][: ctx.weight_count]
        return grad_x, grad_x if ctx.has_delta else None, None, None, None, *gradients_of_weights


class _Norm(torch.autograd.Function):
    """The last norm, over the sum of two tensors."""

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, delta: torch.Tensor | None, norm: nn.Module, *weights: torch.Tensor
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
        grad_x, gain = norm_backward(gradients[0].contiguous(), total, rstd, ctx.weight, None, ctx.weight.requires_grad)
        grad_weight = None if gain is None else vector_gradient(ctx.weight, gain)
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
