"""Memory and CPU time of processes, and the memory of an index build with a very long document."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from index_text import made_up_documents

from megazh.errors import WorkerError

_POLL_SECONDS = 0.02
LIMIT_BYTES = 500_000_000
LIMIT_DOCUMENTS = 6
"""Memory limit of a process: LIMIT_BYTES plus LIMIT_DOCUMENTS times the size of the largest document."""


def family(pid: int) -> list[int]:
    """Ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def peak(pid: int) -> int:
    """Peak resident memory of a process in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak(pid: int) -> None:
    """Reset the peak memory of a process to its present memory."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process with all its threads; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)  # the clock id that clock_getcpuclockid(3) returns
    return 0.0


@dataclass
class MemoryResult:
    """Peak memory of one build, in bytes."""

    workers: int
    builder: int
    """Peak of the process that hands out pieces and joins them; with one worker, it also encodes."""
    worker_processes: list[int]
    """Peaks of the worker processes."""
    largest_document: int
    limit: int
    met: bool
    seconds: float


def measure_memory(tokenizer: Path, megabytes: float, document_megabytes: float, seed: int) -> list[MemoryResult]:
    """Build an index of made-up text with one worker and with two, and measure every process.

    Args:
        megabytes: size of the text.
        document_megabytes: size of the long document in its middle.
    """
    with tempfile.TemporaryDirectory(prefix="megazh-bench-") as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        largest = 0
        with open(text, "wb") as file:
            for document in _with_a_long_one(int(megabytes * 1e6), int(document_megabytes * 1e6), seed):
                largest = max(largest, len(document.encode()))
                file.write(orjson.dumps({"text": document}) + b"\n")
        return [_watch(text, tokenizer, folder / f"out{workers}", workers, largest) for workers in (1, 2)]


def _with_a_long_one(size: int, long: int, seed: int) -> Iterator[str]:
    short = max(size - long, 0)
    yield from made_up_documents(short // 2, seed)
    yield "".join(made_up_documents(long, seed + 1))
    yield from made_up_documents(short - short // 2, seed + 2)


def _watch(text: Path, tokenizer: Path, output: Path, workers: int, largest: int) -> MemoryResult:
    command = [sys.executable, str(Path(__file__).parents[1] / "index_dataset.py"), "--workers", str(workers)]
    command += ["--input", str(text), "--tokenizer", str(tokenizer), "--output", str(output)]
    begin = time.perf_counter()
    peaks: dict[int, int] = {}
    trackers: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), peak(pid))
                with contextlib.suppress(OSError):
                    if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        trackers.add(pid)  # a helper process of multiprocessing, not a worker
            time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise WorkerError(f"the build with {workers} workers ended with exit code {process.returncode}")
    builder = peaks.pop(process.pid)
    others = sorted(size for pid, size in peaks.items() if pid not in trackers)
    limit = LIMIT_BYTES + LIMIT_DOCUMENTS * largest
    met = max([builder, *others]) <= limit
    return MemoryResult(workers, builder, others, largest, limit, met, time.perf_counter() - begin)


def print_memory(results: list[MemoryResult]) -> None:
    """Print the results of `measure_memory`, one line each."""
    for result in results:
        processes = " ".join(f"{size / 1e6:.0f}" for size in result.worker_processes) or "none: the builder encodes"
        print(
            f"{result.workers} worker{'s' if result.workers > 1 else ' '}: peak of the builder "
            f"{result.builder / 1e6:.0f} MB, of worker processes (MB) {processes}; limit {result.limit / 1e6:.0f} MB = "
            f"{LIMIT_BYTES / 1e6:.0f} MB + {LIMIT_DOCUMENTS} x the largest document "
            f"({result.largest_document / 1e6:.1f} MB): {'met' if result.met else 'missed'} ({result.seconds:.0f} s)"
        )


def memory_as_json(results: list[MemoryResult]) -> list[dict[str, Any]]:
    """The results of `measure_memory` for `--json`."""
    return [asdict(result) for result in results]
