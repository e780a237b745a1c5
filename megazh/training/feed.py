"""Micro-batches as the pipeline engine takes them, each with the scale that makes DeepSpeed's mean of means right."""

from collections.abc import Iterator

import torch

from megazh.index.loader import Batch, training_batches
from megazh.index.mixture import Mixture, ValidationSamples
from megazh.training.layout import Layout

MicroBatch = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""((tokens, layout), (labels, scale)): (batch, seq), (batch, seq + max_docs + 1), (batch, seq) int32, (1,) fp32."""


def training_feed(
    mixture: Mixture, layout: Layout, replica: int, first_step: int, workers: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one replica from step `first_step` (from 0) on, up to the mixture's last whole step.

    Step n takes the samples from n * global_batch_size on, whatever the layout. DeepSpeed averages the loss over
    micro-batches and replicas; each micro-batch's summed loss is scaled by micro_batches * replicas / valid labels of
    the whole step, so that the average is the mean over tokens.
    """
    size = layout.micro_batch_size * layout.micro_batches * layout.replicas
    batches = training_batches(mixture, layout.micro_batch_size, first_step * size, replica, layout.replicas, workers)
    step = first_step
    while mixture.end is None or (step + 1) * size <= mixture.end:
        valid = sum(mixture.valid_labels(number) for number in range(step * size, (step + 1) * size))
        scale = torch.tensor([layout.micro_batches * layout.replicas / max(valid, 1)])
        for _ in range(layout.micro_batches):
            yield as_micro_batch(next(batches), scale)
        step += 1


def as_micro_batch(batch: Batch, scale: torch.Tensor) -> MicroBatch:
    """A batch of samples in the engine's form."""
    layout = torch.cat((batch["position_ids"], batch["cu_seqlens"]), 1)
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
