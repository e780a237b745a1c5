"""The state of a rank's device at a moment, and what in it sets a slow rank apart from others."""

import contextlib
import os
import statistics
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import psutil
import torch

from megazh.training.binding import pci_address

State = Mapping[str, float | str]
"""Figures and words about a device by their names, such as `SM clock in MHz`; what is not known is missing."""

_SECONDS = 10.0
_NOTICED = 0.05  # figures that differ by less from the median are the same
_QUERIES = {
    "clocks.sm": "SM clock in MHz",
    "temperature.gpu": "temperature in C",
    "power.draw": "power in W",
    "power.limit": "power limit in W",
    "pcie.link.gen.current": "PCIe generation",
    "pcie.link.width.current": "PCIe lanes",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second by drivers before 535
_REASON_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Reasons for a lower clock that point to a fault or limit, from nvml.h (nvmlClocksEventReason...)."""
_NO_REASON = "no throttling"


class StateQuery:
    """Looks at the state of this rank's device, in a thread: it takes up to some seconds.

    Args:
        device: this rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._state: State = {}
        self._device = device
        self._thread = threading.Thread(target=self._run, name="rank state", daemon=True)
        self._thread.start()

    def result(self) -> State:
        """Wait for the state; without any figure after ten seconds."""
        self._thread.join(_SECONDS)
        return self._state

    def _run(self) -> None:
        self._state = gpu_state(pci_address(self._device)) if self._device.type == "cuda" else cpu_state()


def gpu_state(address: str) -> State:
    """The state of the GPU at a PCI address, by nvidia-smi; empty where that gives none."""
    for reasons in _REASONS:
        names = [*_QUERIES, reasons]
        command = ["nvidia-smi", f"--id={address}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return {}
        if done.returncode == 0:
            return parse_gpu_state(done.stdout)
    return {}


def parse_gpu_state(line: str) -> State:
    """The state from a line of nvidia-smi with the values of `gpu_state` in their order; words that are none are left
    out."""
    values = [each.strip() for each in line.strip().split(",")]
    if len(values) != len(_QUERIES) + 1:
        return {}
    found: dict[str, float | str] = {}
    for name, value in zip(_QUERIES.values(), values, strict=False):
        with contextlib.suppress(ValueError):
            found[name] = float(value)
    with contextlib.suppress(ValueError):
        mask = int(values[-1], 16)
        found["throttling"] = ", ".join(name for bit, name in _REASON_BITS.items() if mask & bit) or _NO_REASON
    return found


def cpu_state() -> State:
    """The state of the processor: load, clock, and the cores and threads of this rank."""
    found: dict[str, float | str] = {
        "load of the last minute": round(os.getloadavg()[0], 1),
        "cores that it may use": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    clock = psutil.cpu_freq()
    if clock is not None:
        found["clock in MHz"] = round(clock.current)
    return found


def differences(states: Sequence[State], rank: int, peers: Sequence[int]) -> str:
    """What sets a rank apart, in a line.

    Args:
        states: the state of each rank's device.
        rank: the rank.
        peers: the ranks that it is compared with.
    """
    found = []
    for name, own in states[rank].items():
        others = [states[peer][name] for peer in peers if name in states[peer]]
        numbers = [each for each in others if not isinstance(each, str)]
        if isinstance(own, str):
            usual: float | str = Counter(map(str, others)).most_common(1)[0][0] if others else own
            differs = own != usual
        else:
            usual = statistics.median(numbers) if numbers else own
            differs = abs(own - usual) > _NOTICED * abs(usual)
        if differs:
            found.append(f"{name} {_text(own)} (others {_text(usual)})")
    if found:
        return ", ".join(found)
    if states[rank]:
        same = ", ".join(f"{name} {_text(own)}" for name, own in states[rank].items())
        return f"its device is like those of the others ({same}): look for other programs on it"
    return "the state of its device is not known: nvidia-smi gives none"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.6g}"
