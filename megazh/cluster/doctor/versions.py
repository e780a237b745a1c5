"""Versions of driver, CUDA, torch, DeepSpeed, NCCL, Python and Linux, beside those that are known to be bad."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from megazh import __version__
from megazh.cluster.doctor.report import Found, Verdict
from megazh.cluster.doctor.smi import Gpu


class KnownBad(NamedTuple):
    """Releases of a program that must not, or should not, be used."""

    program: str
    since: tuple[int, ...]
    """First bad release; () is the very first."""
    before: tuple[int, ...]
    """First good release after them."""
    verdict: Verdict
    why: str
    source: str
    remedy: str
    machine: str = ""
    """Machine type, as uname gives it, that alone is concerned; empty: all."""


KNOWN_BAD = (
    KnownBad(
        "deepspeed", (0, 18, 3), (0, 19, 4), Verdict.BAD,
        "0.18.3 to 0.19.3 scale pipeline gradients wrongly",
        "DeepSpeed pull requests 7665, 7787, 8154",
        "install 0.19.4 or later",
    ),
    KnownBad(
        "linux", (), (5, 5), Verdict.WARNING,
        "processes that share memory may hang on Linux before 5.5",
        "Hugging Face Accelerate warns of it (issue 1929); distributions may have repaired theirs",
        "upgrade the kernel if runs hang",
    ),
    KnownBad(
        "nccl", (2, 29, 2), (2, 29, 3), Verdict.BAD,
        "2.29.2 may hang on ARM",
        "release notes of NCCL 2.29.3",
        "install a torch with NCCL 2.29.3 or later",
        "aarch64",
    ),
)  # fmt: skip
"""Only what has a public source."""

_NAMES = {"megazh": "megazh", "python": "Python", "linux": "Linux", "torch": "torch", "triton": "Triton"}
_NAMES |= {"deepspeed": "DeepSpeed", "cuda": "CUDA of torch", "nccl": "NCCL", "driver": "NVIDIA driver"}


def check(found: Found, gpus: list[Gpu], of_torch: dict[str, str]) -> None:
    """Note the versions of this machine as facts, and compare them with `KNOWN_BAD`.

    Args:
        found: gets facts and findings.
        gpus: the GPUs by nvidia-smi, which name the driver.
        of_torch: versions of `cuda` and `nccl` that torch gives; without the second where there is no GPU.
    """
    facts = {"megazh": __version__, "python": platform.python_version(), "linux": os.uname().release}
    for package in ("torch", "triton", "deepspeed"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing"
    facts |= {name: value for name, value in of_torch.items() if value}
    drivers = sorted({gpu.text("driver_version") for gpu in gpus} - {""})
    if drivers:
        facts["driver"] = drivers[0]
    found.facts.update(facts)
    bad = [each for each in KNOWN_BAD if each.program in facts and concerns(each, facts[each.program])]
    for each in bad:
        text = f"{_NAMES[each.program]} {facts[each.program]}: {each.why} ({each.source})"
        found.add("versions", each.verdict, text, each.remedy)
    for package in ("torch", "deepspeed"):
        if facts[package] == "missing":
            found.add("versions", Verdict.BAD, f"{package} is not installed", "bash jobs/setup.sh")
    listed = ", ".join(f"{name} {facts[key]}" for key, name in _NAMES.items() if key in facts)
    if not bad:
        found.add("versions", Verdict.OK, f"{listed}; none is known to be bad")
    else:
        found.add("versions", Verdict.OK, f"all: {listed}")
    if "driver" not in facts or "nccl" not in facts:
        missing = [name for key, name in (("driver", "NVIDIA driver"), ("nccl", "NCCL")) if key not in facts]
        found.add("versions", Verdict.SKIPPED, f"{' and '.join(missing)}: torch or nvidia-smi finds no GPU here")


def concerns(entry: KnownBad, text: str, machine: str | None = None) -> bool:
    """Whether a version, such as `0.18.4+cu130` or `5.4.0-150-generic`, is among those of an entry.

    Args:
        entry: the entry.
        text: the version.
        machine: machine type as uname gives it; None: this one.
    """
    if entry.machine and entry.machine != (os.uname().machine if machine is None else machine):
        return False
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        return False
    parts = tuple(int(part) for part in match[0].split("."))
    return entry.since <= parts < entry.before
