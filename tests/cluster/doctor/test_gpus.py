"""Verdicts on GPUs by fields made by hand."""

from typing import Any

import pytest

from megazh.cluster.doctor import gpus
from megazh.cluster.doctor.child import Ended
from megazh.cluster.doctor.gpus import Cuda
from megazh.cluster.doctor.report import Finding, Found, Verdict
from megazh.cluster.doctor.smi import Gpu, Process

FINE = {
    "index": "0", "uuid": "GPU-AA", "power.limit": "350.00", "power.default_limit": "350.00",
    "ecc.mode.current": "[N/A]", "ecc.errors.uncorrected.volatile.total": "[N/A]", "mig.mode.current": "[N/A]",
    "compute_mode": "Default", "retired_pages.pending": "[N/A]",
}  # fmt: skip
CARD = {"gpu": 0, "name": "RTX 3090", "uuid": "aa", "total": 24 << 30, "free": 23.9 * 2**30, "sum": float(1 << 20)}


def check(
    changes: dict[str, str], card: dict[str, Any] | None = None, running: list[Process] | None = None
) -> list[Finding]:
    """The findings, apart from those that are fine."""
    found = Found()
    gpus.check(found, Cuda({}, [{**CARD, **(card or {})}], [[True]], ""), [Gpu({**FINE, **changes})], "", running or [])
    return [finding for finding in found.findings if finding.verdict is not Verdict.OK]


def test_a_free_and_healthy_gpu_is_fine() -> None:
    assert check({}) == []


@pytest.mark.parametrize(
    ("changes", "verdict", "text"),
    [
        ({"power.limit": "200.00"}, Verdict.WARNING, "capped at 200 W, its default is 350 W"),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, Verdict.BAD, "3 uncorrected ECC errors"),
        ({"mig.mode.current": "Enabled"}, Verdict.WARNING, "MIG"),
        ({"compute_mode": "Prohibited"}, Verdict.BAD, "refuses all programs"),
        ({"retired_pages.pending": "Yes"}, Verdict.WARNING, "retired"),
        ({"uuid": "GPU-bb"}, Verdict.SKIPPED, "does not list it"),
    ],
)
def test_each_fault_of_a_gpu_is_found(changes: dict[str, str], verdict: Verdict, text: str) -> None:
    (finding,) = check(changes)
    assert (finding.verdict, text in finding.text) == (verdict, True), finding


def test_memory_that_others_use_is_named() -> None:
    (finding,) = check({}, running=[Process("GPU-AA", "12", "python", 100.0), Process("GPU-cc", "13", "other", 1.0)])
    assert "used by python (pid 12)" in finding.text
    assert "other" not in finding.text
    (finding,) = check({}, {"free": 4 * 2**30})
    assert (finding.verdict, "4.0 GiB free: others use" in finding.text) == (Verdict.WARNING, True)


def test_a_card_that_sums_wrongly_is_bad() -> None:
    assert check({}, {"sum": 1048575.0})[0].verdict is Verdict.BAD


def test_a_gpu_that_hangs_torch_is_bad_and_says_where() -> None:
    cuda = gpus.read_probe(
        [{"versions": {"cuda": "13.0"}}, {"begin": "GPU 0"}, CARD, {"begin": "GPU 1"}], Ended(None, "", "")
    )
    assert (cuda.failure, len(cuda.gpus)) == ("GPU 1: still running at its time limit", 1)
    found = Found()
    gpus.check(found, cuda, [], "nvidia-smi is not installed", [])
    assert found.findings[0].verdict is Verdict.BAD
    assert "GPU 1" in found.findings[0].text


def test_a_card_that_torch_does_not_see_is_bad_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "nvidia_card", lambda: "/dev/nvidia0")
    for visible, verdict in (("0", Verdict.BAD), ("", Verdict.SKIPPED), ("-1", Verdict.SKIPPED)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = Found()
        gpus.check(found, Cuda({}, [], [], ""), [], "", [])
        assert [each.verdict for each in found.findings] == [verdict]


def test_reasons_of_a_low_clock() -> None:
    assert gpus.reasons("0x0000000000000004") == [("power cap", False)]
    assert gpus.reasons("0x0000000000000048") == [("hardware slowdown", True), ("hardware's thermal limit", True)]
    assert gpus.reasons("0x0000000000000001") == gpus.reasons("") == gpus.reasons("[N/A]") == []


def test_xid_errors_are_counted_by_card() -> None:
    log = (
        "[  5.1] NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[  5.2] NVRM: Xid (PCI:0000:65:00): 79, pid=1\n[  6.0] NVRM: Xid (0000:17:00): 31, pid=99, name=python\n"
    )
    assert gpus.xids(log) == {("0000:65:00", 79): 2, ("0000:17:00", 31): 1}
