"""`megazh plan`: its options and settings reach the plan, and an error is one line."""

import socket
from pathlib import Path

import pytest

from megazh.cli import main
from megazh.cluster.doctor import measured
from megazh.cluster.doctor.report import Found, Pair


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh plan WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "qwen0.5b_6x3090")
    assert (code, err) == (0, "")
    for part in ("6 x NVIDIA GeForce RTX 3090, 22.5 GiB for torch", "embedding + 18 layers", "to use it: -p 1\n"):
        assert part in out


def test_options_and_settings_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-n", "8", "tokens=786432", "--card", "a100", "--memory", "40", "--mfu", "0.5", "--bandwidth", "25"]
    code, out, err = run(capsys, "qwen0.5b_6x3090", *options, "global_batch_size=512")
    assert (code, err) == (0, "")
    assert "8 x NVIDIA A100-SXM4-80GB, 38.5 GiB for torch" in out
    assert "assumed: MFU 50%, 25 GB/s between GPUs" in out
    assert "run         2 steps x 524,288 = 1,048,576 tokens" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere"], "recipe 'nowhere': not in"),
        (["demo", "--card", "abacus"], "--card abacus: expected one of 3090, "),
        (["demo", "--mfu", "40"], "--mfu 40.0: expected a share above 0 and up to 1"),
        (["demo", "--memory", "0"], "--memory 0.0: expected more GiB"),
        (["demo", "stepz=3"], "unknown key 'stepz'; did you mean 'schedule.steps'?"),
        (["demo", "-n", "7"], "no layout of 7 GPUs works: "),
    ],
)
def test_refused_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert part in err
    assert err.count("\n") == 1


def test_a_plan_takes_the_links_that_were_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measured, "cache_dir", lambda: tmp_path)
    code, _, err = run(capsys, "qwen0.5b_6x3090", "--measured")
    assert (code, "no links between GPUs of" in err) == (2, True), err
    found = Found()
    found.pairs.append(Pair(first="GPU 0", second="GPU 1", send_gb_s=3.5))
    measured.keep([found.report(socket.gethostname(), 1.0)], [])
    code, out, _ = run(capsys, "qwen0.5b_6x3090", "--measured")
    assert code == 0
    assert "3.5 GB/s between GPUs" in out.splitlines()[0]
    assert "3.5 GB/s between GPUs" in next(line for line in out.splitlines() if line.startswith("GPUs "))
