"""`megazh pretrain -t hf` as a user sees it: a dry run, Ctrl-C and the same command again, output and exit codes."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from made_runs import write_recipe
from processes import run_command, start_command, wait_until

from megazh.cli import main
from megazh.errors import INTERRUPTED
from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import newest_good

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
STEPS = 400
COMMAND = [sys.executable, "-m", "megazh", "pretrain", "-t", "hf", "-c", "mini.yaml", "--device", "cpu", "-n"]
SETTINGS = ["pipe_parallel_size=1", f"steps={STEPS}", "dtype=fp32"]


def test_a_dry_run_prints_what_would_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "mini.yaml")
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND[3:], "2", *SETTINGS, "zero_stage=2", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code
    assert "layout      2 CPU processes = 1 stages x 2 replicas, fp32" in lines
    assert any(line.startswith("engine      Hugging Face Trainer (") and "ZeRO-2" in line for line in lines)
    (config,) = [line for line in lines if line.startswith("DeepSpeed   ")]
    assert '"zero_optimization": {"stage": 2}' in config
    assert '"gradient_clipping": 1.0' in config
    assert list(tmp_path.iterdir()) == [tmp_path / "mini.yaml"]


@pytest.mark.ranks
@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A tracker follows it: it is sent each step once, and its process is gone with the run."""
    write_recipe(tmp_path / "mini.yaml", trackers=["swanlab"])
    calls = tmp_path / "calls.jsonl"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "run" / "trackers" / "fakes")])
    env = {"PYTHONPATH": path, "FAKE_CALLS": str(calls), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": None}
    run = RunFolder(tmp_path / "runs" / "mini")

    def steps() -> int:
        path = run.path / "metrics.jsonl"
        return path.read_text().count('"kind": "step"') if path.exists() else 0

    with start_command([*COMMAND, "1", *SETTINGS], env, tmp_path) as running:
        wait_until(lambda: steps() >= 2 or running.process.poll() is not None, 120, "two steps")
        running.process.send_signal(signal.SIGINT)
        stopped = running.wait(90)
        assert running.descendants() == []
    assert stopped.returncode == INTERRUPTED, stopped
    newest = newest_good(run.checkpoints)
    assert newest is not None
    assert 2 <= newest[1].step < STEPS
    assert not newest[1].complete
    again = [*COMMAND, "1", *SETTINGS[::2], f"steps={newest[1].step + 3}", "allow_bend=true"]
    finished = run_command(again, 120, env, tmp_path)
    assert finished.returncode == 0, finished
    assert f"resumed at step {newest[1].step} of {newest[1].step + 3}" in finished.stdout
    found = [record["step"] for record in read_metrics(run.path) if record["kind"] == "step"]
    assert found == list(range(1, newest[1].step + 4))
    wait_until(lambda: calls.read_text("utf-8").count('"finish"') == 2, 60, "the end of the tracker")
    sent = [json.loads(line) for line in calls.read_text("utf-8").splitlines()]
    assert [call["step"] for call in sent if "train/loss" in call] == found
    assert {call["id"] for call in sent if call["call"] == "start"} == {run.info().run_id}
    kinds = [record["kind"] for record in read_metrics(run.path)]
    assert (kinds.count("validation"), kinds.count("sample")) == (2, 1)
    assert stopped.stderr.startswith("stopping: "), "no warning of transformers, accelerate or DeepSpeed is printed"
    assert "Warning" not in finished.stderr
    words = shlex.split(finished.stdout.splitlines()[-1], comments=True)
    assert "-t hf" in " ".join(words)
