"""Micro-batches in the form of the pipeline engine, each with the scale that makes the loss a mean over tokens."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megazh.index.loader import Batch, training_batches
from megazh.index.mixture import Mixture, ValidationSamples
from megazh.model.document_map import encode_document_map
from megazh.training.layout import Layout

MicroBatch = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""((tokens, document map), (labels, scale)).

Shapes: (batch, seq), (batch, seq + max_docs + 3) and (batch, seq) int32, and (1,) fp32.
"""


_READY = 4
"""Micro-batches that the feed of a GPU keeps ready."""


def training_feed(
    mixture: Mixture, layout: Layout, replica: int, first_step: int, workers: int
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one replica from step `first_step` (from 0) to the mixture's last whole step.

    Step n takes the samples from n * global_batch_size on, whatever the layout. Each micro-batch's summed loss is
    scaled by 1 / valid labels of the whole step, so that the sum over micro-batches and replicas is a mean over tokens.

    Args:
        mixture: the data.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        first_step: optimizer steps done before.
        workers: threads that gather samples ahead of time.
    """
    feed = _training_feed(mixture, layout, replica, first_step, workers)
    # On the CPU a prefetch thread only competes with training for cores.
    return _ahead(feed, _READY) if workers and torch.cuda.is_available() else feed


def _training_feed(
    mixture: Mixture, layout: Layout, replica: int, first_step: int, workers: int
) -> Iterator[MicroBatch]:
    size = layout.micro_batch_size * layout.micro_batches * layout.replicas
    batches = training_batches(mixture, layout.micro_batch_size, first_step * size, replica, layout.replicas, workers)
    steps: Iterator[int] = itertools.count(first_step)
    if mixture.end is not None:
        steps = iter(range(first_step, mixture.end // size))

    def count(step: int) -> int:
        return sum(mixture.valid_labels(number) for number in range(step * size, (step + 1) * size))

    with ThreadPoolExecutor(1, thread_name_prefix="labels") as pool:  # counts labels of the next step meanwhile
        for valid in _one_ahead(pool.submit(count, step) for step in steps):
            scale = torch.tensor([1 / max(valid.result(), 1)])
            for _ in range(layout.micro_batches):
                yield as_micro_batch(next(batches), scale)


def _ahead(feed: Iterator[MicroBatch], ready: int) -> Iterator[MicroBatch]:
    """Yield the same micro-batches, made by a thread that keeps `ready` of them in stock."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        pending = deque(pool.submit(next, feed, None) for _ in range(ready))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, feed, None))
            yield batch


def _one_ahead(items: Iterator[Future[int]]) -> Iterator[Future[int]]:
    """Yield the same items, each after the next one was drawn."""
    before = next(items, None)
    while before is not None:
        item = next(items, None)
        yield before
        before = item


def as_micro_batch(batch: Batch, scale: torch.Tensor) -> MicroBatch:
    """Put a batch of samples into the engine's form; pinned in memory if the batch is, so that copies do not block."""
    document_map = encode_document_map(batch["position_ids"], batch["cu_seqlens"], batch.get("sample_numbers"))
    if batch["tokens"].is_pinned():
        document_map, scale = document_map.pin_memory(), scale.pin_memory()
    return (batch["tokens"], document_map), (batch["labels"], scale)


class ValidationFeed:
    """The held-out samples in whole micro-batches for all replicas; the last one is filled up with ignored rows.

    Args:
        samples: all held-out samples.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        limit: largest number of samples to use, evenly spread over all; None: all.
    """

    def __init__(self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None) -> None:
        count = min(len(samples), limit or len(samples))
        self._samples, self._layout, self._replica = samples, layout, replica
        self.numbers = [place * len(samples) // count for place in range(count)]
        self.valid = sum(samples.valid_labels(number) for number in self.numbers)
        """Labels of these samples that are not ignored."""
        self.micro_batches = -(-count // (layout.micro_batch_size * layout.replicas))
        """Micro-batches per replica in one validation pass."""

    def __iter__(self) -> Iterator[MicroBatch]:
        size, replicas = self._layout.micro_batch_size, self._layout.replicas
        scale = torch.tensor([1 / max(self.valid, 1)])
        for number in range(self.micro_batches):
            begin = (number * replicas + self._replica) * size
            rows = self.numbers[begin : begin + size]
            missing = size - len(rows)
            samples = self._samples.batch([*rows, *[0] * missing])
            batch = {name: torch.from_numpy(array) for name, array in samples._asdict().items()}
            batch["labels"][size - missing :] = -100
            yield as_micro_batch(batch, scale)
