"""Helpers of kernels that reduce: numbers of programs and warps, and the sum of the programs' partial sums."""

import functools

import torch


def programs(device: torch.device, per_processor: int) -> int:
    """Number of programs to launch: `per_processor` for each multiprocessor; 4 on a CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 4
    return per_processor * _processors(device.index if device.index is not None else torch.cuda.current_device())


def warps_for(block: int) -> int:
    """Number of warps for a row of `block` 2-byte elements: 16 bytes per thread, from 1 to 16 warps."""
    return min(16, max(1, block // 256))


def sum_rows(partial: torch.Tensor) -> torch.Tensor:
    """Sum partial sums (rows, width) fp32 to (width,), in a fixed order.

    A matrix product with ones is faster than torch's sum of so few rows.
    """
    return torch.mv(partial.T, partial.new_ones(len(partial)))


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
