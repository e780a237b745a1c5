"""Binding of a rank to the cores beside its GPU, on made-up machines."""

import subprocess
import sys
from pathlib import Path

import pytest

from megazh.training.binding import Nearby, cores_beside, cores_text, share

ALL = set(range(64))
ADDRESS = "0000:17:00.0"


def machine(root: Path, nodes: list[str], node: str, local: str) -> Path:
    """A sysfs with the cores of each NUMA node, and a GPU at one of them."""
    for number, cores in enumerate(nodes):
        folder = root / "devices" / "system" / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    gpu = root / "bus" / "pci" / "devices" / ADDRESS
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text(f"{node}\n")
    (gpu / "local_cpulist").write_text(f"{local}\n")
    return root


TWO = ["0-15,32-47", "16-31,48-63"]


def test_the_cores_beside_the_gpu_are_those_of_its_node(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO, "1", TWO[1])
    assert cores_beside(ADDRESS, root, ALL) == Nearby(1, frozenset([*range(16, 32), *range(48, 64)]))
    assert cores_beside(ADDRESS, root, set(range(20))) == Nearby(1, frozenset(range(16, 20)))
    assert cores_beside(ADDRESS, root, {0, 1}) == Nearby(1, frozenset())


@pytest.mark.parametrize(
    ("nodes", "node", "local"),
    [
        (["0-63"], "0", "0-63"),
        ([], "0", "0-63"),
        (["0-63", ""], "0", "0-63"),  # a node of memory alone
        (TWO, "-1", "0-63"),
        (TWO, "1", ""),
        (TWO, "1", "all of them"),
        (TWO, "none", "0-63"),
    ],
)
def test_where_nothing_is_to_choose_nothing_is_chosen(tmp_path: Path, nodes: list[str], node: str, local: str) -> None:
    assert cores_beside(ADDRESS, machine(tmp_path, nodes, node, local), ALL) is None


def test_an_unknown_gpu_has_no_cores(tmp_path: Path) -> None:
    assert cores_beside("0000:99:00.0", machine(tmp_path, TWO, "1", TWO[1]), ALL) is None


@pytest.mark.parametrize(
    ("cores", "ranks", "present", "threads"), [(32, 3, 64, 10), (32, 4, 8, 8), (2, 3, 8, 1), (32, 1, 5, 5)]
)
def test_ranks_share_the_cores_of_their_node(cores: int, ranks: int, present: int, threads: int) -> None:
    assert share(cores, ranks, present) == threads


@pytest.mark.parametrize(("cores", "text"), [({0, 1, 2, 5, 7, 8}, "0-2,5,7-8"), ({3}, "3"), (set(), "")])
def test_cores_are_written_as_sysfs_does(cores: set[int], text: str) -> None:
    assert cores_text(cores) == text


def test_all_threads_are_bound_and_those_that_come_later() -> None:
    code = """if True:
        import os, threading
        from megazh.training.binding import bind
        event, seen = threading.Event(), []
        look = lambda: (event.wait(), seen.append(os.sched_getaffinity(0)))
        earlier = threading.Thread(target=look); earlier.start()
        core = {min(os.sched_getaffinity(0))}
        bind(core)
        later = threading.Thread(target=look); later.start()
        event.set(); earlier.join(); later.join()
        assert seen == [core, core] and os.sched_getaffinity(0) == core, (seen, core)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
