"""Verdicts on links by measurements made by hand: two GPUs, by NVLink or PCIe, with faults."""

from pathlib import Path
from typing import Any

import pytest

from megazh.cluster.doctor import links, smi
from megazh.cluster.doctor.child import Deadline, Ended
from megazh.cluster.doctor.gpus import Cuda
from megazh.cluster.doctor.report import Found, Verdict
from megazh.cluster.doctor.smi import Gpu

BUSY = "4, 16, 1800, 60, 300.0, 0x0000000000000000"
FIELDS = list(smi.LOAD_FIELDS[:6])
FINE = Ended(0, "", "")


def cards(number: int) -> tuple[Cuda, list[Gpu]]:
    """GPUs of PCIe 4.0 x16."""
    of_torch = [{"gpu": gpu, "name": "RTX 3090", "uuid": f"u{gpu}"} for gpu in range(number)]
    of_smi = [
        Gpu({"index": str(gpu), "uuid": f"GPU-u{gpu}", "pcie.link.gen.max": "4", "pcie.link.width.max": "16"})
        for gpu in range(number)
    ]
    return Cuda({}, of_torch, [[True] * number] * number, ""), of_smi


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the probes of two GPUs report, and how they end; a test changes it."""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    measured: dict[str, Any] = {
        "copies": [{"gpu": gpu, "to_gpu": 25.0, "to_host": 26.0, "under_load": BUSY} for gpu in range(2)]
        + [{"from": a, "to": b, "rate": 24.0, "right": True, "peer": True} for a, b in ((0, 1), (1, 0))],
        "copies end": FINE,
        "pairs": [
            {"pair": [0, 1], "send": 20.0, "all_reduce": 15.0, "right": True},
            {"all": 2, "all_reduce": 15.0, "right": True},
        ],
        "pairs end": FINE,
        "without peers": [{"pair": [0, 1], "send": 6.0, "all_reduce": 5.0, "right": True}],
    }

    def probe(
        subject: str, arguments: object, seconds: float, ranks: int = 1, environment: dict[str, str] | None = None
    ) -> tuple[list[dict[str, Any]], Ended]:
        if subject == "pairs" and (environment or {}).get("NCCL_P2P_DISABLE"):
            return measured["without peers"], FINE
        return measured[subject], measured[f"{subject} end"]

    monkeypatch.setattr(links, "probe", probe)
    monkeypatch.setattr(smi, "known_fields", lambda fields: FIELDS)
    monkeypatch.setattr(smi, "topology", lambda: {(0, 1): "PHB", (1, 0): "PHB"})
    monkeypatch.setattr(smi, "nvlink_gb_s", lambda: {})
    return measured


def check(seconds: float = 300.0) -> Found:
    """Examine the links of the two GPUs."""
    found = Found()
    links.check(found, *cards(2), Deadline(seconds))
    return found


def wrong(found: Found) -> list[str]:
    """Verdict and text of all that is not fine."""
    return [f"{each.verdict}: {each.text}" for each in found.findings if each.verdict is not Verdict.OK]


def test_fast_links_are_fine_and_kept_for_plans(machine: dict[str, Any]) -> None:
    found = check()
    assert wrong(found) == []
    (pair,) = found.pairs
    assert (pair.send_gb_s, pair.copy_gb_s, pair.expected_gb_s) == (20.0, 24.0, pytest.approx(31.5, abs=0.1))
    assert any("of 31.5 that the link carries; PCIe 4.0 x16 under load" in each.text for each in found.findings)


def test_a_narrow_slot_and_a_hot_card_show_under_load(machine: dict[str, Any]) -> None:
    machine["copies"][0]["under_load"] = "3, 4, 900, 91, 300.0, 0x0000000000000020"
    machine["copies"][1]["under_load"] = ""
    texts = wrong(check())
    assert any(text.startswith("warning") and "generation 3 of 4, width 4 of 16" in text for text in texts)
    assert any(text.startswith("bad") and "slowed by driver's thermal limit" in text for text in texts)
    assert any(text.startswith("skipped") and "GPU 1 under load" in text for text in texts)


def test_wrong_bytes_are_bad_and_give_a_setting(machine: dict[str, Any]) -> None:
    machine["copies"][2]["right"] = False
    found = check()
    assert any("arrives with wrong bytes" in text for text in wrong(found))
    assert found.settings[0].command == "export NCCL_P2P_DISABLE=1"


def test_nccl_that_hangs_with_peer_access_is_tried_without(machine: dict[str, Any]) -> None:
    machine["pairs"] = [{"begin": "send and receive between GPU 0 and GPU 1"}]
    machine["pairs end"] = Ended(None, "", "")
    found = check()
    assert wrong(found) == ["bad: NCCL: send and receive between GPU 0 and GPU 1: still running at its time limit"]
    assert found.settings[0].command == "export NCCL_P2P_DISABLE=1"
    assert found.findings[-1].text.startswith("NCCL with NCCL_P2P_DISABLE=1 works")


def test_what_the_time_limit_ends_is_skipped_and_not_bad(machine: dict[str, Any]) -> None:
    machine["copies end"] = Ended(None, "", "")
    found = check(0.0)
    assert {text.partition(":")[0] for text in wrong(found)} == {"skipped"}
    assert found.settings == []


def test_a_slow_nvlink_is_a_warning_with_the_remedy_of_its_cause(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smi, "topology", lambda: {(0, 1): "NV18", (1, 0): "NV18"})
    monkeypatch.setattr(smi, "nvlink_gb_s", lambda: {0: 478.1, 1: 478.1})
    assert any("20.0 GB/s, all-reduce 15.0 GB/s of 478.1 by NVLink (NV18): slow" in text for text in wrong(check()))
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    for copy in machine["copies"][2:]:
        copy["rate"] = 300.0
    found = check()
    assert [each.remedy for each in found.findings if each.verdict is Verdict.WARNING] == [
        "unset NCCL_P2P_DISABLE: copies by peer access work here, at 300.0 GB/s"
    ]
    assert any("a copy at 300.0 GB/s of 478.1 by NVLink" in each.text for each in found.findings)


def test_a_setting_that_slows_nccl_down_for_nothing_is_a_warning(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert wrong(check()) == [], "20 GB/s beside copies at 24"
    machine["pairs"][0]["send"] = 6.0
    (text,) = wrong(check())
    assert text.startswith("warning: GPU 0 and GPU 1 by NCCL: send and receive 6.0 GB/s")
    machine["copies"][-1]["peer"] = False
    assert wrong(check()) == [], "peer access does not work in both directions"


def test_hints_of_an_iommu(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cmdline").write_text("quiet intel_iommu=on\n")
    (tmp_path / "sys/class/iommu/dmar0").mkdir(parents=True)
    assert links.iommu_hints(tmp_path)[0].startswith("the IOMMU is on (intel_iommu=on)")
    assert links.iommu_hints(tmp_path / "nowhere")[0] == "no IOMMU is on"
