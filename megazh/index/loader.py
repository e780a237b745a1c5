"""Training batches as torch tensors, in a fixed order, prefetched by threads.

Threads suffice because gathering releases Python's global lock; unlike processes, they copy and pickle nothing.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megazh.index.mixture import Mixture

Batch = dict[str, torch.Tensor]


def training_batches(
    mixture: Mixture,
    micro_batch_size: int,
    start: int = 0,
    replica: int = 0,
    replicas: int = 1,
    workers: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Micro-batches of one replica, from training sample `start` until the mixture ends.

    Of each `micro_batch_size * replicas` consecutive samples, replica r gets `micro_batch_size`, from
    r * micro_batch_size on. Samples at the end of the mixture that do not suffice for all replicas are left out.

    Args:
        start: number of samples that all replicas together have consumed before.
        workers: number of threads that gather batches ahead; 0 gathers each batch when it is requested.
        prefetch: number of batches that each thread keeps ready.

    Yields:
        tokens, labels, position_ids (micro_batch, seq) int32, cu_seqlens (micro_batch, max_docs + 1) int32 and
        sample_numbers (micro_batch,) int64; in pinned memory if there is a GPU.
    """
    return _batches(
        mixture, _training_numbers(mixture.end, start, micro_batch_size, replica, replicas), workers, prefetch
    )


def _training_numbers(end: int | None, start: int, size: int, replica: int, replicas: int) -> Iterator[range]:
    while end is None or start + size * replicas <= end:
        yield range(start + replica * size, start + (replica + 1) * size)
        start += size * replicas


def _batches(mixture: Mixture, numbers: Iterable[range], workers: int, prefetch: int) -> Iterator[Batch]:
    pinned = torch.cuda.is_available()

    def fetch(batch: range) -> Batch:
        tensors = {name: torch.from_numpy(array) for name, array in mixture.batch(batch)._asdict().items()}
        tensors["sample_numbers"] = torch.arange(batch.start, batch.stop)
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
