"""The GPUs by themselves: present, free, healthy, not slowed down by power, heat or errors."""

import os
import re
import shutil
from typing import Any, NamedTuple

from megazh.cluster.doctor.child import Ended, run
from megazh.cluster.doctor.report import Found, Verdict
from megazh.cluster.doctor.smi import Gpu, Process
from megazh.cluster.gpus import hides_all, nvidia_card

_FREE_SHARE = 0.9
_HOT = 85
_LEAST_OF_POWER = 0.9

# Bits of clocks_throttle_reasons.active (NVML, nvmlClocksEventReasons), with whether they are bad.
_SLOWED = {
    0x8: ("hardware slowdown", True),
    0x20: ("driver's thermal limit", True),
    0x40: ("hardware's thermal limit", True),
    0x80: ("power brake", True),
    0x4: ("power cap", False),
    0x2: ("application clocks", False),
}

_XIDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    63: "row remapping or page retirement",
    64: "row remapping failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many single-bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
}
"""Xid errors of the hardware, its link or its driver (NVIDIA, "XID Errors"); others are mostly a program's."""

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")


class Cuda(NamedTuple):
    """The GPUs as torch sees them; made by `read_probe`."""

    versions: dict[str, str]
    gpus: list[dict[str, Any]]
    peers: list[list[bool]]
    failure: str


def read_probe(reported: list[dict[str, Any]], ended: Ended) -> Cuda:
    """What the probe `cuda` has reported."""
    versions: dict[str, str] = next((each["versions"] for each in reported if "versions" in each), {})
    peers: list[list[bool]] = next((each["peers"] for each in reported if "peers" in each), [])
    failure = ended.failure
    if failure and (begun := [each["begin"] for each in reported if "begin" in each]):
        failure = f"{begun[-1]}: {failure}"
    return Cuda(versions, [each for each in reported if "gpu" in each], peers, failure)


def check(found: Found, cuda: Cuda, gpus: list[Gpu], why_no_smi: str, running: list[Process]) -> None:
    """Check each GPU.

    Args:
        found: gets the findings.
        cuda: the GPUs by torch, in the order in which ranks see them.
        gpus: the GPUs by nvidia-smi.
        why_no_smi: the reason where nvidia-smi does not work.
        running: processes that compute on the GPUs.
    """
    if cuda.failure:
        remedy = "see 'nvidia-smi' and 'dmesg'; a card that hangs needs a reset of the machine"
        found.add("gpus", Verdict.BAD, f"torch and the GPUs: {cuda.failure}", remedy)
    if not cuda.gpus:
        card, visible = nvidia_card(), os.environ.get("CUDA_VISIBLE_DEVICES")
        if card and visible is not None and hides_all(visible):
            found.add("gpus", Verdict.SKIPPED, f"CUDA_VISIBLE_DEVICES={visible} hides the GPUs of this machine")
        elif card and not cuda.failure:
            text = f"an NVIDIA card is in this machine ({card}), but torch does not see it"
            found.add(
                "gpus", Verdict.BAD, text, "megazh pretrain --device cuda says why; CUDA_VISIBLE_DEVICES hides cards"
            )
        elif not cuda.failure:
            found.add("gpus", Verdict.SKIPPED, "no NVIDIA GPU is in this machine")
        return
    if why_no_smi:
        found.add("gpus", Verdict.SKIPPED, f"processes, PCIe, clocks, power and ECC of the GPUs: {why_no_smi}")
    for each in cuda.gpus:
        found.cards.append(str(each["name"]))
        gpu = smi_of(each, gpus)
        _present(found, each, [process for process in running if gpu and process.uuid == gpu.text("uuid")])
        if gpu is not None:
            _healthy(found, int(each["gpu"]), gpu)
        elif not why_no_smi:
            found.add("gpus", Verdict.SKIPPED, f"GPU {each['gpu']}: health: nvidia-smi does not list it (MIG?)")
    if len(set(found.cards)) > 1:
        text = f"different cards: {', '.join(found.cards)}"
        found.add("gpus", Verdict.WARNING, text, "the slowest sets the pace; choose equal ones with -g")
    if gpus and len(gpus) > len(cuda.gpus):
        text = f"{len(gpus)} GPUs are in this machine, and torch may use {len(cuda.gpus)} (CUDA_VISIBLE_DEVICES)"
        found.add("gpus", Verdict.OK, text)


def smi_of(of_torch: dict[str, Any], gpus: list[Gpu]) -> Gpu | None:
    """nvidia-smi's GPU of a GPU of torch, by its UUID; None where there is none."""
    uuid = str(of_torch.get("uuid", "")).lower().removeprefix("gpu-")
    return next((gpu for gpu in gpus if uuid and gpu.text("uuid").lower().removeprefix("gpu-") == uuid), None)


def _present(found: Found, gpu: dict[str, Any], running: list[Process]) -> None:
    number, total, free = gpu["gpu"], gpu["total"] / 2**30, gpu["free"] / 2**30
    text = f"GPU {number}: {gpu['name']}, {total:.1f} GiB, {free:.1f} GiB free"
    if gpu["sum"] != 1 << 20:
        found.add("gpus", Verdict.BAD, f"{text}: a sum of a million ones is {gpu['sum']:g}", "have the card replaced")
    if running:
        others = ", ".join(f"{process.name} (pid {process.pid})" for process in running[:3])
        remedy = f"end them, or leave this GPU out with -g; megazh plan --memory {free:.0f} shows what fits beside them"
        found.add("gpus", Verdict.WARNING, f"{text}, used by {others}", remedy)
    elif free < _FREE_SHARE * total:
        remedy = "see nvidia-smi; a killed run may have left a process of yours, another container is not shown"
        found.add("gpus", Verdict.WARNING, f"{text}: others use the rest", remedy)
    else:
        found.add("gpus", Verdict.OK, text)


