"""A run goes on in another layout as in its own: the same losses, from one checkpoint, by real ranks; dropout is on."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import Running, run_command, start_command, wait_until
from recipes import in_sections

from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SAVED = 9, 4
KILLS = int(os.environ.get("MEGAZH_TEST_KILLS", "3"))
RECIPE = {
    "model": {
        "vocab_size": 499,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "residual_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "seq_len": 64,
    "micro_batch_size": 2,
    "global_batch_size": 12,
    "steps": STEPS,
    "learning_rate": 1e-2,
    "warmup": 2,
    "checkpoint_every": SAVED,
    "keep_last": 0,
    "validate_every": 0,
    "validation_samples": 2,
    "sample_tokens": 2,
    "max_grad_norm": 0.5,
    "dtype": "fp32",
}


def command_of(recipe: Path, run: Path, ranks: int, stages: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a start."""
    command = [sys.executable, "-m", "megazh", "pretrain", "-c", str(recipe), "--device", "cpu", "-n", str(ranks)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MEGAZH_CACHE": str(recipe.parent / "cache")}
    return [*command, "-p", str(stages), "-r", str(run)], env


def train(recipe: Path, run: Path, ranks: int, stages: int, *settings: str) -> str:
    """Run to the end; returns what was printed."""
    command, env = command_of(recipe, run, ranks, stages)
    finished = run_command([*command, *settings], 240, env, recipe.parent)
    assert finished.returncode == 0, finished
    return finished.stdout


def back_to(run: Path, step: int, copy: Path) -> None:
    """A copy of a run as it was when the checkpoint of a step had been saved."""
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if read_manifest(checkpoint).step > step:
            shutil.rmtree(checkpoint)


def losses(run: Path) -> dict[int, float]:
    """Loss of each step."""
    return {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "step"}


@pytest.mark.parametrize(
    ("optimizer", "first", "others"),
    [
        ("adamw", (1, 1), [(1, 1), (3, 3)]),
        ("adamw", (4, 2), [(4, 2), (1, 1), (3, 1)]),
        ("muon", (2, 1), [(2, 1), (2, 2)]),
    ],
)
def test_the_next_losses_are_those_of_the_whole_run(
    stories: Path, tmp_path: Path, optimizer: str, first: tuple[int, int], others: list[tuple[int, int]]
) -> None:
    recipe, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    values = {**RECIPE, "optimizer": {"name": optimizer}, "data": {"manifest": str(stories)}}
    recipe.write_text(yaml.safe_dump(in_sections(values)))
    train(recipe, whole, *first)
    wanted = losses(whole)
    for ranks, stages in others:
        run = tmp_path / f"{ranks}_{stages}"
        back_to(whole, SAVED, run)
        printed = train(recipe, run, ranks, stages)
        assert f"resumed at step {SAVED} of {STEPS}" in printed
        assert "starts clean" not in printed
        found = losses(run)
        assert found.keys() == wanted.keys()
        if (ranks, stages) == first:
            assert found == wanted, "the same layout gives the same bits"
        else:
            assert found == pytest.approx(wanted, abs=1e-5), f"{ranks} ranks in {stages} stages"


def test_another_micro_batch_and_other_bounds(stories: Path, tmp_path: Path) -> None:
    recipe, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    recipe.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    train(recipe, whole, 2, 2, "stage_bounds=[0, 2, 5]")
    wanted = losses(whole)
    for name, settings in {"batch": ["micro_batch_size=4"], "bounds": ["stage_bounds=[0, 4, 5]"], "none": []}.items():
        back_to(whole, SAVED, tmp_path / name)
        train(recipe, tmp_path / name, 2, 2, *settings)
        assert losses(tmp_path / name) == pytest.approx(wanted, abs=1e-5)
        bounds = read_manifest(list_checkpoints(tmp_path / name / "checkpoints")[-1]).bounds
        assert bounds == ([0, 4, 5] if name == "bounds" else [0, 2, 5])


def test_another_optimizer_and_weights_of_another_run(stories: Path, tmp_path: Path) -> None:
    """From AdamW to Muon the state starts clean; `initial_checkpoint` begins another run at step 0."""
    recipe, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    recipe.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    train(recipe, whole, 1, 1)
    back_to(whole, SAVED, tmp_path / "muon")
    printed = train(recipe, tmp_path / "muon", 2, 2, "optimizer.name=muon")
    assert (
        "was saved with the optimizer adamw: weights are taken from it, and the state of muon starts clean" in printed
    )
    last = read_manifest(list_checkpoints(tmp_path / "muon" / "checkpoints")[-1])
    assert (last.optimizer, last.updates, last.step) == ("muon", STEPS - SAVED, STEPS)
    initial = f"initial_checkpoint={whole / 'checkpoints' / f'step_{STEPS:08d}'}"
    printed = train(recipe, tmp_path / "new", 2, 1, initial, "steps=3", "warmup=0")
    assert f"step {STEPS} of run {last.run_id}" in printed
    assert losses(tmp_path / "new")[1] < losses(whole)[SAVED], "it begins where the other has ended"
    first = read_manifest(list_checkpoints(tmp_path / "new" / "checkpoints")[-1])
    assert (first.step, first.updates) == (3, 3)
    assert first.run_id != last.run_id
    assert json.loads((tmp_path / "new" / "run.json").read_text())["run_id"] == first.run_id


MANY = 30 * KILLS
LAYOUTS = [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3)]


def test_kills_while_saves_are_under_way_each_resumed_in_another_layout(stories: Path, tmp_path: Path) -> None:
    """At random moments; a save begins after each step."""
    choose = random.Random(7)
    recipe, whole, broken = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "broken"
    values = {
        **RECIPE,
        "checkpoint_every": 1,
        "keep_last": 2,
        "steps": MANY,
        "learning_rate": 1e-3,
        "data": {"manifest": str(stories)},
    }
    recipe.write_text(yaml.safe_dump(in_sections(values)))
    train(recipe, whole, 1, 1)
    for _ in range(KILLS):
        ranks, stages = choose.choice(LAYOUTS)
        begun = steps_of(broken)
        with start_command(*command_of(recipe, broken, ranks, stages), recipe.parent) as running:
            wait_until(lambda begun=begun: steps_of(broken) > begun, 60, "a step")
            time.sleep(choose.uniform(0, 0.3))
            assert steps_of(broken) < MANY, "the run is killed on its way"
            os.kill(choose.choice(ranks_of(running)), signal.SIGKILL)
            running.wait(60)
            wait_until(lambda running=running: not running.descendants(), 30, "all end")
    train(recipe, broken, 1, 1)
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-5)
    last = [read_manifest(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, broken)]
    assert last[0].samples == last[1].samples
    assert last[0].updates == last[1].updates == MANY


def ranks_of(running: Running) -> list[int]:
    """Process ids of the launcher and of its ranks, without those that draw plots."""
    found = [running.process.pid]
    for pid in running.descendants():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        found += [pid] if b"rank" in words else []
    return found


def steps_of(run: Path) -> int:
    """Number of the last step that a run has recorded."""
    path = run / "metrics.jsonl"
    return max(losses(run), default=0) if path.exists() else 0
