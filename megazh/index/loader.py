"""Training batches as torch tensors, in a fixed order, made ahead of time by threads.

Threads suffice because gathering releases Python's global lock; unlike processes, they copy and pickle nothing.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from megazh.index.choices import Cut
from megazh.index.mixture import Mixture

Batch = dict[str, torch.Tensor]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def training_batches(
    mixture: Mixture,
    micro_batch_size: int,
    start: int = 0,
    replica: int = 0,
    replicas: int = 1,
    workers: int = 2,
    ready: int = 8,
    cut_of: Callable[[int], Cut | None] = lambda sample: None,
) -> Iterator[Batch]:
    """Micro-batches of one replica, from training sample `start` until the mixture ends.

    Of each `micro_batch_size * replicas` consecutive samples, replica r gets `micro_batch_size`, from
    r * micro_batch_size on. Samples at the end of the mixture that do not suffice for all replicas are left out.

    Args:
        start: number of samples that all replicas together have consumed before.
        workers: number of threads that gather batches ahead; 0 gathers each batch when it is requested.
        ready: number of batches that the threads keep in stock.
        cut_of: gives the cuts of a micro-batch by its first sample.

    Yields:
        tokens, labels (micro_batch, seq) int32, and document_map (micro_batch, seq + segments + 3) int32: position_ids
        (micro_batch, seq) and cu_seqlens (micro_batch, segments + 1), also given as views, and the bytes of the sample
        numbers, (micro_batch,) int64. All are in one block of memory of their own, pinned if there is a GPU.
    """
    numbers = _training_numbers(mixture.end, start, micro_batch_size, replica, replicas)
    make = functools.partial(_gather, mixture, cut_of, torch.cuda.is_available())
    return ahead(make, numbers, workers, ready) if workers else map(make, numbers)


def _training_numbers(end: int | None, start: int, size: int, replica: int, replicas: int) -> Iterator[range]:
    while end is None or start + size * replicas <= end:
        yield range(start + replica * size, start + (replica + 1) * size)
        start += size * replicas


def _gather(mixture: Mixture, cut_of: Callable[[int], Cut | None], pinned: bool, numbers: range) -> Batch:
    count, shape = len(numbers), mixture.shape
    widths = (shape.seq_len, shape.seq_len, shape.document_map_size)
    block = torch.empty(count * sum(widths), dtype=torch.int32, pin_memory=pinned)
    parts = block.split([count * width for width in widths])
    tokens, labels, document_map = (part.view(count, width) for part, width in zip(parts, widths, strict=True))
    mixture.gather(numbers, tokens.numpy(), labels.numpy(), document_map.numpy(), cut_of(numbers.start))
    return {
        "tokens": tokens,
        "labels": labels,
        "document_map": document_map,
        "position_ids": document_map[:, : shape.seq_len],
        "cu_seqlens": document_map[:, shape.seq_len : -2],
    }


def ahead(make: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, ready: int) -> Iterator[_Result]:
    """Yield `make(item)` of each item, in order, made by threads that end with the iterator.

    Args:
        make: called in any thread; what it raises is raised where its result would have been yielded.
        items: taken one by one, `ready` ahead of what is yielded.
        workers: number of threads, at least 1.
        ready: number of results to keep in stock or under way, at least 1.
    """
    items = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        pending = deque(pool.submit(make, item) for item in itertools.islice(items, ready))
        try:
            while pending:
                result = pending.popleft().result()
                if len(pending) <= ready // 2:  # several at once: to wake a thread takes longer than to give it work
                    missing = ready - len(pending)
                    pending.extend(pool.submit(make, item) for item in itertools.islice(items, missing))
                yield result
        finally:
            for future in pending:
                future.cancel()
