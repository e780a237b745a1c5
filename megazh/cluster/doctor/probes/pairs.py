"""Send, receive and all-reduce between each pair of ranks, one per GPU, and over all of them."""

import datetime
import itertools
import time
from collections.abc import Callable

from megazh.cluster.doctor.probe import Report


def probe(report: Report, backend: str, size: int, seconds: float, rank: int, ranks: int, store: str) -> None:
    """Report the GB/s of each pair, from the rank that receives, and of an all-reduce over all, from rank 0.

    Args:
        report: as in `megazh.cluster.doctor.probe`.
        backend: `nccl` on GPUs, `gloo` on the CPU.
        size: bytes of a tensor.
        seconds: time limit of torch for one operation.
        rank, ranks: this process among all.
        store: a file where the ranks meet.
    """
    import torch
    from torch import distributed

    on_gpu = backend == "nccl"
    if on_gpu:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    limit = datetime.timedelta(seconds=seconds)
    meeting = distributed.FileStore(store, ranks)
    distributed.init_process_group(backend, store=meeting, rank=rank, world_size=ranks, timeout=limit)

    def finish() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def rate(operation: Callable[[], None], rounds: int = 5) -> float:
        operation()
        operation()
        finish()
        begin = time.perf_counter()
        for _ in range(rounds):
            operation()
        finish()
        return rounds * size / (time.perf_counter() - begin) / 1e9

    tensor = torch.empty(size // 4, dtype=torch.float32, device=device)
    for first, second in itertools.combinations(range(ranks), 2):
        group = distributed.new_group([first, second], timeout=limit)  # a call of all ranks
        if rank in (first, second):
            if rank == first:
                report({"begin": f"send and receive between GPU {first} and GPU {second}"})

            def send(first: int = first, second: int = second, group: distributed.ProcessGroup = group) -> None:
                if rank == first:
                    distributed.send(tensor, second, group)
                else:
                    distributed.recv(tensor, first, group)

            tensor.fill_(rank + 1)
            sent = rate(send)
            right = bool((tensor == first + 1).all())
            if rank == first:
                report({"begin": f"an all-reduce between GPU {first} and GPU {second}"})
            tensor.fill_(rank + 1)
            distributed.all_reduce(tensor, group=group)
            right = right and bool((tensor == first + second + 2).all())

            def reduce(group: distributed.ProcessGroup = group) -> None:
                distributed.all_reduce(tensor, group=group)

            tensor.zero_()
            reduced = rate(reduce)
            if rank == second:  # which has received
                report({"pair": [first, second], "send": sent, "all_reduce": reduced, "right": right})
            distributed.barrier(group, device_ids=[rank] if on_gpu else None)
        meeting.add(f"done {first} {second}", 1)  # the next pair begins when this one is done: no shared links
        meeting.wait([f"done {first} {second}"], limit)
        while meeting.add(f"done {first} {second}", 0) < ranks:
            time.sleep(0.01)
    if rank == 0:
        report({"begin": "an all-reduce over all GPUs"})
    tensor.fill_(rank + 1)
    distributed.all_reduce(tensor)
    right = bool((tensor == ranks * (ranks + 1) // 2).all())
    tensor.zero_()
    reduced = rate(lambda: distributed.all_reduce(tensor) and None)
    if rank == 0:
        report({"all": ranks, "all_reduce": reduced, "right": right})
    distributed.destroy_process_group()
