"""NEFTune's noise: its size, and what it depends on."""

import pytest
import torch

from megazh.model.embedding_noise import EmbeddingNoise, document_lengths

SEQ, HIDDEN = 12, 32
BOUNDS = torch.tensor([[0, 4, 5, SEQ, SEQ], [0, SEQ, SEQ, SEQ, SEQ]], dtype=torch.int32)
LENGTHS = torch.tensor([[4] * 4 + [1] + [7] * 7, [12] * 12], dtype=torch.float32)


def noise(samples: list[int], seed: int = 1, alpha: float = 5.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise alone."""
    make = EmbeddingNoise(alpha, seed, torch.tensor(samples), BOUNDS[: len(samples)])
    return make(torch.zeros(len(samples), SEQ, HIDDEN, dtype=dtype))


def test_lengths_of_documents() -> None:
    assert torch.equal(document_lengths(BOUNDS, SEQ), LENGTHS)


def test_noise_is_uniform_up_to_a_bound_by_the_length_of_the_document() -> None:
    found = torch.cat([noise([2 * number, 2 * number + 1])[None] for number in range(60)])
    bound = 5.0 / (LENGTHS * HIDDEN).sqrt()
    scaled = found / bound[..., None]
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.999
    assert scaled.mean().abs() < 0.01
    assert scaled.var() == pytest.approx(1 / 3, abs=0.01)


def test_noise_depends_on_seed_and_sample_alone() -> None:
    both = noise([8, 9])
    assert torch.equal(noise([8])[0], both[0])
    assert torch.equal(noise([8, 9]), both)
    assert not torch.equal(noise([7])[0], both[0])
    assert not torch.equal(noise([8], seed=2)[0], both[0])
    assert noise([8], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_samples_without_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="numbered samples only"):
        noise([-1])
