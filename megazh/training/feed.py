"""Micro-batches as the pipeline engine takes them, each with the scale that makes DeepSpeed's mean of means right."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megazh.index.loader import Batch, training_batches
from megazh.index.mixture import Mixture, ValidationSamples
from megazh.training.layout import Layout

MicroBatch = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""((tokens, layout), (labels, scale)): (batch, seq), (batch, seq + max_docs + 1), (batch, seq) int32, (1,) fp32."""


_READY = 4
"""Micro-batches that a GPU's feed keeps ready."""


def training_feed(
    mixture: Mixture, layout: Layout, replica: int, first_step: int, workers: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one replica from step `first_step` (from 0) on, up to the mixture's last whole step.

    Step n takes the samples from n * global_batch_size on, whatever the layout. DeepSpeed averages the loss over
    micro-batches and replicas; each micro-batch's summed loss is scaled by micro_batches * replicas / valid labels of
    the whole step, so that the average is the mean over tokens.
    """
    feed = _training_feed(mixture, layout, replica, first_step, workers)
    # On a CPU, another thread would take from training what it gives.
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

    with ThreadPoolExecutor(1, thread_name_prefix="labels") as pool:  # counts the next step's meanwhile
        for valid in _one_ahead(pool.submit(count, step) for step in steps):
            scale = torch.tensor([layout.micro_batches * layout.replicas / max(valid.result(), 1)])
            for _ in range(layout.micro_batches):
                yield as_micro_batch(next(batches), scale)


def _ahead(feed: Iterator[MicroBatch], ready: int) -> Iterator[MicroBatch]:
    """The same micro-batches, made by a thread, `ready` of them before they are asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        pending = deque(pool.submit(next, feed, None) for _ in range(ready))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, feed, None))
            yield batch


def _one_ahead(items: Iterator[Future[int]]) -> Iterator[Future[int]]:
    """The same items, each given out when the one behind it has been drawn."""
    before = next(items, None)
    while before is not None:
        item = next(items, None)
        yield before
        before = item


def as_micro_batch(batch: Batch, scale: torch.Tensor) -> MicroBatch:
    """A batch of samples in the engine's form; in pinned memory where the batch is, so that nothing waits for it."""
    layout = torch.cat((batch["position_ids"], batch["cu_seqlens"]), 1)
    if batch["tokens"].is_pinned():
        layout, scale = layout.pin_memory(), scale.pin_memory()
    return (batch["tokens"], layout), (batch["labels"], scale)


class ValidationFeed:
    """The held-out samples in whole micro-batches for all replicas, the last filled up with rows that count nothing.

    Args:
        samples: all that is held out.
        layout: the run's.
        replica: this rank's.
        limit: take so many at most, evenly spread.
    """

    def __init__(self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None) -> None:
        count = min(len(samples), limit or len(samples))
        self._samples, self._layout, self._replica = samples, layout, replica
        self.numbers = [place * len(samples) // count for place in range(count)]
        self.valid = sum(samples.valid_labels(number) for number in self.numbers)
        """Labels that count."""
        self.micro_batches = -(-count // (layout.micro_batch_size * layout.replicas))
        """A replica."""

    def __iter__(self) -> Iterator[MicroBatch]:
        size, replicas = self._layout.micro_batch_size, self._layout.replicas
        scale = torch.tensor([self.micro_batches * replicas / max(self.valid, 1)])
        for number in range(self.micro_batches):
            begin = (number * replicas + self._replica) * size
            rows = self.numbers[begin : begin + size]
            missing = size - len(rows)
            batch = self._samples.batch([*rows, *[0] * missing])
            labels = torch.from_numpy(batch.labels)
            labels[size - missing :] = -100
            layout = torch.cat((torch.from_numpy(batch.position_ids), torch.from_numpy(batch.cu_seqlens)), 1)
            yield (torch.from_numpy(batch.tokens), layout), (labels, scale)
