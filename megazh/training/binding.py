"""Binding of a rank to the cores beside its GPU, on machines with several NUMA nodes.

Memory of another node is slower to reach, and so is the GPU from another node's cores. `local_cpulist` and `numa_node`
of sysfs are described in Documentation/ABI/testing/sysfs-bus-pci of Linux.
"""

import contextlib
import os
import socket
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch

from megazh.training.collect import gather

SYSFS = Path("/sys")
_MOST_CORES = 1 << 16


@dataclass(frozen=True)
class Nearby:
    """Cores beside a GPU."""

    node: int
    """Number of their NUMA node."""
    cores: frozenset[int]
    """Those of them that this process may use."""


def pci_address(device: torch.device) -> str:
    """PCI address of a GPU as sysfs and nvidia-smi have it, such as `0000:17:00.0`."""
    card = torch.cuda.get_device_properties(device)
    return f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"  # type: ignore[attr-defined]


def bind_to_gpu(device: torch.device, sysfs: Path = SYSFS) -> str:
    """Bind all threads of this process to the cores beside its GPU, and share those with the other ranks there.

    The cores are used by all ranks of their node; each has an even share of threads (OMP_NUM_THREADS), and not more
    than it had. All ranks call it, once they have joined. Nothing happens on the CPU, and where there is one node.

    Args:
        device: this rank's device.
        sysfs: where sysfs is mounted.

    Returns:
        A line for the rank's log; empty where nothing was done and there is nothing to say.
    """
    if device.type != "cuda":
        return ""
    allowed = os.sched_getaffinity(0)
    near = cores_beside(pci_address(device), sysfs, allowed)
    places = gather((socket.gethostname(), near.node if near and near.cores else None))
    if near is None:
        return ""
    if not near.cores:
        return (
            f"its GPU is at NUMA node {near.node}, of which this process may use no core: it stays on cores "
            f"{cores_text(allowed)}; ask for cores beside the GPU (Slurm: --gpu-bind=closest)"
        )
    ranks = places.count((socket.gethostname(), near.node))
    threads = share(len(near.cores), ranks, torch.get_num_threads())
    bind(near.cores)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of what it starts
    return (
        f"bound to the cores of NUMA node {near.node}, beside its GPU: {cores_text(near.cores)}; {threads} threads, "
        f"{ranks} ranks there"
    )


def cores_beside(address: str, sysfs: Path, allowed: Set[int]) -> Nearby | None:
    """The cores beside the GPU at a PCI address; None with one NUMA node, and where sysfs does not say.

    Args:
        address: its PCI address.
        sysfs: where sysfs is mounted.
        allowed: cores that this process may use.
    """
    nodes = [path for path in sysfs.glob("devices/system/node/node[0-9]*") if _cores(path / "cpulist")]
    if len(nodes) < 2:  # nodes without cores are memory alone
        return None
    folder = sysfs / "bus" / "pci" / "devices" / address
    try:
        node = int((folder / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    cores = _cores(folder / "local_cpulist")
    if node < 0 or not cores:  # -1: the firmware does not tell
        return None
    return Nearby(node, frozenset(cores & allowed))


def share(cores: int, ranks: int, present: int) -> int:
    """Threads of each of `ranks` ranks that share some cores; at most as many as it has at present, and at least 1."""
    return max(1, min(present, cores // ranks))


def bind(cores: Set[int]) -> None:
    """Bind all threads of this process to some cores; threads that they start later inherit it."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(task), cores)


def cores_text(cores: Set[int]) -> str:
    """Numbers of cores as sysfs writes them, such as `0-15,32-47`."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _cores(path: Path) -> set[int]:
    """The cores in a file such as `0-15,32-47`; none where it cannot be read."""
    found: set[int] = set()
    try:
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), min(int(last or first), _MOST_CORES) + 1))
    except (OSError, ValueError):
        return set()
    return found
