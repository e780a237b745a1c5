"""Checkpoints: complete or absent, refused if damaged, and unable to run code."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import packed
from pipeline.ladder_rank import PARTS
from processes import wait_until
from ranks import run_ranks, start_ranks
from recipes import make_recipe
from training.checkpoint_rank import ROW, TRAINED

from megazh.errors import DataError, WorkerError
from megazh.model.decoder import Decoder
from megazh.training.checkpoint_list import MANIFEST, STATE, list_checkpoints, read_manifest, remove_unfinished
from megazh.training.weights import load_decoder

SCRIPT = Path(__file__).parent / "checkpoint_rank.py"
CPU = torch.device("cpu")
STEP = "step_00000002"
LAYER = "layer_01-model_states.pt"
Found = list[dict[str, Any]]
Saved = tuple[Path, Found]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder with checkpoints of `TRAINED` by two stages, and the results of the ranks."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(SCRIPT, 2, ["save"], folder, timeout=120)


def recipe_of(name: str) -> Any:
    """The recipe of a case, as `load_decoder` takes it."""
    return make_recipe(model=TRAINED[name].config.model_dump(mode="json"))


class Evil:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def update_manifest(checkpoint: Path) -> None:
    """Make the manifest update_manifest with the files, as someone who changes them on purpose would."""
    manifest = checkpoint / MANIFEST
    values = json.loads(manifest.read_text())
    for entry in values["files"]:
        data = (checkpoint / entry["name"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(values))


def flip(path: Path, place: int | None = None) -> None:
    """Flip one bit, by default in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


# Contents


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_whole_model_of_two_stages(saved: Saved, name: str) -> None:
    """The model loaded in one process gives the logits of the trained pipeline."""
    folder, found = saved
    model = load_decoder(folder / name / STEP, recipe_of(name), CPU)
    tokens, _, positions, bounds = packed([ROW], sum(ROW) + 1)
    with torch.no_grad():
        logits = model.logits(model(tokens, model.attention(positions, bounds)))
    assert torch.equal(logits, found[-1][name]["logits"])
    assert not torch.equal(model.embedding.weight.float(), Decoder(recipe_of(name).model, 3).embedding.weight)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_manifest_names_every_file_with_its_hash(saved: Saved) -> None:
    checkpoint = saved[0] / "tied" / STEP
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.samples, manifest.tokens) == (2, 16, 256)
    assert (manifest.stages, manifest.replicas, manifest.bounds) == (2, 1, [0, 2, PARTS])
    assert set(manifest.versions) == {"megazh", "torch", "deepspeed"}
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {entry.name for entry in manifest.files} == there - {MANIFEST}
    for entry in manifest.files:
        assert hashlib.sha256((checkpoint / entry.name).read_bytes()).hexdigest() == entry.sha256
    assert [path.name for path in checkpoint.parent.iterdir()] == [STEP], "nothing is left beside it"


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_size_is_known_before_the_first_checkpoint(saved: Saved, name: str) -> None:
    folder, found = saved
    written = sum(entry.bytes for entry in read_manifest(folder / name / STEP).files)
    known = sum(rank[name]["bytes"] for rank in found)
    assert known < written < known + 120_000, "apart from what torch adds to each file"


# Refusals


