"""Limits of this user and machine that stop runs: locked memory, open files, processes, shared memory."""

import os
import resource
from pathlib import Path

from megazh.cluster.doctor.report import Found, Verdict
from megazh.writing import size_text

_LEAST_FILES = 4096
_LEAST_PROCESSES = 4096
_LEAST_SHARED = 1 << 30
_SHARED_PER_GPU = 64 << 20


def check(
    found: Found, gpus: int, shared: Path = Path("/dev/shm"), infiniband: Path = Path("/sys/class/infiniband")
) -> None:
    """Check the limits.

    Args:
        found: gets findings and settings.
        gpus: number of GPUs; without any, NCCL's needs are not checked.
        shared: folder of shared memory.
        infiniband: folder that lists InfiniBand cards.
    """
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _less(files, _LEAST_FILES):
        enough = not _less(most_files, _LEAST_FILES)
        remedy = f"ulimit -n {_LEAST_FILES}" if enough else "raise nofile in /etc/security/limits.conf, log in again"
        found.add("limits", Verdict.WARNING, f"{files} files may be open at a time (ulimit -n)", remedy)
        if enough:
            found.use(f"ulimit -n {_LEAST_FILES}", "each rank opens sockets to all others, and many data files")
    else:
        found.add("limits", Verdict.OK, f"open files (ulimit -n): {_text(files)}")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if _less(processes, _LEAST_PROCESSES):
        text = f"{processes} processes and threads of this user may run at a time (ulimit -u)"
        found.add("limits", Verdict.WARNING, text, "raise nproc in /etc/security/limits.conf, log in again")
    else:
        found.add("limits", Verdict.OK, f"processes (ulimit -u): {_text(processes)}")
    _locked(found, infiniband)
    _shared(found, gpus, shared)


def _locked(found: Found, infiniband: Path) -> None:
    locked, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cards = sorted(each.name for each in infiniband.iterdir()) if infiniband.is_dir() else []
    text = f"locked memory (ulimit -l): {'unlimited' if locked == resource.RLIM_INFINITY else size_text(locked)}"
    if cards and locked != resource.RLIM_INFINITY:
        remedy = "memlock unlimited in /etc/security/limits.conf; under Slurm also LimitMEMLOCK=infinity for slurmd"
        found.add("limits", Verdict.BAD, f"{text}; {', '.join(cards)} cannot register buffers", remedy)
        if most == resource.RLIM_INFINITY:
            found.use("ulimit -l unlimited", "InfiniBand registers its buffers as locked memory")
    else:
        found.add("limits", Verdict.OK, text if cards else f"{text}; without InfiniBand any is enough")


def _shared(found: Found, gpus: int, shared: Path) -> None:
    try:
        disk = os.statvfs(shared)
    except OSError as error:
        found.add(
            "limits", Verdict.BAD, f"{shared}: {error.strerror}; torch and NCCL share memory there", f"mount {shared}"
        )
        return
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    text = f"{shared}: {size_text(size)}, {size_text(free)} free"
    if free < _SHARED_PER_GPU * max(gpus, 1):
        remedy = f"delete files of dead processes in {shared}; in a container: --shm-size=1g or --ipc=host"
        found.add("limits", Verdict.BAD, f"{text}; NCCL fails, or is killed, without more", remedy)
    elif size < _LEAST_SHARED:
        found.add("limits", Verdict.WARNING, f"{text}; NCCL wants 1 GB", "in a container: --shm-size=1g or --ipc=host")
    else:
        found.add("limits", Verdict.OK, text)


def _less(limit: int, least: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < least


def _text(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
