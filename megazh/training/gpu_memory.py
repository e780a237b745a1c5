"""Memory of this rank's GPU: what torch may take, and what it took."""

import torch


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let torch allocate at most `gib` GiB on a GPU; nothing happens for None, and on the CPU."""
    if gib is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Largest numbers of bytes allocated and reserved on a GPU since the process began; zeros on the CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
