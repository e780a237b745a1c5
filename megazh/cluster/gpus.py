"""Which GPUs there are, and which of them a run takes; or that it takes the CPU."""

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from megazh.errors import UsageError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Devices(NamedTuple):
    """What a run computes on."""

    kind: Literal["cpu", "cuda"]
    ranks: int
    """How many; one a GPU."""
    ids: tuple[str, ...] | None
    """The CUDA_VISIBLE_DEVICES of the ranks: numbers as nvidia-smi counts them, or UUIDs; None on the CPU."""
    note: str = ""
    """A line for the person at the terminal, where the choice may surprise; else empty."""


class Torch(NamedTuple):
    """What torch says of itself and of the machine."""

    version: str
    cuda: str | None
    """The CUDA version that it is built for; None: not built for CUDA."""
    gpus: int
    """How many it can use, of those that CUDA_VISIBLE_DEVICES lets it see."""
    failure: str = ""
    """Why it can use none, where it says so."""


def parse_gpu_list(text: str) -> list[int]:
    """The numbers in `1,2,3` or `0-5` or `0-2,5`, in that order.

    Raises:
        UsageError: anything else, or a number twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(f"-g {text}: expected numbers of GPUs such as 1,2,3 or 0-5, found {part!r}")
        numbers.extend(range(first, last + 1))
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise UsageError(f"-g {text}: {', '.join(map(str, twice))} is there twice; give each GPU once")
    return numbers


def choose_devices(device: str | None, gpus: str | None, count: int | None, wanted: int | None) -> Devices:
    """What a run computes on, from its options and from what the machine has.

    Args:
        device: `cpu`, `cuda`, or None: CUDA where torch can use it, else the CPU.
        gpus: a list for `parse_gpu_list`, counted as nvidia-smi counts; where CUDA_VISIBLE_DEVICES is set (Slurm does
            that), within what it lists.
        count: so many ranks. None: as many as `gpus` lists, else as many as `wanted`, or as there are GPUs if that is
            less.
        wanted: what the recipe is made for. None: all GPUs, or one rank on the CPU.

    Raises:
        UsageError: the options contradict each other or ask for what is not there, or the machine has an NVIDIA card
            that torch cannot use, and the CPU was not asked for.
    """
    numbers = None if gpus is None else parse_gpu_list(gpus)
    if device == "cpu":
        if numbers is not None:
            raise UsageError(f"-g {gpus} and --device cpu contradict each other; leave one of them out")
        return Devices("cpu", count or wanted or 1, None)
    if numbers is not None and count is not None and count != len(numbers):
        raise UsageError(f"-n {count}, but -g {gpus} lists {len(numbers)} GPUs; leave -n out, or list {count}")
    asked = f"-g {gpus}" if gpus is not None else "--device cuda" if device == "cuda" else ""
    torch = describe_torch()
    available = _available(torch)
    if not available:
        why = _why_none(torch, asked)
        return Devices("cpu", count or wanted or 1, None, f"computing on the CPU: {why}")
    if numbers is not None:
        return _listed(numbers, available, str(gpus))
    if count is not None and count > len(available):
        raise UsageError(f"-n {count}: there are {len(available)} GPUs ({_names(available)}); give a smaller -n")
    taken = available[: count or wanted or len(available)]
    return Devices("cuda", len(taken), tuple(taken))


def describe_torch() -> Torch:
    """Ask torch; takes seconds, since it is imported."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    failure = ""
    if torch.version.cuda is not None and not gpus:
        try:
            torch.cuda.init()
        except Exception as error:  # whatever the driver is up to
            failure = str(error).strip().partition("\n")[0].partition(". ")[0]
    return Torch(torch.__version__, torch.version.cuda, gpus, failure)


def nvidia_card(root: Path = Path("/")) -> str:
    """The file that shows that an NVIDIA card is in this machine, whether its driver works or not; empty: none is."""
    nodes = sorted(path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    if nodes:
        return str(nodes[0])
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = (folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA; display controller
            return str(folder)
    return ""


def _available(torch: Torch) -> list[str]:
    """What CUDA_VISIBLE_DEVICES must hold for each GPU that torch can use, in its order."""
    visible = os.environ.get(_VISIBLE)
    if visible is None:
        return [str(number) for number in range(torch.gpus)]
    return [part.strip() for part in visible.split(",")][: torch.gpus]


def _why_none(torch: Torch, asked: str) -> str:
    """Why no GPU is used. Raises UsageError where one was asked for, or where one is there that cannot be used."""
    visible, card = os.environ.get(_VISIBLE), nvidia_card()
    hidden = visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)
    if torch.cuda is None:
        why = f"this torch ({torch.version}) is built without CUDA"
        if asked:
            raise UsageError(
                f"{asked}: {why}; install one with it: unset MEGAZH_TORCH, remove .venv and run 'bash jobs/setup.sh' "
                "(own Python: the version in requirements/torch.txt), or give --device cpu"
            )
        return f"{why}, and would not use the NVIDIA card in this machine" if card and not hidden else why
    if hidden:
        why = f"{_VISIBLE}={visible} hides all GPUs"
        if asked:
            raise UsageError(f"{asked}: {why}; unset it, or ask Slurm for GPUs (--gres=gpu:N)")
        return why
    if card:
        raise UsageError(
            f"an NVIDIA card is in this machine ({card}), but torch {torch.version} cannot use it"
            f"{f' ({torch.failure})' if torch.failure else ''}; see whether nvidia-smi works, repair the driver or "
            f"upgrade it to one for CUDA {torch.cuda}, or give --device cpu"
        )
    if asked:
        raise UsageError(f"{asked}: no NVIDIA GPU is in this machine; leave that out, or give --device cpu")
    return "no NVIDIA GPU is in this machine"


def _listed(numbers: list[int], available: list[str], text: str) -> Devices:
    """The GPUs that a list of numbers means."""
    visible = os.environ.get(_VISIBLE)
    missing = [number for number in numbers if number >= len(available)]
    if missing:
        within = f" within {_VISIBLE}={visible}" if visible is not None else ""
        raise UsageError(
            f"-g {text}: no GPU {', '.join(map(str, missing))}; there are {_names(range(len(available)))}{within}"
        )
    ids = tuple(available[number] for number in numbers)
    note = ""
    if visible is not None and ids != tuple(map(str, numbers)):
        note = f"-g {text} counts within {_VISIBLE}={visible}: GPUs {','.join(ids)} of this machine"
    return Devices("cuda", len(ids), ids, note)


def _names(ids: list[str] | range) -> str:
    return ", ".join(map(str, ids))
