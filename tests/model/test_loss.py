"""Head and cross entropy in one: value and gradients against torch's, chunk by chunk, and memory that is never used."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megazh.model import counts
from megazh.model import loss as module
from megazh.model.counts import chunk_tokens
from megazh.model.loss import loss_and_gradient, summed_cross_entropy, summed_losses


def inputs(
    tokens: int = 150, hidden: int = 24, vocab: int = 203, dtype: torch.dtype = torch.float32, ignored: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weight that require gradients, and labels of which the share `ignored` is -100."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return states, weight, labels


def reference(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients in float64, from the logits of all tokens at once."""
    left, right = (tensor.detach().double().requires_grad_() for tensor in (states, weight))
    logits = left @ right.T
    total = F.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="sum")
    total = total + z_loss * logits.logsumexp(1)[labels >= 0].square().sum()
    return total.detach(), *torch.autograd.grad(total, (left, right))


@pytest.fixture(params=[64, 128, 150, 1 << 20], ids=lambda tokens: f"{tokens} tokens at a time")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks that divide the tokens, chunks that do not, and a single chunk."""
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab, fused=False: request.param)
    return request.param


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients(chunks: int, z_loss: float) -> None:
    states, weight, labels = inputs()
    total = summed_cross_entropy(states, weight, labels, z_loss)
    expected, grad_states, grad_weight = reference(states, weight, labels, z_loss)
    assert (total.dtype, total.shape) == (torch.float32, ())
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    found = torch.autograd.grad(total * 0.25, (states, weight))
    torch.testing.assert_close(found[0].double(), grad_states / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].double(), grad_weight / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_z_loss_is_given_apart(chunks: int, fused: bool) -> None:
    states, weight, labels = inputs()
    total, z_total = summed_losses(states, weight, labels, 1e-2, fused)
    both, plain = (reference(states, weight, labels, z_loss)[0].item() for z_loss in (1e-2, 0.0))
    assert total.item() == pytest.approx(both, rel=1e-6)
    assert z_total.item() == pytest.approx(both - plain, rel=1e-5)
    assert not z_total.requires_grad
    assert summed_losses(states, weight, labels, 0.0, fused)[1].item() == 0.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_rows_that_pad_the_weight_count_nowhere(chunks: int, z_loss: float, fused: bool) -> None:
    states, weight, labels = inputs()
    padded = F.pad(weight.detach(), (0, 0, 0, 53), value=9.0).requires_grad_()
    total, z_total = summed_losses(states, padded, labels, z_loss, fused, vocab=203)
    expected, grad_states, grad_weight = reference(states, weight, labels, z_loss)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert z_total.item() == pytest.approx((expected - reference(states, weight, labels)[0]).item(), rel=1e-5)
    found = torch.autograd.grad(total, (states, padded))
    torch.testing.assert_close(found[0].double(), grad_states, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found[1][:203].double(), grad_weight, rtol=1e-4, atol=2e-5)
    assert (found[1][203:] == 0).all()
    padded.main_grad = torch.zeros_like(padded)
    again = loss_and_gradient(states, padded, labels, z_loss, torch.ones(()), fused, vocab=203)
    assert again[0].item() == total.item()
    assert torch.equal(again[1], found[0])
    assert torch.equal(padded.main_grad, found[1])


def test_chunks_are_what_the_limit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab in (2048, 64_793, 151_936, 500_000):
        tokens = chunk_tokens(vocab)
        assert tokens % 64 == 0
        assert tokens * vocab <= 1 << 27 < (tokens + 64) * vocab
    monkeypatch.setattr(counts, "_CHUNK_LOGITS", 64 * 203 * 2)
    assert chunk_tokens(203) == 128
    states, weight, labels = inputs(129)
    assert summed_cross_entropy(states, weight, labels).item() == pytest.approx(
        reference(states, weight, labels)[0].item(), rel=1e-6
    )
    assert chunk_tokens(1 << 30) == 64, "at least 64 tokens for a vocabulary of any size"


@pytest.mark.parametrize("shape", [(2, 75), (3, 5, 10), (150,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    states, weight, labels = inputs()
    total = summed_cross_entropy(states.view(*shape, 24), weight, labels.view(shape).int())
    assert total.item() == summed_cross_entropy(states, weight, labels).item()
    (gradient,) = torch.autograd.grad(total, states)
    torch.testing.assert_close(gradient.double(), reference(states, weight, labels)[1], rtol=1e-4, atol=1e-5)


def test_labels_that_count_nothing_give_nothing() -> None:
    states, weight, labels = inputs()
    counted = labels >= 0
    total = summed_cross_entropy(states, weight, labels, 0.1)
    (gradient,) = torch.autograd.grad(total, states)
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()
    only = summed_cross_entropy(states[counted], weight, labels[counted], 0.1)
    assert total.item() == pytest.approx(only.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_to_learn(dtype: torch.dtype) -> None:
    states, weight, labels = inputs(dtype=dtype)
    total = summed_cross_entropy(states, weight, torch.full_like(labels, -100), 0.1)
    assert total.item() == 0
    for gradient in torch.autograd.grad(total, (states, weight)):
        assert (gradient == 0).all()


def test_first_and_last_label_and_large_logits() -> None:
    states, weight, labels = inputs(ignored=0.0)
    labels[:75], labels[75:] = 0, 202
    big = (states.detach() * 300).requires_grad_()
    total = summed_cross_entropy(big, weight, labels)
    expected, grad_states, _ = reference(big, weight, labels)
    assert expected > 1e4
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, big)[0].double(), grad_states, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, chunks: int) -> None:
    """Logits, softmax and sums are in fp32: only inputs and outputs are rounded."""
    states, weight, labels = inputs(dtype=dtype)
    total = summed_cross_entropy(states, weight, labels)
    expected, *gradients = reference(states, weight, labels)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    step = torch.finfo(dtype).eps
    for found, exact in zip(torch.autograd.grad(total * 0.5, (states, weight)), gradients, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), exact / 2, rtol=1.01 * step, atol=step * exact.abs().max().item() / 50
        )


def test_small_scale_does_not_vanish_in_fp16() -> None:
    """1 / number of tokens may be below the smallest fp16 number, while its product with a gradient is not."""
    states, weight, labels = inputs(dtype=torch.float16)
    weight = (weight.detach() * 1000).requires_grad_()
    scale = 2e-8
    assert torch.tensor(scale).half() == 0
    (found,) = torch.autograd.grad(summed_cross_entropy(states, weight, labels) * scale, states)
    exact = reference(states, weight, labels)[1] * scale
    assert exact.abs().max() > 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=1e-7)


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient() -> None:
    """The saved gradients are scaled in place, to save memory."""
    states, weight, labels = inputs()
    total = summed_cross_entropy(states, weight, labels) * 0.5
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_inputs_stay_as_they_are() -> None:
    states, weight, labels = inputs()
    before = [tensor.detach().clone() for tensor in (states, weight, labels)]
    summed_cross_entropy(states, weight, labels, 0.1).backward()
    assert all(torch.equal(left, right) for left, right in zip((states, weight, labels), before, strict=True))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor made, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(counts, "_CHUNK_LOGITS", 64 * 1000)
    states, weight, labels = inputs(1000, 8, 1000, dtype)
    with Largest() as largest:
        summed_cross_entropy(states, weight, labels).backward()
    assert largest.elements == 64 * 1000
    assert largest.products == 3 * 16


def test_without_gradients_there_is_a_third_of_the_work() -> None:
    states, weight, labels = inputs()
    expected = summed_cross_entropy(states, weight, labels).item()
    with torch.no_grad(), Largest() as largest:
        total = summed_cross_entropy(states, weight, labels)
    assert (total.item(), total.requires_grad, largest.products) == (expected, False, 1)
    frozen = summed_cross_entropy(states.detach(), weight.detach(), labels)
    assert (frozen.item(), frozen.requires_grad) == (expected, False)


def test_only_one_side_wants_a_gradient() -> None:
    states, weight, labels = inputs()
    _, grad_states, grad_weight = reference(states, weight, labels)
    (found,) = torch.autograd.grad(summed_cross_entropy(states, weight.detach(), labels), states)
    torch.testing.assert_close(found.double(), grad_states, rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(summed_cross_entropy(states.detach(), weight, labels), weight)
    torch.testing.assert_close(found.double(), grad_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_head_costs_no_product(fused: bool) -> None:
    states, weight, labels = inputs()
    grad_states = reference(states, weight, labels)[1]
    weight.requires_grad_(False)
    with Largest() as largest:
        (found,) = torch.autograd.grad(summed_cross_entropy(states, weight, labels, fused=fused), states)
    assert largest.products == 2, "logits, and the gradient of the states"
    torch.testing.assert_close(found.double(), grad_states, rtol=1e-4, atol=2e-5)
    with Largest() as largest:
        again = loss_and_gradient(states, weight, labels, 0.0, torch.ones(()), fused)[1]
    assert largest.products == 2
    assert torch.equal(again, found)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch is older than 2.13")
def test_torchs_own_is_a_peer() -> None:
    states, weight, labels = inputs()
    peer = F.linear_cross_entropy(states, weight, labels, reduction="none").sum()
    total = summed_cross_entropy(states, weight, labels)
    assert total.item() == pytest.approx(peer.item(), rel=1e-6)
    mine, theirs = (torch.autograd.grad(each, (states, weight)) for each in (total, peer))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