def truncate(path: Path) -> None:
    """Cut the end off, as an incomplete copy does."""
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        (f"{STATE}/{LAYER}", truncate, "bytes instead of"),
        (f"{STATE}/{LAYER}", Path.unlink, "missing"),
        (MANIFEST, Path.unlink, "missing or damaged"),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe{"), "missing or damaged"),
        (MANIFEST, lambda path: path.write_text("[]"), "missing or damaged"),
        (MANIFEST, lambda path: path.write_text('{"step": "two"}'), "missing or damaged"),
        (MANIFEST, truncate, "missing or damaged"),
    ],
)
def test_damage_that_the_manifest_shows(
    saved: Saved, tmp_path: Path, name: str, damage: Callable[[Path], None], problem: str
) -> None:
    checkpoint = tmp_path / STEP
    shutil.copytree(saved[0] / "tied" / STEP, checkpoint)
    damage(checkpoint / name)
    for read in (lambda: read_manifest(checkpoint), lambda: load_decoder(checkpoint, recipe_of("tied"), CPU)):
        with pytest.raises(DataError) as refusal:
            read()
        assert str(refusal.value).startswith(f"{checkpoint / name}: ")
        assert problem in str(refusal.value)
        assert str(refusal.value).endswith(f"remove {checkpoint} to resume from the checkpoint before it")
        assert "\n" not in str(refusal.value)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_manifest_of_a_later_format_is_refused(saved: Saved, tmp_path: Path) -> None:
    checkpoint = tmp_path / STEP
    shutil.copytree(saved[0] / "tied" / STEP, checkpoint)
    values = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(DataError, match="format_version"):
        read_manifest(checkpoint)


@pytest.mark.ranks
@pytest.mark.slow
def test_weights_of_another_shape_are_refused(saved: Saved) -> None:
    other = make_recipe(model={**TRAINED["tied"].config.model_dump(mode="json"), "hidden_size": 64})
    with pytest.raises(DataError, match="does not fit the model"):
        load_decoder(saved[0] / "tied" / STEP, other, CPU)


@pytest.mark.ranks
@pytest.mark.slow
def test_loading_gives_back_all_or_names_the_file_that_has_changed(saved: Saved, tmp_path: Path) -> None:
    """Training resumes from an intact checkpoint as if it had not been interrupted."""
    folder, wanted = saved
    good = [folder / name / STEP for name in TRAINED]
    bad: dict[Path, Path] = {}
    for file in sorted(path.name for path in (folder / "tied" / STEP / STATE).iterdir()):
        checkpoint = tmp_path / file / "tied" / STEP
        shutil.copytree(folder / "tied" / STEP, checkpoint)
        bad[checkpoint] = checkpoint / STATE / file
        flip(bad[checkpoint])
    found = run_ranks(SCRIPT, 2, ["load", *good, *bad], tmp_path / "load", timeout=120)
    for rank, before in zip(found, wanted, strict=True):
        for path in good:
            assert rank[str(path)]["settings"] == pytest.approx(rank[str(path)]["own_settings"]), "clipping and decay"
            later = rank[str(path)]["later"]
            for key, weight in before[path.parent.name]["later"].items():
                assert torch.equal(weight, later[key]), f"{path}: {key}"
        for checkpoint, path in bad.items():
            error = rank[str(checkpoint)]["error"]
            assert error.startswith(
                f"{path}: its content has changed since it was written; remove {checkpoint} to resume from"
            )


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["optim_states", "model_states"])
def test_an_object_in_a_file_of_the_last_rank_ends_the_run_and_is_not_run(
    saved: Saved, tmp_path: Path, file_type: str
) -> None:
    checkpoint, trace = tmp_path / STEP, tmp_path / "trace"
    shutil.copytree(saved[0] / "tied" / STEP, checkpoint)
    path = max((checkpoint / STATE).glob(f"*mp_rank_*{file_type}.pt"))
    torch.save({"module": torch.ones(2), "extra": Evil(trace)}, path)
    update_manifest(checkpoint)
    with start_ranks(SCRIPT, 2, ["load_one", checkpoint], tmp_path / "load") as running:
        finished = running.wait(90)
    assert finished.returncode == DataError.exit_code, finished
    assert f"error: {path}: not a checkpoint file: " in finished.stderr
    assert not trace.exists(), "nothing was executed"


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_model_file_with_code_in_it_is_refused_and_not_run(saved: Saved, tmp_path: Path, protocol: int) -> None:
    checkpoint, trace = tmp_path / STEP, tmp_path / "trace"
    shutil.copytree(saved[0] / "tied" / STEP, checkpoint)
    path = checkpoint / STATE / LAYER
    torch.save({"weight": Evil(trace)}, path, pickle_protocol=protocol)
    update_manifest(checkpoint)
    with pytest.raises(DataError, match="not a checkpoint file"):
        load_decoder(checkpoint, recipe_of("tied"), CPU)
    path.write_bytes(pickle.dumps(Evil(trace), protocol))
    update_manifest(checkpoint)
    with pytest.raises(DataError, match="not a checkpoint file"):
        load_decoder(checkpoint, recipe_of("tied"), CPU)
    assert not trace.exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_flipped_bit_in_a_weight_is_found_when_the_model_is_loaded_for_use(saved: Saved, tmp_path: Path) -> None:
    checkpoint = tmp_path / STEP
    shutil.copytree(saved[0] / "tied" / STEP, checkpoint)
    path = checkpoint / STATE / LAYER
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    flip(path, largest.header_offset + 4000)
    with pytest.raises(DataError) as refusal:
        load_decoder(checkpoint, recipe_of("tied"), CPU)
    assert str(refusal.value).startswith(f"{path}: ")


