"""Batches as tensors: the samples of the mixture in order, each on one rank."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from indexes import random_documents, write_index

from megazh.index.loader import ahead, training_batches
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
        assert batch["document_map"][:, -2:].tolist() == [[number, 0] for number in range(at, at + 4)]


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
    monkeypatch.setattr(Mixture, "gather", lambda self, *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(itertools.islice(batches, 50))


def test_a_batch_is_one_block_of_memory(mixture: Mixture) -> None:
    """So that one piece of pinned memory holds it."""
    batches = training_batches(mixture, 4, workers=2)
    first, second = next(batches), next(batches)
    blocks = [{tensor.untyped_storage().data_ptr() for tensor in batch.values()} for batch in (first, second)]
    assert [len(block) for block in blocks] == [1, 1]
    assert blocks[0] != blocks[1]
    joined = torch.cat((first["position_ids"], first["cu_seqlens"]), 1)
    assert torch.equal(first["document_map"][:, :-2], joined)
    assert all(first[name].is_contiguous() for name in ("tokens", "labels", "document_map"))


# ahead: results of threads, in order

STOCKS = pytest.mark.parametrize(("workers", "ready"), list(itertools.product((1, 3), (1, 2, 3, 4, 5))))


def uneven(number: int) -> int:
    """Work that takes the longer, the earlier it comes among five."""
    time.sleep(0.002 * (4 - number % 5))
    return 10 * number


def threads() -> set[threading.Thread]:
    """The living threads of all loaders."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("loader")}


@STOCKS
@pytest.mark.parametrize("count", [0, 1, 4, 23])
def test_ahead_keeps_the_order_and_ends_with_the_items(workers: int, ready: int, count: int) -> None:
    before = threads()
    assert list(ahead(uneven, range(count), workers, ready)) == [10 * number for number in range(count)]
    assert threads() == before


@STOCKS
def test_ahead_takes_no_more_items_than_its_stock(workers: int, ready: int) -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for taken in itertools.count(1):
            yield taken - 1

    results = ahead(uneven, numbers(), workers, ready)
    stocks = []
    for number in range(20):
        assert next(results) == 10 * number
        stocks.append(taken - number - 1)
    assert max(stocks) <= ready
    assert min(stocks) >= min(ready, ready // 2 + 1), "work goes on before the stock is used up"
    results.close()


@STOCKS
def test_what_a_thread_of_ahead_raises_comes_in_its_place(workers: int, ready: int) -> None:
    before = threads()

    def fails_at_7(number: int) -> int:
        return number // (number != 7)

    results = ahead(fails_at_7, itertools.count(), workers, ready)
    assert list(itertools.islice(results, 7)) == list(range(7))
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threads() == before
    assert list(results) == []


@STOCKS
def test_what_the_items_of_ahead_raise_reaches_the_consumer(workers: int, ready: int) -> None:
    def numbers() -> Iterator[int]:
        yield from range(7)
        raise ZeroDivisionError

    before = threads()
    with pytest.raises(ZeroDivisionError):
        list(ahead(uneven, numbers(), workers, ready))
    assert threads() == before


@STOCKS
@pytest.mark.parametrize("taken", [1, 6])
def test_a_consumer_that_stops_early_leaves_no_thread_of_ahead(workers: int, ready: int, taken: int) -> None:
    before = threads()
    results = ahead(uneven, itertools.count(), workers, ready)
    assert list(itertools.islice(results, taken)) == [10 * number for number in range(taken)]
    assert threads() > before
    results.close()
    assert threads() == before


def test_a_consumer_that_stops_early_waits_only_for_work_under_way() -> None:
    begun = []

    def slow(number: int) -> None:
        begun.append(number)
        time.sleep(0.05 * bool(number))

    results = ahead(slow, itertools.count(), workers=1, ready=5)
    next(results)
    results.close()
    assert begun in ([0], [0, 1])
