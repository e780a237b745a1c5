"""Manifests: what they name has to be there and to fit together, whoever wrote them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pieces import in_layout, whole_state, write_checkpoint

from megazh.errors import DataError
from megazh.training.checkpoint_list import (
    DIGEST,
    MANIFEST,
    OldFormatError,
    list_checkpoints,
    newest_good,
    read_manifest,
    remove_checkpoint,
    remove_unfinished,
    unfinished_bytes,
)

Edit = Callable[[dict[str, Any]], object]
WEIGHT_FILE = "weights/blocks.0.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two replicas."""
    return write_checkpoint(tmp_path, in_layout(whole_state(1), 1, 2), 2)


def tensor(values: dict[str, Any], kind: str, parameter: str = "embedding.weight") -> Any:
    """The entry of a tensor in the values of a manifest."""
    return next(each for each in values["tensors"] if (each["kind"], each["parameter"]) == (kind, parameter))


def test_the_manifest_names_every_file_and_tensor(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {entry.name for entry in manifest.files} == there - {MANIFEST}
    assert there > {WEIGHT_FILE, "weights/head.safetensors", "optimizer/rank_00001.safetensors"}
    assert manifest.bytes == sum((checkpoint / name).stat().st_size for name in there - {MANIFEST})
    assert (manifest.step, manifest.samples, manifest.tokens, manifest.replicas) == (2, 16, 256, 2)
    assert len(manifest.tensors) == 7 * 5
    assert max(len(entry.pieces) for entry in manifest.tensors) == 2, "a parameter on both shards"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda v: v["files"][0].update(name="../../etc/passwd"), "is no name of a file in it"),
        (lambda v: v["files"][0].update(name="/etc/passwd"), "is no name of a file in it"),
        (lambda v: v["files"][0].update(name="weights/../../x.safetensors"), "is no name of a file in it"),
        (lambda v: v["files"][0].update(name="weights/.hidden.safetensors"), "is no name of a file in it"),
        (lambda v: v["files"].append(v["files"][0]), "a file is named twice"),
        (lambda v: v["files"].pop(), "is not among its files"),
        (lambda v: v["tensors"].append(v["tensors"][0]), "is named twice"),
        (lambda v: tensor(v, "master")["pieces"][0].update(end=56), "do not begin at 0 and end at 60"),
        (lambda v: tensor(v, "master")["pieces"][0].update(begin=4), "do not begin at 0 and end at 60"),
        (lambda v: tensor(v, "master").update(pieces=[]), "do not begin at 0 and end at 60"),
        (lambda v: tensor(v, "master").update(shape=[10, 7]), "do not begin at 0 and end at 70"),
        (lambda v: tensor(v, "absmax").update(block=0), "block"),
        (lambda v: tensor(v, "master").update(shape=[-10, -6]), "shape"),
        (lambda v: v.update(step=-1), "step"),
        (lambda v: v.update(unknown=1), "unknown"),
        (lambda v: v.pop("run_id"), "run_id"),
        (lambda v: v.update(format_version="2"), "format_version"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(checkpoint: Path, edit: Edit, problem: str) -> None:
    path = checkpoint / MANIFEST
    values = json.loads(path.read_text())
    del values[DIGEST]
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError) as refusal:
        read_manifest(checkpoint)
    assert str(refusal.value).startswith(f"{path}: missing or damaged (")
    assert problem in str(refusal.value)
    assert str(refusal.value).endswith(f"remove {checkpoint} to resume from the checkpoint before it")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("shift", "problem"), [(4, "leave a gap"), (-4, "overlap"), (2, "a piece of elements")])
def test_pieces_that_do_not_meet(checkpoint: Path, shift: int, problem: str) -> None:
    path = checkpoint / MANIFEST
    values = json.loads(path.read_text())
    del values[DIGEST]
    entry = next(each for each in values["tensors"] if each["kind"] == "absmax" and len(each["pieces"]) == 2)
    entry["pieces"][1]["begin"] += shift
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=problem):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[]", b'{"step": "two"}', b"", b"[" * 100_000])
def test_a_manifest_that_is_none(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match="missing or damaged"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(("change", "problem"), [(lambda p: p.unlink(), "missing"), (None, "bytes instead of")])
def test_files_that_are_missing_or_cut_off(checkpoint: Path, change: Callable[[Path], None], problem: str) -> None:
    path = checkpoint / WEIGHT_FILE
    if change is None:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        change(path)
    with pytest.raises(DataError) as refusal:
        read_manifest(checkpoint)
    assert str(refusal.value).startswith(f"{path}: ")
    assert problem in str(refusal.value)


@pytest.mark.parametrize(("version", "problem"), [(1, "older megazh"), (3, "later megazh")])
def test_other_formats_are_named_and_no_earlier_checkpoint_is_taken(
    checkpoint: Path, version: int, problem: str
) -> None:
    later = write_checkpoint(checkpoint.parent, in_layout(whole_state(1), 1, 1), 4)
    (later / MANIFEST).write_text(json.dumps({"format_version": version, "step": 4}))
    with pytest.raises(OldFormatError, match=problem):
        read_manifest(later)
    with pytest.raises(OldFormatError, match="start another run with -r"):
        newest_good(checkpoint.parent)


def test_the_newest_that_is_whole(checkpoint: Path) -> None:
    later = write_checkpoint(checkpoint.parent, in_layout(whole_state(1), 1, 1), 4)
    assert newest_good(checkpoint.parent) == (later, read_manifest(later))
    (later / WEIGHT_FILE).unlink()
    assert newest_good(checkpoint.parent) == (checkpoint, read_manifest(checkpoint))
    assert newest_good(checkpoint.parent / "nowhere") is None


def test_what_was_cut_short_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    for name in (".step_00000004.unfinished", ".step_00000001.removed", "step_00000002", "step_3", "notes"):
        (tmp_path / name / "weights").mkdir(parents=True)
        (tmp_path / name / "weights" / "x").write_bytes(bytes(5000))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    assert unfinished_bytes(tmp_path) >= 10_000
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000002", "step_3"]
    remove_unfinished(tmp_path / "nowhere")
    remove_checkpoint(tmp_path / "step_00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_3"]


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    whole = path.read_bytes()
    assert read_manifest(checkpoint).step
    for at in range(0, len(whole) - 1, 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="missing or damaged"):
            read_manifest(checkpoint)
