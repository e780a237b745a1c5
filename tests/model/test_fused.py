"""Fused blocks (in Triton's interpreter) against torch blocks: values, every gradient, isolation of documents."""

from typing import Any

import pytest
import torch
from decoders import decoder, packed, small
from torch.utils._python_dispatch import TorchDispatchMode

from megazh.model.attention import Documents
from megazh.model.backend import Backend
from megazh.model.decoder import Decoder, run_layers
from megazh.model.loss import loss_and_gradient, summed_cross_entropy
from megazh.model.main_grad import Product, add_postponed

ROWS = [[6, 5, 5], [3, 1, 9]]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen": {"qkv_bias": True, "rope_theta": 1e6},
    "grouped": {"num_key_value_heads": 2},
    "head_dim 12, a part rotated": {
        "head_dim": 12, "num_attention_heads": 3, "partial_rotary_factor": 0.5, "qkv_bias": True,
    },
    "scaled embedding, untied": {"embedding_scale": 5.5, "tie_word_embeddings": False},
}  # fmt: skip


def loss_of(
    model: Decoder, backend: Backend, checkpointing: bool = False, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and all gradients; returns hidden states and labels."""
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(model.config, backend)(positions, cu_seqlens, group=group)
    hidden = run_layers(model.embedding, model.blocks, model.norm, tokens, attend, checkpointing)
    fused = backend is Backend.FUSED
    vocab = model.config.vocab_size
    summed_cross_entropy(hidden, model.head.weight, labels, z_loss=0.01, fused=fused, vocab=vocab).backward()
    return hidden.detach(), labels


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "group"), [*((name, None) for name in SHAPES), ("qwen", 4), ("grouped", 2)])
def test_is_what_plain_blocks_compute(name: str, group: int | None, checkpointing: bool) -> None:
    plain, fused = decoder(small(**SHAPES[name])), decoder(small(**SHAPES[name]))
    wanted, _ = loss_of(plain, Backend.MASKED, group=group)
    found, _ = loss_of(fused, Backend.FUSED, checkpointing, group)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    for (key, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None, key
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("postpones", [False, True])
def test_gradients_are_added_where_they_are_summed(postpones: bool) -> None:
    plain, fused = decoder(small(qkv_bias=True)), decoder(small(qkv_bias=True))
    loss_of(plain, Backend.MASKED)
    sums, later = {}, []
    for key, parameter in fused.named_parameters():
        parameter.main_grad = sums[key] = torch.full_like(parameter, 0.5, dtype=torch.float32)
        if postpones:
            parameter.postponed = later
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(fused.config, Backend.FUSED)(positions, cu_seqlens)
    hidden = run_layers(fused.embedding, fused.blocks, fused.norm, tokens, attend, False)
    scale = torch.ones(())
    _, gradient, _ = loss_and_gradient(hidden, fused.head.weight, labels, 0.01, scale, True, fused.config.vocab_size)
    hidden.backward(gradient)
    if postpones:
        products = {key for key in sums if key.endswith("proj.weight")} | {"embedding.weight"}
        assert len(later) == len(products), "each matrix of a block, and the head's"
        untouched = [key for key in products - {"embedding.weight"} if (sums[key] == 0.5).all()]
        assert sorted(untouched) == sorted(products - {"embedding.weight"})
        add_postponed(later)
        assert later == []
    for key, parameter in plain.named_parameters():
        assert dict(fused.named_parameters())[key].grad is None
        torch.testing.assert_close(
            sums[key] - 0.5, parameter.grad, rtol=1e-4, atol=3e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


FROZEN: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "embedding and first block": ("embedding", "blocks.0"),
    "head": ("head",),
    "all but norms and biases": ("embedding", "head", "proj.weight"),
    "some matrices": ("blocks.0.attention.qkv_proj.weight", "blocks.1.mlp", "blocks.0.attention_norm"),
    "all": ("",),
}
"""Parts of the names of frozen parameters, by case."""


class Added(TorchDispatchMode):
    """Counts matrix products that are added to a sum: weight gradients."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("postpones", [False, True])
@pytest.mark.parametrize("case", FROZEN)
def test_frozen_weights_get_no_gradient_and_cost_no_product(case: str, postpones: bool, tied: bool) -> None:
    config = small(qkv_bias=True, tie_word_embeddings=tied)
    plain, fused = decoder(config), decoder(config)
    later: list[Product] = []
    trained: dict[str, Any] = {}
    for model in (plain, fused):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in key for part in FROZEN[case]))
    for key, parameter in fused.named_parameters():
        if parameter.requires_grad:
            trained[key] = parameter
            parameter.main_grad = torch.zeros_like(parameter)
            if postpones:
                parameter.postponed = later
    if case != "all":
        loss_of(plain, Backend.MASKED)
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(config, Backend.FUSED)(positions, cu_seqlens)
    hidden = run_layers(fused.embedding, fused.blocks, fused.norm, tokens, attend, False)
    with Added() as added:
        one = torch.ones(())
        _, gradient, _ = loss_and_gradient(hidden, fused.head.weight, labels, 0.01, one, True, config.vocab_size)
        if case == "all":
            assert not hidden.requires_grad
        else:
            hidden.backward(gradient)
        assert postpones == bool(later) or not any(parameter.dim() == 2 for parameter in trained.values())
        add_postponed(later)
    matrices = [key for key in trained if key.endswith("proj.weight")]
    head = "embedding.weight" if tied else "head.weight"
    assert added.products == len(matrices) + (head in trained)
    for key, parameter in plain.named_parameters():
        if key in trained:
            torch.testing.assert_close(trained[key].main_grad, parameter.grad, rtol=1e-4, atol=3e-4, msg=key)
        else:
            assert parameter.grad is None
    assert all(parameter.grad is None for parameter in fused.parameters())


@pytest.mark.parametrize("case", [case for case in FROZEN if case != "all"])
def test_frozen_weights_without_sums(case: str) -> None:
    config = small(qkv_bias=True, tie_word_embeddings=False)
    plain, fused = decoder(config), decoder(config)
    for model in (plain, fused):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in key for part in FROZEN[case]))
    loss_of(plain, Backend.MASKED)
    loss_of(fused, Backend.FUSED)
    for (key, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (other.grad is None) == (parameter.grad is None) == (not parameter.requires_grad), key
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=3e-4, msg=key)


def test_another_document_changes_no_bit() -> None:
    model = decoder(small(qkv_bias=True))
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(model.config, Backend.FUSED)(positions, cu_seqlens)
    other = tokens.clone()
    other[0, 6:11] = (other[0, 6:11] + 41) % 97
    with torch.no_grad():
        before, after = (
            run_layers(model.embedding, model.blocks, model.norm, t, attend, False) for t in (tokens, other)
        )
    same = (before == after).all(-1)
    assert not same[0, 6:11].any()
    same[0, 6:11] = True
    assert same.all()


def test_a_backward_pass_that_would_use_what_it_wrote_over_is_refused() -> None:
    model = decoder(small())
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(model.config, Backend.FUSED)(positions, cu_seqlens)
    hidden = run_layers(model.embedding, model.blocks, model.norm, tokens, attend, False)
    hidden.backward(torch.ones_like(hidden), retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        hidden.backward(torch.ones_like(hidden))
