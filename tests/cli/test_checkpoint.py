"""`megazh checkpoint` on a run with three checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_metrics, write_recipe
from processes import Finished, run_command
from safetensors.torch import load_file

from megazh.errors import BusyError, DataError, UsageError
from megazh.files import locked
from megazh.model.decoder import Decoder
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import MANIFEST, list_checkpoints, read_manifest
from megazh.training.recipe import run_recipe
from megazh.training.saver import write_manifest


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run of six steps, with checkpoints of steps 2, 4 and 6, and a validation after step 6."""
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))
    for step in (2, 4):
        add_checkpoint(run, run_recipe(run), step)
    write_metrics(run, 6)
    return run


def checkpoint(*words: object) -> Finished:
    """Run `megazh checkpoint WORDS`."""
    return run_command([sys.executable, "-m", "megazh", "checkpoint", *map(str, words)], 60)


def names(run: RunFolder) -> list[int]:
    """Steps of the checkpoints that are there."""
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run.checkpoints)]


def test_list_shows_all_and_what_is_damaged(run: RunFolder) -> None:
    (run.checkpoints / "step_00000004" / "weights" / "norm.safetensors").unlink()
    finished = checkpoint("list", run.path)
    assert finished.returncode == 0, finished
    header, second, fourth, sixth, total = finished.stdout.splitlines()
    assert header.split() == ["checkpoint", "tokens", "size", "layout", "optimizer", "validation", "state"]
    assert second.split()[:2] == ["step_00000002", "512"]
    assert second.split()[-4:] == ["dp=1", "adamw", "-", "whole"]
    assert fourth.split(maxsplit=1) == ["step_00000004", "damaged: weights/norm.safetensors: missing"]
    assert "2.5000  complete: the run's last step" in sixth
    assert total.endswith(f" in {run.checkpoints}")


def test_a_run_that_was_extended_is_complete_at_its_last_step_alone(run: RunFolder) -> None:
    path = run.checkpoints / "step_00000004"
    write_manifest(path, read_manifest(path).model_copy(update={"complete": True}))
    _, _, fourth, sixth, _ = checkpoint("list", run.path).stdout.splitlines()
    assert fourth.endswith("  whole")
    assert sixth.endswith("complete: the run's last step")


def test_verify_finds_a_flipped_bit(run: RunFolder) -> None:
    assert checkpoint("verify", run.path).stdout.splitlines() == [f"step_0000000{step}: whole" for step in (2, 4, 6)]
    path = run.checkpoints / "step_00000004" / "weights" / "norm.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (run.checkpoints / "step_00000002" / MANIFEST).write_text("{")
    finished = checkpoint("verify", run.path)
    assert finished.returncode == DataError.exit_code
    second, fourth, sixth = finished.stdout.splitlines()
    assert second.startswith("step_00000002: damaged: manifest.json: missing or damaged (")
    assert fourth == (
        "step_00000004: damaged: the content of weights/norm.safetensors has changed since it was written"
    )
    assert sixth == "step_00000006: whole"
    assert "2 of 3 checkpoints are damaged: step_00000002, step_00000004; a resume" in finished.stderr
    assert checkpoint("verify", run.path, "step_00000006").returncode == 0
    finished = checkpoint("verify", run.path, "step_00000007")
    assert finished.returncode == UsageError.exit_code
    assert "no checkpoint 'step_00000007'; there are step_00000002, step_00000004, step_00000006" in finished.stderr


def test_prune_removes_by_rule_and_a_dry_run_nothing(run: RunFolder) -> None:
    finished = checkpoint("prune", run.path, "--keep-last", 1, "--keep-every", 4, "--dry-run")
    assert finished.stdout.splitlines()[0].startswith("would remove step_00000002, ")
    assert finished.stdout.splitlines()[-1].endswith("; kept: step_00000004, step_00000006")
    assert names(run) == [2, 4, 6]
    with locked(run.lock):
        assert checkpoint("prune", run.path, "--keep-last", 1).returncode == BusyError.exit_code
    finished = checkpoint("prune", run.path, "--keep-last", 1, "--keep-best")
    assert finished.returncode == 0, finished
    assert names(run) == [6]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000006"], "nothing hidden is left"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_export_writes_a_file_that_others_read(run: RunFolder, tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "model.safetensors"
    finished = checkpoint("export-weights", run.path, target, "--dtype", dtype, "--checkpoint", "step_00000004")
    assert finished.returncode == 0, finished
    found = load_file(target)
    wanted = dict(Decoder(run_recipe(run).model, seed=4).named_parameters())
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].detach().to(tensor.dtype))
        assert tensor.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    again = checkpoint("export-weights", run.path, target)
    assert (again.returncode, "exists already" in again.stderr) == (UsageError.exit_code, True)


def test_what_is_no_run_and_what_is_of_an_older_version(run: RunFolder, tmp_path: Path) -> None:
    for command in (["list"], ["verify"], ["prune", "--keep-last", "1"]):
        finished = checkpoint(command[0], tmp_path, *command[1:])
        assert finished.returncode == UsageError.exit_code
        assert "not the folder of a run" in finished.stderr
    (run.checkpoints / "step_00000006" / MANIFEST).write_text(json.dumps({"format_version": 1}))
    assert "step_00000006  damaged: was written by an older megazh" in checkpoint("list", run.path).stdout
    finished = checkpoint("export-weights", run.path, tmp_path / "x.safetensors")
    assert finished.returncode == DataError.exit_code
    assert "was written by an older megazh" in finished.stderr
