"""How many programs and warps a kernel is started with."""

import functools

import torch


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(device: torch.device, each: int) -> int:
    """As many programs as there are multiprocessors, times `each`; on a CPU (Triton's interpreter) a few."""
    if device.type != "cuda":
        return 4
    return each * _processors(device.index if device.index is not None else torch.cuda.current_device())


def warps_for(block: int) -> int:
    """Warps for a row of `block` elements of two bytes: 16 bytes a thread, from 1 to 16 warps."""
    return min(16, max(1, block // 256))
