"""nvidia-smi's output, by texts made by hand: missing fields, MIG, unknown fields, names with commas."""

import stat
from pathlib import Path

import pytest

from megazh.cluster.doctor import smi

FIELDS = ("index", "uuid", "memory.total", "power.limit", "ecc.mode.current")


def test_fields_that_a_card_lacks_are_empty() -> None:
    output = "0, GPU-aa, 24576, 350.00, [N/A]\n1, GPU-bb, [Not Supported], [Unknown Error], Enabled\n"
    one, other = smi.parse(output, FIELDS)
    assert (one.number("memory.total"), one.number("power.limit"), one.text("ecc.mode.current")) == (24576, 350, "")
    assert (other.number("memory.total"), other.number("power.limit")) == (None, None)
    assert (other.text("ecc.mode.current"), other.text("never asked")) == ("Enabled", "")


def test_lines_of_another_kind_are_left_out() -> None:
    assert smi.parse("WARNING: infoROM is corrupted at gpu 0000:01:00.0\n\nNo devices were found\n", FIELDS) == []


def test_processes_may_have_commas_in_their_names() -> None:
    output = "GPU-aa, 4711, python, -m, x, 1234\nGPU-aa, 4712, [Not Found], [N/A]\n, ,\nno processes\nMIG-cc, 1, p, 5\n"
    assert smi.parse_processes(output) == [
        smi.Process("GPU-aa", "4711", "python, -m, x", 1234.0),
        smi.Process("GPU-aa", "4712", "[Not Found]", None),
        smi.Process("MIG-cc", "1", "p", 5.0),
    ]


def test_nvlinks_add_up_and_inactive_ones_do_not_count() -> None:
    output = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
        "GPU 2: NVIDIA GeForce RTX 3090 (UUID: GPU-cc)\n"
    )
    assert smi.parse_nvlink(output) == {0: 53.124, 1: 26.562}


def test_topology_of_an_underlined_table_with_network_cards() -> None:
    output = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-15\t0\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t16-31\t1\n"
        "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n"
    )
    found = smi.parse_topology(output)
    assert (found[0, 1], found[1, 0], found[0, 2], found[1, 2]) == ("NV18", "NV18", "SYS", "PHB")
    assert len(found) == 6
    assert smi.parse_topology("Failed to initialize NVML: Driver/library version mismatch\n") == {}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that stands in the way of a real one; a test writes it."""
    path = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


def write(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_field_that_an_old_driver_does_not_know_is_left_out(nvidia_smi: Path) -> None:
    unknown = 'Field "mig.mode.current" is not a valid field to query.'
    write(nvidia_smi, f"case $1 in *mig*) echo '{unknown}'; exit 2;; esac; echo '0, GPU-aa'")
    (gpu,), why = smi.query(("index", "mig.mode.current", "uuid"))
    assert (gpu.text("uuid"), gpu.text("mig.mode.current"), why) == ("GPU-aa", "", "")


def test_a_driver_that_fails_or_hangs_is_a_reason(nvidia_smi: Path) -> None:
    write(nvidia_smi, "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9")
    gpus, why = smi.query()
    assert (gpus, "could not communicate" in why) == ([], True)
    write(nvidia_smi, "sleep 60")
    gpus, why = smi.query(seconds=0.3)
    assert (gpus, "time limit" in why) == ([], True)
