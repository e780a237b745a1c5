"""Timed copies between host and GPU, and between two GPUs, with a look at each PCIe link while it is busy."""

import subprocess
import time
from collections.abc import Callable

from megazh.cluster.doctor.probe import Report

_BYTES = 256 << 20
_LOOKING_SECONDS = 8.0


def probe(report: Report, looks: dict[str, list[str]], peers: list[list[bool]]) -> None:
    """Report the GB/s of each copy.

    Args:
        report: as in `megazh.cluster.doctor.probe`.
        looks: for each GPU's number as text, a command whose output is reported as `under_load`.
        peers: whether each GPU (row) can access each other one's memory; others are copied through the host.
    """
    import torch

    number = torch.cuda.device_count()
    for gpu in range(number):
        report({"begin": f"a copy between the host and GPU {gpu}"})
        with torch.cuda.device(gpu):
            host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
            device = torch.empty(_BYTES, dtype=torch.uint8, device="cuda")

            def write(device: torch.Tensor = device, host: torch.Tensor = host) -> None:
                device.copy_(host, non_blocking=True)

            def read(device: torch.Tensor = device, host: torch.Tensor = host) -> None:
                host.copy_(device, non_blocking=True)

            under_load = _look(looks.get(str(gpu)), write)
            report({"gpu": gpu, "to_gpu": _rate(write, gpu), "to_host": _rate(read, gpu), "under_load": under_load})
            del host, device
    for first in range(number):
        for second in range(number):
            if first == second:
                continue
            report({"begin": f"a copy from GPU {first} to GPU {second}"})
            source = torch.arange(_BYTES // 4, dtype=torch.int32, device=f"cuda:{first}")
            target = torch.zeros_like(source, device=f"cuda:{second}")
            torch.cuda.synchronize(second)

            def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
                target.copy_(source, non_blocking=True)

            rate = _rate(copy, first)
            torch.cuda.synchronize(second)
            right = bool(torch.equal(target.cpu(), source.cpu()))
            report({"from": first, "to": second, "rate": rate, "right": right, "peer": peers[first][second]})
            del source, target


def _rate(copy: Callable[[], None], gpu: int) -> float:
    """GB/s of a copy of `_BYTES`: the best of three rounds of four copies."""
    import torch

    copy()
    torch.cuda.synchronize(gpu)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(4):
            copy()
        torch.cuda.synchronize(gpu)
        best = max(best, 4 * _BYTES / (time.perf_counter() - begin) / 1e9)
    return best


def _look(command: list[str] | None, copy: Callable[[], None]) -> str:
    """The output of a command that is run while copies are under way; empty without one, or where it fails."""
    import torch

    if not command:
        return ""
    looking = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    end = time.monotonic() + _LOOKING_SECONDS
    while looking.poll() is None and time.monotonic() < end:
        copy()
        torch.cuda.synchronize()
    if looking.poll() is None:
        looking.kill()
    output, _ = looking.communicate()
    return output.decode(errors="replace") if looking.returncode == 0 else ""
