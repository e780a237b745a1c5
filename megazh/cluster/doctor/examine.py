"""Examine this machine: every check in turn, each within its time."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megazh.cluster.doctor import disk, gpus, kernels, limits, links, network, smi, versions
from megazh.cluster.doctor.child import Deadline, probe
from megazh.cluster.doctor.report import Found, Report, Verdict
from megazh.progress import Progress

_CUDA_SECONDS = 90.0
_KERNEL_SECONDS = 120.0
_LOG_SECONDS = 10.0


@dataclass(frozen=True)
class Wanted:
    """What an examination is to look at."""

    folder: Path
    """Folder of runs, whose disk is checked."""
    limit: float
    """Seconds for all checks together; those for which none are left are skipped."""
    recipe: str = ""
    """Recipe or run whose checkpoints have to fit on the disk; empty: none."""
    settings: list[str] = field(default_factory=list)
    """`key=value` for the recipe."""


def examine(wanted: Wanted, quiet: bool = False) -> Report:
    """Examine this machine.

    Args:
        wanted: what to look at.
        quiet: show no progress.

    Raises:
        UsageError: the recipe does not exist, or cannot work.
    """
    begin = time.monotonic()
    deadline, found = Deadline(wanted.limit), Found()
    needed = disk.checkpoints_of(wanted.recipe, wanted.settings, 1) if wanted.recipe else None
    why_no_smi = smi.why_missing()
    cards, why_no_smi = ([], why_no_smi) if why_no_smi else smi.query()
    running = [] if why_no_smi else smi.processes()
    with Progress("doctor", 8, quiet, "checks") as progress:
        cuda = gpus.read_probe(*probe("cuda", {}, deadline.left(_CUDA_SECONDS)))
        progress.advance(1)

        def kernels_check() -> None:
            if not cuda.gpus:
                found.add("kernels", Verdict.SKIPPED, "Triton's kernels: no GPU to compile for")
                return
            for gpu in range(1 if len(set(found.cards)) < 2 else len(cuda.gpus)):
                reported, ended = probe("kernels", {"device": f"cuda:{gpu}"}, deadline.left(_KERNEL_SECONDS))
                if ended.code is None and not deadline.left(1):
                    found.add("kernels", Verdict.SKIPPED, "no time was left to compile them; give a larger --limit")
                    return
                kernels.check(found, reported, ended)

        checks: dict[str, Callable[[], None]] = {
            "versions": lambda: versions.check(found, cards, cuda.versions),
            "gpus": lambda: _gpus(found, cuda, cards, why_no_smi, running),
            "links": lambda: links.check(found, cuda, cards, deadline),
            "kernels": kernels_check,
            "disk": lambda: disk.check(found, wanted.folder, needed, wanted.recipe),
            "limits": lambda: limits.check(found, len(cuda.gpus)),
            "network": lambda: network.check(found),
        }
        for subject, check in checks.items():
            if deadline.left(1) > 0:
                check()
            else:
                text = f"the time limit of {wanted.limit:.0f} s is over; give a larger --limit"
                found.add(subject, Verdict.SKIPPED, text)
            progress.advance(1)
    order = list(checks)
    found.findings.sort(key=lambda finding: order.index(finding.subject))
    return found.report(socket.gethostname(), time.monotonic() - begin)


def _gpus(found: Found, cuda: gpus.Cuda, cards: list[smi.Gpu], why_no_smi: str, running: list[smi.Process]) -> None:
    gpus.check(found, cuda, cards, why_no_smi, running)
    if cuda.gpus:
        gpus.check_log(found, _LOG_SECONDS)
