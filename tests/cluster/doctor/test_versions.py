"""Versions that are known to be bad."""

import pytest

from megazh.cluster.doctor import versions
from megazh.cluster.doctor.report import Found, Verdict
from megazh.cluster.doctor.smi import Gpu
from megazh.errors import UsageError
from megazh.pipeline.precision import check_deepspeed_version


@pytest.mark.parametrize(
    ("program", "version", "machine", "bad"),
    [
        ("deepspeed", "0.18.2", "", False),
        ("deepspeed", "0.18.3", "", True),
        ("deepspeed", "0.19.3+cu130", "", True),
        ("deepspeed", "0.19.4", "", False),
        ("linux", "5.4.0-150-generic", "", True),
        ("linux", "5.5.0", "", False),
        ("linux", "6.18.44-lab", "", False),
        ("nccl", "2.29.2", "aarch64", True),
        ("nccl", "2.29.2", "x86_64", False),
        ("nccl", "2.29.3", "aarch64", False),
        ("deepspeed", "unknown", "", False),
    ],
)
def test_bad_releases(program: str, version: str, machine: str, bad: bool) -> None:
    entries = [entry for entry in versions.KNOWN_BAD if entry.program == program]
    assert any(versions.concerns(entry, version, machine) for entry in entries) == bad
    if program == "deepspeed" and bad:
        with pytest.raises(UsageError):
            check_deepspeed_version(version)


def test_a_bad_release_is_a_finding_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.11.0", "triton": "3.6.0", "deepspeed": "0.18.4"}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    found = Found()
    versions.check(found, [Gpu({"driver_version": "580.1"})], {"cuda": "13.0", "nccl": "2.28.9"})
    bad = [finding for finding in found.findings if finding.verdict is Verdict.BAD]
    assert len(bad) == 1
    assert "7665" in bad[0].text
    assert bad[0].remedy == "install 0.19.4 or later"
    assert {"driver": "580.1", "cuda": "13.0", "nccl": "2.28.9", "deepspeed": "0.18.4"}.items() <= found.facts.items()
