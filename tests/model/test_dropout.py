"""Dropout: masks depend on seed, sample, block and site alone; the right share is dropped; the mean stays."""

import itertools

import pytest
import torch
from decoders import decoder, packed, small

from megazh.model.decoder import Decoder
from megazh.model.dropout import Dropout, Site

CONFIG = small(residual_dropout=0.3, attention_dropout=0.1)
SAMPLES = [5, 6, 2**40 + 1, 7]
ROWS = [[6, 5, 5], [3, 1, 9], [16], [12, 2]]


def kept(samples: list[int], site: Site = Site.MLP, block: int = 1, seed: int = 3, width: int = 400) -> torch.Tensor:
    """Elements of (samples, width) that are not dropped."""
    return Dropout(CONFIG, seed, torch.tensor(samples))(torch.ones(len(samples), width), site, block) > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_mask_does_not_depend_on_the_micro_batch(size: int) -> None:
    together = kept(SAMPLES)
    apart = torch.cat([kept(SAMPLES[at : at + size]) for at in range(0, len(SAMPLES), size)])
    assert torch.equal(apart, together)
    assert torch.equal(kept(SAMPLES[::-1]).flip(0), together)


def test_a_mask_does_not_depend_on_what_was_drawn_before() -> None:
    dropout, states = Dropout(CONFIG, 3, torch.tensor([4, 9])), torch.ones(2, 300)
    first = dropout(states, Site.ATTENTION, 0)
    torch.manual_seed(1)
    dropout(states, Site.MLP, 0)
    before = torch.get_rng_state()
    assert torch.equal(dropout(states, Site.ATTENTION, 0), first)
    assert torch.equal(torch.get_rng_state(), before), "the random numbers of the process are left alone"


def test_other_keys_give_independent_masks() -> None:
    masks = [
        kept([sample], site, block, seed, 20_000)[0].double()
        for sample, site, block, seed in itertools.product(
            (0, 1, 2**32), (Site.EMBEDDING, Site.ATTENTION, Site.MLP), (0, 1), (3, 4)
        )
    ]
    correlation = torch.corrcoef(torch.stack(masks)) - torch.eye(len(masks), dtype=torch.float64)
    assert correlation.abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(dtype: torch.dtype) -> None:
    dropout, states = Dropout(CONFIG, 3, torch.tensor([0, 1])), torch.ones(2, 50_000, dtype=dtype)
    for site, share in ((Site.EMBEDDING, 0.3), (Site.ATTENTION, 0.3), (Site.MLP, 0.3), (Site.WEIGHTS, 0.1)):
        found = dropout(states, site)
        assert (found == 0).double().mean().item() == pytest.approx(share, abs=5 * (share / 100_000) ** 0.5)
        assert found.dtype == dtype
        assert (found[found != 0] == torch.tensor(1 / (1 - share), dtype=dtype)).all()


def test_gradients_pass_where_states_pass() -> None:
    states = torch.ones(2, 100, requires_grad=True)
    found = Dropout(CONFIG, 3, torch.tensor([0, 1]))(states, Site.MLP)
    found.sum().backward()
    assert torch.equal(states.grad, found.detach())


def test_no_dropout_returns_the_states_themselves() -> None:
    states = torch.ones(1, 4)
    dropout = Dropout(small(attention_dropout=0.5), 3, torch.tensor([0]))
    assert dropout(states, Site.MLP) is states
    assert dropout.on_weights
    assert not Dropout(small(residual_dropout=0.5), 3, torch.tensor([0])).on_weights


def test_samples_without_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="trains on numbered samples only: pass their sample_numbers"):
        Dropout(CONFIG, 3, torch.tensor([4, -1]))
    with pytest.raises(ValueError, match="pass sample_numbers"):
        decoder(CONFIG).loss(*packed(ROWS, 16))


def gradients(model: Decoder, rows: slice, samples: list[int]) -> tuple[float, list[torch.Tensor]]:
    """Loss of some of `ROWS`, and copies of all gradients so far."""
    batch = [tensor[rows] for tensor in packed(ROWS, 16)]
    loss = model.loss(*batch, sample_numbers=torch.tensor(samples[rows]))
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_a_model_gets_the_same_gradients_in_other_micro_batches() -> None:
    whole, wanted = gradients(decoder(CONFIG), slice(0, 4), SAMPLES)
    for size in (1, 2, 3):
        model, total = decoder(CONFIG), 0.0
        for at in range(0, 4, size):
            loss, found = gradients(model, slice(at, at + size), SAMPLES)
            total += loss
        assert total == pytest.approx(whole, rel=1e-6)
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert gradients(decoder(CONFIG), slice(0, 4), [5, 6, 2**40 + 1, 8])[0] != pytest.approx(whole, rel=1e-4)
    assert gradients(decoder(CONFIG, 4), slice(0, 4), SAMPLES)[0] != pytest.approx(whole, rel=1e-4)
