"""Choose the devices of a run, GPUs or the CPU, from `-g`, `-n`, `--device` and the GPUs of this machine."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from megazh.cluster.cuda import Torch, describe_torch
from megazh.errors import UsageError
from megazh.training.job import Devices
from megazh.training.recipe import Device

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def parse_gpu_list(text: str) -> list[int]:
    """Read GPU numbers such as `1,2,3`, `0-5` or `0-2,5`, in that order.

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
        raise UsageError(f"-g {text}: {', '.join(map(str, twice))} is listed twice; give each GPU once")
    return numbers


def choose_devices(
    device: str | None,
    gpus: str | None,
    count: int | None,
    wanted: int | None,
    *,
    cpu_may_stand_in: bool = True,
    fewer_will_do: bool = False,
    elsewhere: bool = False,
) -> Devices:
    """Choose the devices of a run from its options and from the GPUs of the machine.

    Args:
        device: `cpu`, `cuda`, or None: CUDA where torch can use it, else the CPU.
        gpus: a list for `parse_gpu_list`, numbered as nvidia-smi does; where CUDA_VISIBLE_DEVICES is set (Slurm does
            that), the numbers count within its list.
        count: number of ranks. None: as many as `gpus` lists, else as many as `wanted` or as there are GPUs,
            whichever is less.
        wanted: number of GPUs that the recipe is made for. None: all GPUs, or one rank on the CPU.
        cpu_may_stand_in: whether the recipe computes on the CPU where there is no GPU. Else `device` must be `cpu`.
        fewer_will_do: whether GPUs that were requested may be missing, as long as there is one.
        elsewhere: whether the run is only described, and may start on another machine: GPUs that were requested are
            taken as they were given where this machine has none.

    Raises:
        UsageError: the options contradict each other or name GPUs that are not there, or the machine has no GPU that
            torch can use and the CPU was neither requested nor may stand in.
    """
    numbers = None if gpus is None else parse_gpu_list(gpus)
    if device == "cpu":
        if numbers is not None:
            raise UsageError(f"-g {gpus} and --device cpu contradict each other; leave one of them out")
        return Devices(Device.CPU, count or wanted or 1, None)
    if numbers is not None and count is not None and count != len(numbers):
        raise UsageError(f"-n {count}, but -g {gpus} lists {len(numbers)} GPUs; leave -n out, or list {count}")
    requested = f"-g {gpus}" if gpus is not None else "--device cuda" if device == "cuda" else ""
    torch = describe_torch()
    available = _available(torch)
    if not available and elsewhere and (requested or (count is not None and not cpu_may_stand_in)):
        chosen = numbers if numbers is not None else list(range(count or wanted or 1))
        note = f"this machine has no GPU for torch; {requested or f'-n {count}'} is taken as given, for another machine"
        return Devices(Device.CUDA, len(chosen), tuple(map(str, chosen)), note)
    if not available:
        why = _why_none(torch, requested)
        if not cpu_may_stand_in:
            raise UsageError(
                f"no GPU to compute on: {why}; {_gpus_from_slurm()}give --device cpu to compute on the CPU, which says "
                "how long that takes (precision.dtype=auto lets a recipe do so by itself)"
            )
        return Devices(Device.CPU, count or wanted or 1, None, f"computing on the CPU: {why}")
    if fewer_will_do:
        # Where none of the listed GPUs is there, others are not taken in their place: the list is refused below.
        numbers = [number for number in numbers or () if number < len(available)] or numbers
        count = count and min(count, len(available))
    if numbers is not None:
        return _listed(numbers, available, str(gpus), torch)
    if count is not None and count > len(available):
        raise UsageError(f"-n {count}: there are {len(available)} GPUs ({_names(available)}); give a smaller -n")
    taken = available[: count or wanted or len(available)]
    return Devices(Device.CUDA, len(taken), tuple(taken), memory=_smallest(torch, range(len(taken))))


def _smallest(torch: Torch, numbers: Iterable[int]) -> int | None:
    """Bytes of memory of the smallest GPU of those with these numbers; None where the driver does not say."""
    return min((torch.memory[number] for number in numbers if number < len(torch.memory)), default=None)


def _gpus_from_slurm() -> str:
    """The remedy inside of a Slurm job; empty elsewhere."""
    return "submit the Slurm job with GPUs (--gres=gpu:N), or " if os.environ.get("SLURM_JOB_ID") else ""


def nvidia_card(root: Path = Path("/")) -> str:
    """A file that proves an NVIDIA card in this machine, whether its driver works or not; empty without a card."""
    nodes = sorted(path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    if nodes:
        return str(nodes[0])
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, pci_class = (folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and pci_class.startswith("0x03"):  # NVIDIA; display controller
            return str(folder)
    return ""


def hides_all(visible: str) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES hides all GPUs: an empty one, `-1`, or Slurm's `NoDevFiles`."""
    return not re.match(r"\s*(\d|GPU-|MIG-)", visible)


def _available(torch: Torch) -> list[str]:
    """The CUDA_VISIBLE_DEVICES entry of each GPU that torch can use, in torch's order."""
    visible = os.environ.get(_VISIBLE)
    if visible is None:
        return [str(number) for number in range(torch.gpus)]
    return [part.strip() for part in visible.split(",")][: torch.gpus]


def _why_none(torch: Torch, requested: str) -> str:
    """The reason why no GPU is used. Raises UsageError where one was requested, or where one cannot be used."""
    visible, card, slurm = os.environ.get(_VISIBLE), nvidia_card(), _gpus_from_slurm()
    hidden = visible is not None and hides_all(visible)
    if torch.cuda is None:
        why = f"this torch ({torch.version}) is built without CUDA"
        if requested:
            raise UsageError(
                f"{requested}: {why}; install one with it: unset MEGAZH_TORCH, remove .venv (made by setup), run "
                "'bash jobs/setup.sh' (own Python: the version in requirements/torch.txt), or give --device cpu"
            )
        return f"{why}, and would not use the NVIDIA card in this machine" if card and not hidden else why
    if hidden:
        why = f"{_VISIBLE}={visible} hides all GPUs"
        if requested:
            raise UsageError(f"{requested}: {why}; {slurm or 'unset it, or '}give --device cpu")
        return why
    if card:
        raise UsageError(
            f"an NVIDIA card is in this machine ({card}), but torch {torch.version} cannot use it"
            f"{f' ({torch.failure})' if torch.failure else ''}; {slurm}see whether nvidia-smi works, repair the driver "
            f"or upgrade it to one for CUDA {torch.cuda}, or give --device cpu"
        )
    if requested:
        remedy = slurm or "leave that out, or "
        raise UsageError(f"{requested}: no NVIDIA GPU is in this machine; {remedy}give --device cpu")
    return "no NVIDIA GPU is in this machine"


def _listed(numbers: list[int], available: list[str], text: str, torch: Torch) -> Devices:
    """The GPUs that a list of numbers selects."""
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
    return Devices(Device.CUDA, len(ids), ids, note, _smallest(torch, numbers))


def _names(ids: list[str] | range) -> str:
    return ", ".join(map(str, ids))
