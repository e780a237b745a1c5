"""Weight gradients: returned to autograd or added to `main_grad`, at once or deferred."""

import torch

from megazh.model.main_grad import add_postponed, product_gradient, vector_gradient

LEFT, RIGHT = torch.randn(50, 3), torch.randn(50, 4)


def test_without_a_sum_autograd_gets_it() -> None:
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((3, 4), (3,)))
    found = product_gradient(weight, LEFT.bfloat16(), RIGHT.bfloat16())
    assert found is not None
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), LEFT.T @ RIGHT, rtol=0.05, atol=0.3)
    assert vector_gradient(bias, torch.ones(3)).dtype is torch.bfloat16


def test_a_frozen_weight_gets_none() -> None:
    for weight in (torch.zeros(3, 4), torch.zeros(3)):
        weight.main_grad = torch.zeros_like(weight)
        gradient = (
            vector_gradient(weight, torch.ones(3)) if weight.dim() == 1 else product_gradient(weight, LEFT, RIGHT)
        )
        assert gradient is None
        assert (weight.main_grad == 0).all()


def test_a_sum_keeps_what_bf16_would_lose() -> None:
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.full((3, 4), 1000.0)
    left, right = torch.full((1, 3), 2**-5, dtype=torch.bfloat16), torch.full((1, 4), 2**-5, dtype=torch.bfloat16)
    assert product_gradient(weight, left, right) is None
    assert (weight.main_grad == 1000 + 2**-10).all()


def test_postponed_products_wait_and_come_in_order() -> None:
    weight, later = torch.zeros(3, 4, requires_grad=True), []
    weight.main_grad, weight.postponed = torch.zeros(3, 4), later
    for factor in (1, 2):
        product_gradient(weight, LEFT * factor, RIGHT)
    assert (weight.main_grad == 0).all()
    wanted = torch.zeros(3, 4)
    for product in list(later):
        wanted.addmm_(product.left.T, product.right)
    add_postponed(later)
    assert torch.equal(weight.main_grad, wanted)
    torch.testing.assert_close(wanted, 3 * LEFT.T @ RIGHT)
    assert later == []
