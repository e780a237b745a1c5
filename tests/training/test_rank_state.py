"""The state of a rank's device, and what sets a slow rank apart."""

from pathlib import Path

import pytest
import torch

from megazh.training.rank_state import StateQuery, cpu_state, differences, gpu_state, parse_gpu_state

LINE = "1200, 87, 240.31, 350.00, 3, 8, 0x0000000000000020\n"
STATE = {
    "SM clock in MHz": 1200.0,
    "temperature in C": 87.0,
    "power in W": 240.31,
    "power limit in W": 350.0,
    "PCIe generation": 3.0,
    "PCIe lanes": 8.0,
    "throttling": "software thermal slowdown",
}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (LINE, STATE),
        (
            "1200, [N/A], [Not Supported], , 3, [Unknown Error], 0x0\n",
            {"SM clock in MHz": 1200.0, "PCIe generation": 3.0, "throttling": "no throttling"},
        ),
        ("1, 2, 3, 4, 5, 6, 0x44", {"throttling": "power cap, hardware thermal slowdown"}),
        ("No devices were found\n", {}),
        ("", {}),
    ],
)
def test_a_line_of_nvidia_smi_is_read(line: str, found: dict[str, float | str]) -> None:
    read = parse_gpu_state(line)
    assert {key: read[key] for key in found} == found
    assert bool(read) == bool(found)


@pytest.mark.parametrize("known", ["clocks_event_reasons", "clocks_throttle_reasons"])
def test_nvidia_smi_is_asked_for_the_ranks_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    """Older drivers know the reasons for a clock by another name."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\ncase "$*" in *--id=0000:17:00.0*{known}.active*) echo "{LINE.strip()}";; *) exit 2;; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_state("0000:17:00.0") == STATE
    assert gpu_state("0000:99:00.0") == {}


def test_without_nvidia_smi_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state("0000:17:00.0") == {}


def test_what_differs_is_named() -> None:
    cool = {**STATE, "SM clock in MHz": 1695.0, "temperature in C": 70.0, "throttling": "no throttling"}
    states = [cool, {**cool, "SM clock in MHz": 1700.0}, STATE, {}]
    assert differences(states, 2, [0, 1, 3]) == (
        "SM clock in MHz 1,200 (others 1,697.5), temperature in C 87 (others 70), throttling software thermal slowdown "
        "(others no throttling)"
    )
    assert differences(states, 0, [1]).startswith("its device is like those of the others (SM clock in MHz 1,695, ")
    assert "not known" in differences(states, 3, [0, 1, 2])
    assert differences([cool, {}], 0, [1]).startswith("its device is like those of the others")


def test_the_state_of_the_processor_is_there_at_once() -> None:
    found = StateQuery(torch.device("cpu")).result()
    assert found.keys() == cpu_state().keys()
    assert float(found["cores that it may use"]) >= 1
