"""Batches for training as torch tensors, gathered ahead by threads, in a fixed order.

Threads, not processes: the gathering runs without Python's lock, so that nothing has to be copied or pickled.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megazh.index.mixture import Mixture, ValidationSamples

Batch = dict[str, torch.Tensor]


def training_batches(
    mixture: Mixture,
    micro_batch_size: int,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Micro-batches of one data-parallel rank, from training sample `start` on, until the mixture ends.

    Of each run of `micro_batch_size * ranks` samples, rank r gets those from r * micro_batch_size on.

    Args:
        start: samples that were consumed before, by all ranks together.
        workers: threads that gather ahead; 0 gathers when asked.
        prefetch: batches that each of them keeps ready.

    Yields:
        tokens, labels, position_ids (micro_batch, seq) int32 and cu_seqlens (micro_batch, max_docs + 1) int32; in
        pinned memory where there is a GPU.
    """
    return _batches(mixture, _training_numbers(mixture.end, start, micro_batch_size, rank, ranks), workers, prefetch)


def validation_batches(samples: ValidationSamples, micro_batch_size: int, workers: int = 1) -> Iterator[Batch]:
    """All validation samples once, in order, as `training_batches` does; the last batch may be smaller."""
    size = len(samples)
    numbers = (range(at, min(at + micro_batch_size, size)) for at in range(0, size, micro_batch_size))
    return _batches(samples, numbers, workers, prefetch=2)


def _training_numbers(end: int | None, start: int, size: int, rank: int, ranks: int) -> Iterator[range]:
    while end is None or start + size * ranks <= end:
        yield range(start + rank * size, start + (rank + 1) * size)
        start += size * ranks


def _batches(
    samples: Mixture | ValidationSamples, numbers: Iterable[range], workers: int, prefetch: int
) -> Iterator[Batch]:
    pinned = torch.cuda.is_available()

    def fetch(batch: range) -> Batch:
        tensors = {name: torch.from_numpy(array) for name, array in samples.batch(batch)._asdict().items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pinned else tensors

    if workers == 0:
        yield from map(fetch, numbers)
        return
    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        try:
            for batch in numbers:
                pending.append(pool.submit(fetch, batch))
                if len(pending) > workers * prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
