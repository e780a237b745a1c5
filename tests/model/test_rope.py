"""Rotary positions against complex numbers, and their scalings against the formulas of the papers."""

import math

import numpy as np
import pytest
import torch
from decoders import SHAPES, small, turned, turning

from megazh.model.rope import Rotary, inverse_frequencies, rotate


@pytest.mark.parametrize("name", SHAPES)
def test_rotation_is_a_product_of_complex_numbers(name: str) -> None:
    config = small(**SHAPES[name])
    positions = torch.tensor([[0, 1, 2, 31, 4095], [7, 7, 0, 100, 3]])
    states = torch.randn(2, 5, 3, config.head_size, generator=torch.Generator().manual_seed(1))
    found = rotate(states, *Rotary(config)(positions))
    for row in range(2):
        for at in range(5):
            expected = turned(states[row, at].double().numpy(), int(positions[row, at]), config)
            np.testing.assert_allclose(found[row, at], expected, atol=2e-3 if positions[row, at] > 1000 else 1e-4)


def test_only_distance_matters() -> None:
    config = small()
    rotary = Rotary(config)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def product(at: int, before: int) -> float:
        places = [rotary(torch.tensor([[place]])) for place in (at, before)]
        return float((rotate(query, *places[0]) * rotate(key, *places[1])).sum())

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


def test_dimensions_that_are_not_rotated_stay_bit_for_bit() -> None:
    config = small(head_dim=16, partial_rotary_factor=0.25)
    states = torch.randn(1, 3, 2, 16)
    found = rotate(states, *Rotary(config)(torch.tensor([[1, 2, 3]])))
    assert torch.equal(found[..., 4:], states[..., 4:])
    assert not (found[..., :4] == states[..., :4]).any()


def test_half_precision_is_rotated_in_fp32_and_keeps_its_dtype() -> None:
    config = small()
    states = torch.randn(1, 3, 2, 8).bfloat16()
    cos, sin = Rotary(config)(torch.tensor([[1, 2, 300]]))
    found = rotate(states, cos, sin)
    assert (found.dtype, cos.dtype, sin.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(found, rotate(states.float(), cos, sin).bfloat16())


def test_a_model_in_bf16_keeps_exact_frequencies() -> None:
    rotary = Rotary(small(rope_theta=1e6)).bfloat16()
    cos, _ = rotary(torch.tensor([[1000]]))
    assert cos[0, 0, 0, 1].item() == pytest.approx(math.cos(1000 * 1e6 ** (-1 / 4)), abs=1e-4)


def test_without_scaling() -> None:
    frequencies, factor = inverse_frequencies(small(head_dim=64, rope_theta=1e6))
    assert frequencies.shape == (32,)
    np.testing.assert_allclose(frequencies, [1e6 ** (-2 * pair / 64) for pair in range(32)], rtol=1e-6)
    assert factor == 1.0


def test_linear_scaling_divides_positions() -> None:
    """arXiv 2306.15595: position m of the longer text is rotated like position m / factor."""
    plain, scaled = Rotary(small()), Rotary(small(rope_scaling={"type": "linear", "factor": 4.0}))
    for left, right in zip(plain(torch.tensor([[25]])), scaled(torch.tensor([[100]])), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "theta", "length", "factor"), [(128, 1e4, 4096, 16.0), (64, 1e6, 32768, 4.0), (16, 1e4, 32, 2.0)]
)
def test_yarn(head_dim: int, theta: float, length: int, factor: float) -> None:
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    config = small(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    frequencies, sharpened = inverse_frequencies(config)
    expected, expected_sharpened = turning(config)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-5)
    assert sharpened == expected_sharpened == pytest.approx(1 + 0.1 * math.log(factor))
    # arXiv 2309.00071, section 3.2: frequencies are kept above 32 turns over the original length and divided below one
    # turn. The authors' code rounds the ends of the ramp outwards to whole pairs.
    plain = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    turns = length * plain / (2 * math.pi)
    ratio = frequencies.double().numpy() / plain
    step = theta ** (2 / head_dim)
    np.testing.assert_allclose(ratio[turns > 32 * step], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[turns < 1 / step], 1 / factor, rtol=1e-5)
    assert (np.diff(ratio) <= 1e-6).all(), "between the two, the ratio falls"


def test_yarn_with_its_own_factor_and_ramp() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    assert inverse_frequencies(small(rope_scaling=scaling))[1] == 1.5
    cos, sin = Rotary(small(rope_scaling=scaling))(torch.tensor([[9]]))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 2.25))
    wide = small(head_dim=64, rope_scaling={**scaling, "beta_fast": 8.0, "beta_slow": 0.5})
    np.testing.assert_allclose(inverse_frequencies(wide)[0], turning(wide)[0], rtol=1e-5)
