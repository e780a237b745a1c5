"""The training loop: its records and checkpoints, an interrupt during the start, and losses that are not finite."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import run_command, start_command, wait_until
from recipes import MODEL, in_sections

from megazh.errors import INTERRUPTED
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.learning_rate import learning_rate

STEPS = 5
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def write(stories: Path, tmp_path: Path, **changes: Any) -> None:
    """Write the recipe of a small run."""
    values = {
        "model": {**MODEL, "vocab_size": 512},
        "data": {"manifest": str(stories)},
        "seq_len": 64,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "steps": STEPS,
        "learning_rate": 1e-3,
        "warmup": 2,
        "dtype": "fp32",
        "sample_tokens": 4,
        "validation_samples": 3,
        **changes,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(in_sections(values)))


def command(tmp_path: Path) -> list[str | Path]:
    """The command that starts the run, with one rank."""
    start = [sys.executable, "-m", "megazh", "pretrain", "-c", tmp_path / "recipe.yaml", "-r", tmp_path / "run"]
    return [*start, "--device", "cpu", "-n", "1", "-p", "1"]


def train(stories: Path, tmp_path: Path, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
    """Train with one rank to the end; returns the output and the records."""
    write(stories, tmp_path, **changes)
    finished = run_command(command(tmp_path), 120, ENVIRONMENT, tmp_path)
    assert finished.returncode == 0, finished
    return finished.stdout, read_metrics(tmp_path / "run")


@pytest.mark.ranks
@pytest.mark.slow
def test_ctrl_c_while_starting_ends_the_run_before_it_begins(stories: Path, tmp_path: Path) -> None:
    """The interrupt arrives while the ranks load, long before the first step."""
    write(stories, tmp_path)
    with start_command(command(tmp_path), ENVIRONMENT, tmp_path) as running:
        log = tmp_path / "run" / "logs" / "rank_0.log"
        wait_until(lambda: log.exists() and len(running.descendants()) > 1, 60, "a rank")
        running.process.send_signal(signal.SIGINT)
        finished = running.wait(60)
        assert running.descendants() == []
    assert finished.returncode == INTERRUPTED
    assert finished.stderr.splitlines()[-1].startswith("interrupted")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_tells_every_step_and_does_what_is_due(stories: Path, tmp_path: Path) -> None:
    printed, records = train(
        stories, tmp_path, validate_every=2, sample_every=4, sample_prompts=["从前", "小狗"], checkpoint_every=3
    )
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert [record["tokens"] for record in steps] == [256, 512, 768, 1024, 1280]
    assert [record["learning_rate"] for record in steps] == [
        learning_rate(step, STEPS, 1e-3, 2, 0.1) for step in range(STEPS)
    ]
    assert not any(record["skipped"] for record in steps)
    assert all(0 < record["data_seconds"] < record["step_seconds"] for record in steps)
    assert [record["step"] for record in records if record["kind"] == "validation"] == [0, 2, 4, 5]
    samples = [(record["step"], record["prompt"]) for record in records if record["kind"] == "sample"]
    assert samples == [(4, "从前"), (4, "小狗"), (5, "从前"), (5, "小狗")]
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000003", "step_00000005"]
    for line in ("first step after", "step 1/5", "validation after step 0", "step_00000005"):
        assert line in printed


@pytest.mark.ranks
@pytest.mark.slow
def test_a_loss_that_explodes_is_told_and_survived(stories: Path, tmp_path: Path) -> None:
    """The first step makes the weights so large that no later loss is finite."""
    printed, records = train(stories, tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["skipped"] for record in steps] == [False, True, True, True, True]
    assert printed.count("skipped: not finite") == STEPS - 1
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
