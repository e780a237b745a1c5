"""The disk of a run: speed of writes and flushes, and room for its checkpoints."""

import os
import tempfile
import time
from pathlib import Path

from megazh.cluster.doctor.report import Found, Verdict
from megazh.errors import MegazhError
from megazh.writing import free_bytes, size_text

_BYTES = 64 << 20
_FLUSHES = 16
_SLOW_MB_S = 100.0
_SLOW_FLUSH = 0.1
_SECONDS = 20.0
_LEAST_FREE = 10 << 30


def check(found: Found, folder: Path, needed: int | None, recipe: str) -> None:
    """Check the disk of a folder.

    Args:
        found: gets the findings.
        folder: where runs go.
        needed: bytes of all checkpoints of a run at a time; None where no recipe is given.
        recipe: its name.
    """
    free = free_bytes(folder)
    if free is None:
        found.add("disk", Verdict.SKIPPED, f"{folder}: its file system does not say how much is free")
    elif needed is not None:
        text = f"{folder}: {size_text(free)} free, and {recipe} keeps up to {size_text(needed)} of checkpoints"
        if free < needed:
            found.add(
                "disk", Verdict.BAD, text, "make room, keep fewer (checkpoint.keep_last), or another disk with -r"
            )
        else:
            found.add("disk", Verdict.OK, text)
    elif free < _LEAST_FREE:
        remedy = "make room; --recipe NAME compares with what a recipe's checkpoints need"
        found.add("disk", Verdict.WARNING, f"{folder}: {size_text(free)} free", remedy)
    else:
        text = f"{folder}: {size_text(free)} free; --recipe NAME compares with what a recipe's checkpoints need"
        found.add("disk", Verdict.OK, text)
    if free is not None and free < 2 * _BYTES:
        found.add("disk", Verdict.SKIPPED, f"{folder}: speed: too little room for {size_text(_BYTES)}")
        return
    try:
        rate, flush = speeds(folder)
    except OSError as error:
        text = f"{folder}: cannot be written: {error.strerror or error}"
        found.add("disk", Verdict.BAD, text, "choose a folder that you may write to with --folder")
        return
    text = f"{folder}: writes {rate:.0f} MB/s, flushes a small file in {flush * 1000:.1f} ms"
    if rate < _SLOW_MB_S or flush > _SLOW_FLUSH:
        found.add("disk", Verdict.WARNING, f"{text}: slow", "checkpoints take long there; a local disk may be faster")
    else:
        found.add("disk", Verdict.OK, text)


def speeds(folder: Path) -> tuple[float, float]:
    """MB/s of a file of 64 MiB, flushed to disk; and the median of seconds that a flush of 4 kB takes.

    Raises:
        OSError: nothing can be written there.
    """
    block = os.urandom(1 << 20)  # a disk that compresses gains nothing
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".megazh-doctor-", buffering=0) as file:
        begin, written = time.monotonic(), 0
        while written < _BYTES and time.monotonic() - begin < _SECONDS:
            written += file.write(block)
        os.fsync(file.fileno())
        rate = written / (time.monotonic() - begin) / 1e6
        seconds: list[float] = []
        begin = time.monotonic()
        while len(seconds) < _FLUSHES and time.monotonic() - begin < _SECONDS / 4:
            once = time.monotonic()
            file.write(block[:4096])
            os.fsync(file.fileno())
            seconds.append(time.monotonic() - once)
    return rate, sorted(seconds)[len(seconds) // 2]


def checkpoints_of(recipe: str, settings: list[str], ranks: int) -> int:
    """Bytes of the checkpoints that a recipe keeps at a time.

    Args:
        recipe: its name, its file, or the folder of a run.
        settings: `key=value` for it.
        ranks: number of GPUs.

    Raises:
        UsageError: there is no such recipe, or it cannot work.
    """
    from megazh.training.checks.place import space_of
    from megazh.training.layout import make_layout
    from megazh.training.recipe import Device, read_recipe
    from megazh.training.recipe_files import recipe_path
    from megazh.training.stages import work_of

    path = Path(recipe) / "config.yaml" if (Path(recipe) / "config.yaml").is_file() else recipe_path(recipe)
    read, _ = read_recipe(path, settings)
    stages = read.parallel.pipe_parallel_size
    wanted = read.parallel.num_gpus or max(ranks, stages)
    try:
        layout = make_layout(read, wanted, stages)
    except MegazhError:  # a number of GPUs that does not fit; the sizes of checkpoints hardly depend on it
        layout = make_layout(read, stages, stages)
    space = space_of(read, work_of(read, layout, read.precision.on(Device.CUDA)))
    return int(space.number * space.bytes_each)