# Interrupted saves


@pytest.mark.ranks
@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    choose = random.Random(5)
    folder = tmp_path / "tied"
    first = 1
    for victim in ("a rank", "the launcher"):
        with start_ranks(SCRIPT, 2, ["save_for_ever", first], tmp_path) as running:
            wait_until(lambda first=first: (folder / f"step_{first + 2:08d}").exists(), 120, "three checkpoints")
            time.sleep(choose.uniform(0, 0.5))
            ranks = [pid for pid in running.descendants() if pid != running.process.pid]
            os.kill(choose.choice(ranks) if victim == "a rank" else running.process.pid, signal.SIGKILL)
            running.wait(60)
            wait_until(lambda running=running: not running.descendants(), 30, "all end")
        checkpoints = list_checkpoints(folder)
        assert len(checkpoints) >= 3
        for checkpoint in checkpoints:
            for entry in read_manifest(checkpoint).files:
                assert hashlib.sha256((checkpoint / entry.name).read_bytes()).hexdigest() == entry.sha256
        load_decoder(checkpoints[-1], recipe_of("tied"), CPU)
        first = read_manifest(checkpoints[-1]).step + 1


def test_what_a_checkpoint_that_was_cut_short_left_is_none_and_is_removed(tmp_path: Path) -> None:
    for name in (".step_00000004.unfinished", "step_00000002", "step_3", "notes"):
        (tmp_path / name / STATE).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000002", "step_3"]
    remove_unfinished(tmp_path / "nowhere")


@pytest.mark.ranks
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    with start_ranks(SCRIPT, 2, ["fill_the_disk"], tmp_path) as running:
        finished = running.wait(120)
    assert finished.returncode == WorkerError.exit_code, finished
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path / 'tied' / STEP}: cannot be written by rank 1 on ")
    assert "needed, 'ulimit -f' allows 10.0 kB); earlier checkpoints are whole: raise the limit" in line
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert line in lines, "all ranks raise the same"
        (early,) = [each for each in lines if each.startswith("too little room: ")]
        assert early.startswith(f"too little room: {tmp_path / 'tied'}: cannot be written: No space left on device (")
        assert "needed, 1.0 kB free); earlier checkpoints are whole: make room on its disk" in early
        assert "passed on: RuntimeError('CUDA error: unspecified launch failure')" in lines
    (kept,) = (tmp_path / "tied").iterdir()
    assert list_checkpoints(tmp_path / "tied") == [kept], "nothing of the unfinished one is left"
    for entry in read_manifest(kept).files:
        assert hashlib.sha256((kept / entry.name).read_bytes()).hexdigest() == entry.sha256
    load_decoder(kept, recipe_of("tied"), CPU)
