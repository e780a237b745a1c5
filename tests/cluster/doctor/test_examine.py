"""`megazh doctor` as a user calls it, on a machine without a GPU; limits and disk with what they find."""

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
from processes import run_command, start_command, wait_until

from megazh.cli import main
from megazh.cluster.doctor import disk, limits
from megazh.cluster.doctor.report import Found, Verdict

COMMAND = [sys.executable, "-m", "megazh", "doctor"]
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": ""}


def test_every_subject_has_a_verdict_without_a_gpu(tmp_path: Path) -> None:
    finished = run_command([*COMMAND, "--json", "-r", tmp_path, "--recipe", "demo"], 90, ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    (host,) = found["hosts"]
    verdicts = {each["subject"]: each["verdict"] for each in host["findings"]}
    assert list(verdicts) == ["versions", "gpus", "links", "kernels", "disk", "limits", "network"]
    assert (verdicts["links"], verdicts["kernels"]) == ("skipped", "skipped")
    assert any("demo keeps up to" in each["text"] for each in host["findings"])
    assert list(tmp_path.iterdir()) == []


def test_no_time_is_no_fault(tmp_path: Path) -> None:
    finished = run_command([*COMMAND, "-r", tmp_path, "--limit", "1"], 60, ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert "give a larger --limit" in finished.stdout


def test_a_signal_ends_the_processes_of_the_checks_too(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    with start_command([*COMMAND, "-r", tmp_path], environment) as running:
        wait_until(lambda: len(running.descendants()) > 1, 30, "a check runs")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20).returncode == 75
        wait_until(lambda: not running.descendants(), 10, "its processes have ended")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--recipe", "no such"], "recipe 'no such'"),
        (["-r", "no/such"], "no such folder"),
        (["steps=3"], "--recipe"),
        (["--limit", "0"], "expected seconds"),
    ],
)
def test_wrong_usage_is_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    assert (ended.value.code, text in capsys.readouterr().err) == (2, True)


def test_a_recipe_that_does_not_fit_is_bad(tmp_path: Path) -> None:
    needed = disk.checkpoints_of("qwen0.5b_6x3090", [], 1)
    assert 5e9 < needed < 1e12
    found = Found()
    disk.check(found, tmp_path, 1 << 60, "large")
    assert found.findings[0].verdict is Verdict.BAD
    found = Found()
    disk.check(found, tmp_path / "gone", None, "")
    assert found.findings[-1].verdict is Verdict.BAD


def test_low_limits_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = {
        resource.RLIMIT_NOFILE: (256, 65536),
        resource.RLIMIT_NPROC: (100, 100),
        resource.RLIMIT_MEMLOCK: (65536, -1),
    }
    monkeypatch.setattr(resource, "getrlimit", low.__getitem__)
    (tmp_path / "mlx5_0").mkdir()
    found = Found()
    limits.check(found, 2, tmp_path / "no shm", tmp_path)
    assert [each.verdict for each in found.findings] == [Verdict.WARNING, Verdict.WARNING, Verdict.BAD, Verdict.BAD]
    assert [each.command for each in found.settings] == ["ulimit -n 4096", "ulimit -l unlimited"]
