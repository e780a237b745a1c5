"""AdamW: the weights that are decayed, and steps compared with the formula of the paper."""

import pytest
import torch
from decoders import small
from recipes import make_recipe

from megazh.model.decoder import Decoder
from megazh.model.layers import make_layer
from megazh.training.optimizer import make_optimizer

SHAPE = {"norm": "layernorm", "qkv_bias": True, "tie_word_embeddings": False}


def test_matrices_are_decayed_norms_and_biases_are_not() -> None:
    model = Decoder(small(**SHAPE))
    optimizer = make_optimizer(model.parameters(), make_recipe(weight_decay=0.25).optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or name.endswith("bias") else 0.25), name
    assert {name for name in decay if decay[name]} >= {"embedding.weight", "head.weight", "blocks.1.mlp.up_proj.weight"}


def test_a_tied_matrix_is_there_once() -> None:
    optimizer = make_optimizer(Decoder(small()).parameters(), make_recipe().optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)


def test_frozen_parameters_are_left_out() -> None:
    model = Decoder(small())
    model.embedding.weight.requires_grad_(False)
    optimizer = make_optimizer(model.parameters(), make_recipe().optimizer)
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])


def test_a_stage_may_have_only_matrices_or_only_vectors() -> None:
    for number, decay in ((0, 0.1), (3, 0.0)):
        optimizer = make_optimizer(make_layer(small(), number, 0).parameters(), make_recipe().optimizer)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]


def test_two_steps_are_those_of_the_paper() -> None:
    config = make_recipe(learning_rate=0.01, betas=[0.8, 0.9], eps=1e-3, weight_decay=0.5).optimizer
    matrix, vector = (torch.nn.Parameter(torch.full(shape, 2.0)) for shape in ((1, 1), (1,)))
    optimizer = make_optimizer([matrix, vector], config)
    expected = {0.5: 2.0, 0.0: 2.0}
    first = second = 0.0
    for step, gradient in enumerate((0.3, -0.7), start=1):
        matrix.grad, vector.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        change = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)) ** 0.5 + 1e-3)
        expected = {decay: value - 0.01 * (change + decay * value) for decay, value in expected.items()}
    assert matrix.item() == pytest.approx(expected[0.5], rel=1e-6)
    assert vector.item() == pytest.approx(expected[0.0], rel=1e-6)
