"""The training loop: its records and checkpoints, an interrupt during the start, and losses that are not finite."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from indexes import set_template
from processes import run_command, start_command, wait_until
from recipes import MODEL, in_sections

from megazh.errors import INTERRUPTED, DivergedError
from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.course import Kind, Schedule
from megazh.training.guard import SKIPPED_LIMIT

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


def command(tmp_path: Path, ranks: int = 1, stages: int = 1) -> list[str | Path]:
    """The command that starts the run."""
    start = [sys.executable, "-m", "megazh", "pretrain", "-c", tmp_path / "recipe.yaml", "-r", tmp_path / "run"]
    return [*start, "--device", "cpu", "-n", str(ranks), "-p", str(stages)]


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
    chats = shutil.copytree(stories.parent, tmp_path / "chats") / stories.name
    for path in chats.parent.glob("*.bin"):
        set_template(path.with_suffix(""))
    printed, records = train(
        chats, tmp_path, validate_every=2, sample_every=4, sample_prompts=["从前", "小狗"], checkpoint_every=3
    )
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert [record["tokens"] for record in steps] == [256, 512, 768, 1024, 1280]
    schedule = Schedule(Kind.COSINE, 1e-3, STEPS, 2, 0.1)
    assert [record["learning_rate"] for record in steps] == [schedule.rate(step) for step in range(STEPS)]
    assert not any(record["skipped"] for record in steps)
    assert all(0 < record["data_seconds"] < record["step_seconds"] for record in steps)
    assert [record["step"] for record in records if record["kind"] == "validation"] == [0, 2, 4, 5]
    samples = [(record["step"], record["prompt"]) for record in records if record["kind"] == "sample"]
    assert samples == [(4, "从前"), (4, "小狗"), (5, "从前"), (5, "小狗")]
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_00000003", "step_00000005"]
    templates = [read_manifest(path).template for path in checkpoints]
    assert [template.stop for template in templates if template] == ["<|im_end|>"] * 2
    for line in ("first step after", "step 1/5", "validation after step 0", "step_00000005"):
        assert line in printed


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stages", "settings"),
    [(1, 1, ["dtype=fp32"]), (2, 2, ["dtype=bf16"])],
    ids=["fp32", "bf16 in two stages"],
)
def test_a_run_that_diverges_ends_and_goes_on_with_another_rate(
    stories: Path, tmp_path: Path, ranks: int, stages: int, settings: list[str]
) -> None:
    """The first steps make the weights so large that no later gradient is finite."""
    write(stories, tmp_path, steps=40, max_grad_norm=0.0, checkpoint_every=10, sample_every=10)
    start = [*command(tmp_path, ranks, stages), *settings]
    finished = run_command([*start, "learning_rate=1e30"], 120, ENVIRONMENT, tmp_path)
    assert finished.returncode == DivergedError.exit_code == 6, finished
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    taken = len(steps) - SKIPPED_LIMIT
    assert [record["skipped"] for record in steps] == [False] * taken + [True] * SKIPPED_LIMIT
    assert 1 <= taken < 10
    assert steps[-1]["skipped_so_far"] == SKIPPED_LIMIT
    assert finished.stdout.count("skipped: not finite") == SKIPPED_LIMIT
    (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: step {len(steps)}: training has diverged: the last 20 steps were skipped")
    assert "no checkpoint was saved; try a lower optimizer.learning_rate (was 1e+30)" in error
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [], "those that were due held nothing new"
    if settings == ["dtype=fp32"]:
        finished = run_command([*start, "learning_rate=1e-3", "steps=5"], 120, ENVIRONMENT, tmp_path)
        assert finished.returncode == 0, finished
        assert "skipped" not in finished.stdout


@pytest.mark.ranks
@pytest.mark.slow
def test_a_short_run_that_diverges_is_not_complete(stories: Path, tmp_path: Path) -> None:
    write(stories, tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    for _ in range(2):
        finished = run_command(command(tmp_path), 120, ENVIRONMENT, tmp_path)
        assert finished.returncode == DivergedError.exit_code, finished
        assert f"{STEPS - 1} of {STEPS} steps were skipped" in finished.stderr
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert (tmp_path / "run" / "loss.png").exists()


PROMPTS = [f"{number}从前" for number in range(60)]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_that_ends_while_it_samples_is_saved_and_finishes_that_part(stories: Path, tmp_path: Path) -> None:
    """First by a request to stop, then by a kill; nothing is trained, validated or sampled twice."""
    write(stories, tmp_path, sample_prompts=PROMPTS, sample_tokens=60, checkpoint_every=0)
    sampled = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        with start_command(command(tmp_path), ENVIRONMENT, tmp_path) as running:
            wait_until(lambda before=sampled: count(tmp_path, "sample") > before, 60, "another sample")
            running.process.send_signal(number)
            finished = running.wait(60)
            wait_until(lambda: not running.descendants(), 30, "the ranks end")
        assert finished.returncode == (INTERRUPTED if number == signal.SIGINT else -number), finished
        before, sampled = sampled, count(tmp_path, "sample")
        assert before < sampled < len(PROMPTS), "within the samples"
        (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
        assert (checkpoint.name, read_manifest(checkpoint).complete) == ("step_00000005", False)
        if number == signal.SIGINT:
            assert (tmp_path / "run" / "loss.png").exists()
    finished = run_command(command(tmp_path), 120, ENVIRONMENT, tmp_path)
    assert finished.returncode == 0, finished
    assert read_manifest(checkpoint).complete
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records if record["kind"] == "validation"] == [0, 5]
    assert [record["prompt"] for record in records if record["kind"] == "sample"] == PROMPTS
    assert len(RunFolder(tmp_path / "run").info().attempts) == 3


def count(tmp_path: Path, kind: str) -> int:
    """Number of records of a kind so far."""
    path = tmp_path / "run" / "metrics.jsonl"
    return path.read_text().count(f'"kind": "{kind}"') if path.exists() else 0
