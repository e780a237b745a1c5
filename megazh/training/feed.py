"""Micro-batches in the form of the pipeline engine, each with the scale that makes the loss a mean over tokens."""

import functools
import itertools
from collections.abc import Iterable, Iterator

import torch

from megazh.index.choices import Cut
from megazh.index.loader import Batch, ahead, training_batches
from megazh.index.mixture import Mixture, ValidationSamples
from megazh.model.document_map import encode_document_map
from megazh.run.pulse import beat
from megazh.training.course import Course
from megazh.training.layout import Layout

MicroBatch = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""((tokens, document map), (labels, scale)).

Shapes: (batch, seq), (batch, seq + segments + 3) and (batch, seq) int32, and (1,) fp32.
"""


_READY, _MOST_READY = 4, 64
"""Micro-batches in stock beyond those of a step, also the scales of steps; and the most micro-batches in all.

A recorded graph only queues the work of a micro-batch: all micro-batches of a step are requested at once.
"""


def training_feed(
    mixture: Mixture, layout: Layout, replica: int, first_step: int, workers: int, course: Course, passed: int = 0
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one replica from step `first_step` (from 0) to the mixture's last whole step.

    Step n takes the samples from `course.samples_before(n)` + passed on, whatever the layout, with the cuts of
    `course`. Each micro-batch's summed loss is scaled by 1 / valid labels of the whole step, so that the sum over
    micro-batches and replicas is a mean over tokens.

    Args:
        mixture: the data.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        first_step: optimizer steps done before.
        workers: threads that gather samples ahead of time.
        course: batch and cuts of each step.
        passed: samples that rollbacks passed over: every step takes those that come so many later.
    """
    size, begin = layout.micro_batch_size, course.samples_before(first_step)
    ready = min(layout.micro_batches + _READY, _MOST_READY)

    def cut_of(sample: int) -> Cut | None:
        return course.cut_of(sample - passed)

    batches = training_batches(mixture, size, begin + passed, replica, layout.replicas, workers, ready, cut_of)
    steps: Iterable[int] = itertools.count(first_step)
    if mixture.end is not None:
        steps = range(first_step, course.batches.step_of(max(mixture.end - passed, 0)))

    scale_of = functools.partial(_scale, mixture, course, passed, torch.cuda.is_available())
    scales = ahead(scale_of, steps, 1, _READY) if workers else map(scale_of, steps)
    for step, scale in zip(itertools.count(first_step), scales, strict=False):
        number = layout.micro_batches_of(course.samples(step))
        yield from map(_micro_batch, itertools.islice(batches, number), itertools.repeat(scale))


def _scale(mixture: Mixture, course: Course, passed: int, pinned: bool, step: int) -> torch.Tensor:
    begin, end = course.samples_before(step), course.samples_before(step + 1)
    valid = mixture.count_labels(range(begin + passed, end + passed), course.cut_of(begin))
    return torch.tensor([1 / max(valid, 1)], pin_memory=pinned)


def _micro_batch(batch: Batch, scale: torch.Tensor) -> MicroBatch:
    beat("training")
    return (batch["tokens"], batch["document_map"]), (batch["labels"], scale)


class ValidationFeed:
    """The held-out samples in whole micro-batches for all replicas, each of one corpus.

    Micro-batches at the end of a corpus, and those at the end of the pass, are filled up with ignored rows.

    Args:
        samples: all held-out samples.
        layout: the arrangement of the ranks.
        replica: number of this rank's replica.
        limit: largest number of samples to use, evenly spread over all; None: all.
    """

    def __init__(self, samples: ValidationSamples, layout: Layout, replica: int, limit: int | None) -> None:
        count = min(len(samples), limit or len(samples))
        self._samples, self._layout = samples, layout
        self.numbers = [place * len(samples) // count for place in range(count)]
        self.valid = sum(samples.valid_labels(number) for number in self.numbers)
        """Labels of these samples that are not ignored."""
        pieces = [
            (corpus, piece)
            for corpus, numbers in itertools.groupby(self.numbers, samples.corpus_of)
            for piece in _pieces(list(numbers), layout.micro_batch_size)
        ]
        self.micro_batches = -(-len(pieces) // layout.replicas)
        """Micro-batches per replica in one validation pass."""
        own = pieces[replica :: layout.replicas]
        self._pieces = own + [(0, [])] * (self.micro_batches - len(own))
        self.corpora = [corpus for corpus, _ in self._pieces]
        """Number of the corpus of each micro-batch of this replica, in `samples.names`; 0 where it has ignored rows
        alone."""

    def __iter__(self) -> Iterator[MicroBatch]:
        scale = torch.tensor([1 / max(self.valid, 1)])
        for _, rows in self._pieces:
            missing = self._layout.micro_batch_size - len(rows)
            samples = self._samples.batch([*rows, *[0] * missing])
            tokens, labels, position_ids, cu_seqlens = map(torch.from_numpy, samples)
            labels[len(rows) :] = -100
            beat("validation")
            yield (tokens, encode_document_map(position_ids, cu_seqlens)), (labels, scale)


def _pieces(numbers: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]
