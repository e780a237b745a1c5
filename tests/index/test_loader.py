"""Batches as tensors: the samples of the mixture in order, each on one rank."""

import itertools
from pathlib import Path

import pytest
import torch
from indexes import random_documents, write_index

from megazh.index.loader import training_batches
from megazh.index.mixture import Mixture


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    write_index(tmp_path / "a", random_documents(1, 300))
    path = tmp_path / "mix.yaml"
    path.write_text("validation: {fraction: 0.1}\ncorpora:\n  - {name: a, prefix: a, weight: 1}\n")
    return Mixture(path, 64)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_samples_in_order(mixture: Mixture, workers: int) -> None:
    batches = training_batches(mixture, 4, start=12, workers=workers)
    for at in range(12, 212, 4):
        batch = next(batches)
        expected = mixture.batch(range(at, at + 4))
        for name, array in expected._asdict().items():
            assert batch[name].dtype == torch.int32
            assert torch.equal(batch[name], torch.from_numpy(array)), (name, at)
        assert batch["sample_numbers"].tolist() == list(range(at, at + 4))


def test_ranks_share_the_samples_out(mixture: Mixture) -> None:
    alone = training_batches(mixture, 6, workers=0)
    ranks = [training_batches(mixture, 2, replica=number, replicas=3, workers=1) for number in range(3)]
    for _ in range(20):
        together = torch.cat([next(rank)["tokens"] for rank in ranks])
        assert torch.equal(together, next(alone)["tokens"])


def test_the_end_of_a_mixture_ends_the_batches(tmp_path: Path, mixture: Mixture) -> None:
    path = tmp_path / "stop.yaml"
    path.write_text("on_exhausted: stop\ncorpora:\n  - {name: a, prefix: a, weight: 1}\n")
    stopping = Mixture(path, 64)
    assert sum(len(batch["tokens"]) for batch in training_batches(stopping, 4)) == stopping.end // 4 * 4


def test_an_error_in_a_thread_reaches_the_caller(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = training_batches(mixture, 4, workers=2)
    next(batches)
    monkeypatch.setattr(Mixture, "batch", lambda self, numbers: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(itertools.islice(batches, 50))