def _healthy(found: Found, number: int, gpu: Gpu) -> None:
    name, fine = f"GPU {number}", []
    limit, usual = gpu.number("power.limit"), gpu.number("power.default_limit")
    if limit is not None and usual is not None and limit < _LEAST_OF_POWER * usual:
        text = f"{name}: power is capped at {limit:.0f} W, its default is {usual:.0f} W"
        found.add("gpus", Verdict.WARNING, text, f"nvidia-smi -i {gpu.text('index')} -pl {usual:.0f} (as root)")
    elif limit is not None:
        fine.append(f"power limit {limit:.0f} W")
    errors = gpu.number("ecc.errors.uncorrected.volatile.total")
    if errors:
        text = f"{name}: {errors:.0f} uncorrected ECC errors since the driver was loaded"
        found.add("gpus", Verdict.BAD, text, "reset the GPU or the machine; if they come back, have it replaced")
    elif gpu.text("ecc.mode.current") == "Enabled":
        fine.append("no uncorrected ECC error")
    if gpu.text("retired_pages.pending") == "Yes":
        found.add("gpus", Verdict.WARNING, f"{name}: memory pages wait to be retired", "reboot the machine")
    if gpu.text("mig.mode.current") == "Enabled":
        text = f"{name}: is divided by MIG; its parts cannot reach one another by peer access"
        found.add("gpus", Verdict.WARNING, text, "train on whole GPUs: nvidia-smi -mig 0 (as root)")
    if gpu.text("compute_mode") == "Prohibited":
        text = f"{name}: its compute mode refuses all programs"
        found.add("gpus", Verdict.BAD, text, f"nvidia-smi -i {gpu.text('index')} -c 0 (as root)")
    if fine:
        found.add("gpus", Verdict.OK, f"{name}: {', '.join(fine)}")


def check_under_load(found: Found, number: int, gpu: Gpu, most: Gpu | None) -> None:
    """Check clocks, temperature and throttling of a busy GPU; see `megazh.cluster.doctor.links` for its PCIe link.

    Args:
        found: gets the findings.
        number: number of the GPU by torch.
        gpu: fields while it is busy.
        most: fields with its limits.
    """
    name = f"GPU {number} under load"
    clock, fastest = gpu.number("clocks.sm"), most.number("clocks.max.sm") if most else None
    heat, power = gpu.number("temperature.gpu"), gpu.number("power.draw")
    parts = [
        f"clock {clock:.0f} MHz{f' of {fastest:.0f}' if fastest else ''}" if clock is not None else "",
        f"{heat:.0f} °C" if heat is not None else "",
        f"{power:.0f} W" if power is not None else "",
    ]
    text = f"{name}: {', '.join(filter(None, parts)) or 'nothing is reported'}"
    slowed = reasons(gpu.text("clocks_event_reasons.active") or gpu.text("clocks_throttle_reasons.active"))
    if any(bad for _, bad in slowed):
        remedy = "clean and cool the machine, check the power cables and the power supply"
        found.add("gpus", Verdict.BAD, f"{text}; slowed by {', '.join(reason for reason, _ in slowed)}", remedy)
    elif heat is not None and heat >= _HOT:
        found.add("gpus", Verdict.WARNING, f"{text}: hot", "cool the machine; it slows down with more heat")
    elif slowed:
        found.add("gpus", Verdict.OK, f"{text}; limited by {', '.join(reason for reason, _ in slowed)}")
    else:
        found.add("gpus", Verdict.OK if any(parts) else Verdict.SKIPPED, text)


def reasons(text: str) -> list[tuple[str, bool]]:
    """What slows a GPU down, by the bits of a hexadecimal number such as 0x0000000000000004; True: something is bad."""
    try:
        bits = int(text, 16)
    except ValueError:
        return []
    return [reason for bit, reason in _SLOWED.items() if bits & bit]


def check_log(found: Found, seconds: float) -> None:
    """Look for Xid errors of the NVIDIA driver in the kernel's log, where this user may read it."""
    failures = []
    for command in (["dmesg"], ["journalctl", "-k", "-b", "--no-pager", "-q"]):
        if shutil.which(command[0]) is None:
            continue
        ended = run(command, seconds)
        if ended.code == 0 and ended.output.strip():
            _report_xids(found, xids(ended.output))
            return
        failures.append(f"{command[0]}: {ended.failure or 'nothing is shown to this user'}")
    found.add("gpus", Verdict.SKIPPED, f"Xid errors: {'; '.join(failures) or 'neither dmesg nor journalctl is here'}")


def xids(log: str) -> dict[tuple[str, int], int]:
    """The number of Xid errors in a kernel's log by PCI address and Xid."""
    found: dict[tuple[str, int], int] = {}
    for match in _XID.finditer(log):
        key = (match[1], int(match[2]))
        found[key] = found.get(key, 0) + 1
    return found


def _report_xids(found: Found, errors: dict[tuple[str, int], int]) -> None:
    for (address, number), times in sorted(errors.items()):
        text = f"the kernel's log has Xid {number} of the GPU at {address}, {times} times"
        if number in _XIDS:
            remedy = "reboot; check its seat, riser and power cables; if it comes back, have the card replaced"
            found.add("gpus", Verdict.BAD, f"{text}: {_XIDS[number]}", remedy)
        else:
            found.add("gpus", Verdict.WARNING, text, "often a program's error: see NVIDIA's list of Xid errors")
    if not errors:
        found.add("gpus", Verdict.OK, "no Xid error in the kernel's log")
