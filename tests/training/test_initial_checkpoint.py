"""Another run begins with the weights of a checkpoint, or of a Hugging Face folder: continued pretraining."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from processes import run_command
from recipes import in_sections

from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SAVED = 9, 4
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


def losses(run: Path) -> dict[int, float]:
    """Loss of each step."""
    return {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "step"}


def test_another_run_begins_with_the_weights_of_a_checkpoint(stories: Path, tmp_path: Path) -> None:
    recipe, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    recipe.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    train(recipe, whole, 1, 1)
    last = read_manifest(list_checkpoints(whole / "checkpoints")[-1])
    initial = f"initial_checkpoint={whole / 'checkpoints' / f'step_{STEPS:08d}'}"
    printed = train(recipe, tmp_path / "new", 2, 1, initial, "steps=3", "warmup=0")
    assert f"step {STEPS} of run {last.run_id}" in printed
    assert losses(tmp_path / "new")[1] < losses(whole)[SAVED], "it begins where the other has ended"
    first = read_manifest(list_checkpoints(tmp_path / "new" / "checkpoints")[-1])
    assert (first.step, first.updates) == (3, 3)
    assert first.run_id != last.run_id
    assert json.loads((tmp_path / "new" / "run.json").read_text())["run_id"] == first.run_id
    export_to_hf(find_model(whole), tmp_path / "hf", ExportOptions(shard_bytes=20_000))
    initial = f"initial_checkpoint={tmp_path / 'hf'}"
    printed = train(recipe, tmp_path / "in stages", 2, 2, initial, "steps=3", "warmup=0")
    assert f"weights are those of {tmp_path / 'hf'}\n" in printed
    assert losses(tmp_path / "in stages") == pytest.approx(losses(tmp_path / "new"), rel=1e-5)
