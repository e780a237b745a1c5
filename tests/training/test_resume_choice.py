"""Which checkpoint: rank 0 chooses, and every rank has to see the same, whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pieces import in_layout, made_manifest, whole_state, write_checkpoint
from ranks import run_ranks

from megazh.training.checkpoint_list import MANIFEST, list_checkpoints
from megazh.training.saver import write_manifest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
HOSTS = ("host_0", "host_1")


def made_checkpoint(path: Path, step: int, run_id: str = "this-run", **changes: Any) -> None:
    """A checkpoint without weights."""
    path.mkdir(parents=True)
    write_manifest(path, made_manifest(step, run_id, **changes))


def both_hosts(case: Path, make: Callable[[Path], None]) -> None:
    """Make the same folder of checkpoints for both hosts."""
    for host in HOSTS:
        (case / host / "checkpoints").mkdir(parents=True)
        make(case / host / "checkpoints")


def test_ranks_agree_on_a_checkpoint_or_all_raise_the_same_error(tmp_path: Path) -> None:
    cases: dict[str, list[list[dict[str, Any]]]] = {
        "equal": [[{"step": 2}, {"step": 3}], [{"step": 2}, {"step": 3}]],
        "one sees more": [[{"step": 2}], [{"step": 2}, {"step": 3}]],
        "late": [[{"step": 2}, {"step": 3}], [{"step": 2}, {"step": 3, "name": "late"}]],
        "one sees less": [[{"step": 2}, {"step": 3}], [{"step": 2}]],
        "other content": [[{"step": 3}], [{"step": 3, "samples": 9}]],
        "of another run": [[{"step": 3, "run_id": "that-run"}], [{"step": 3, "run_id": "that-run"}]],
        "none": [[], []],
    }
    for case, hosts in cases.items():
        for host, checkpoints in zip(HOSTS, hosts, strict=True):
            for given in checkpoints:
                values = {**given}
                name = values.pop("name", f"step_{given['step']:08d}")
                made_checkpoint(tmp_path / case / host / "checkpoints" / name, **values)
    first, second = run_ranks(Path(__file__).parent / "resume_rank.py", 2, list(cases), tmp_path, timeout=90)
    assert first["equal"] == second["equal"] == {"name": "step_00000003", "step": 3, "lines": []}
    assert first["one sees more"] == second["one sees more"] == {"name": "step_00000002", "step": 2, "lines": []}
    assert first["late"] == second["late"] == {"name": "step_00000003", "step": 3, "lines": []}
    assert first["none"] == second["none"] == {"name": None, "step": None, "lines": []}
    for case, problem in (("one sees less", "missing or damaged"), ("other content", "has other content")):
        assert first[case]["type"] == second[case]["type"] == "WorkerError"
        for found in (first[case]["error"], second[case]["error"]):
            assert "step_00000003: rank 1 on " in found
            assert problem in found
            assert found.endswith("lies on a shared file system, then run the same command again")
    error = first["of another run"]["error"]
    assert error == second["of another run"]["error"]
    assert "step_00000003: belongs to another run (its run_id is that-run, that of this run this-run)" in error
    assert "checkpoint.initial_checkpoint=" in error


def whole(folder: Path, *steps: int, run_id: str = "this-run") -> None:
    """Checkpoints with files."""
    for step in steps:
        write_checkpoint(folder, in_layout(whole_state(step), 1, 1), step, run_id)


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_ones_are_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    def cut_off(folder: Path) -> None:
        whole(folder, 1, 2, 3)
        (folder / "step_00000003" / MANIFEST).write_text("{")

    def flipped(folder: Path) -> None:
        whole(folder, 1, 2, 3)
        (folder / "step_00000003" / "weights" / "norm.safetensors").unlink()
        flip(folder / "step_00000002" / "optimizer" / "rank_00000.safetensors")

    def all_damaged(folder: Path) -> None:
        whole(folder, 1, 2)
        (folder / "step_00000002" / MANIFEST).unlink()
        flip(folder / "step_00000001" / "weights" / "norm.safetensors")

    def old(folder: Path) -> None:
        whole(folder, 1, 2)
        (folder / "step_00000002" / MANIFEST).write_text(json.dumps({"format_version": 1}))

    cases = {"cut off": cut_off, "flipped": flipped, "all damaged": all_damaged, "old": old}
    for case, make in cases.items():
        both_hosts(tmp_path / case, make)
    first, second = run_ranks(Path(__file__).parent / "resume_rank.py", 2, list(cases), tmp_path, timeout=90)
    for case in cases:  # rank 1 has nothing to print before rank 0 has chosen
        assert {**first[case], "lines": 0} == {**second[case], "lines": 0}
    assert first["cut off"]["step"] == 2
    (line,) = first["cut off"]["lines"]
    assert "step_00000003/manifest.json: missing or damaged (" in line
    assert line.endswith("; step_00000002, the one before, is taken")
    assert first["flipped"]["step"] == 1
    assert "step_00000003/weights/norm.safetensors: missing; step_00000002" in first["flipped"]["lines"][0]
    assert (
        "rank_00000.safetensors: its content has changed since it was written; step_00000002 is passed over"
        in (first["flipped"]["lines"][1])
    )
    assert first["all damaged"]["type"] == "DataError"
    assert first["all damaged"]["error"].endswith("; no checkpoint is whole: remove them all to begin the run anew")
    assert "was written by an older megazh" in first["old"]["error"]


def test_a_checkpoint_that_is_named(tmp_path: Path) -> None:
    def earlier(folder: Path) -> None:
        whole(folder, 1, 2, 3)

    def gone_on(folder: Path) -> None:
        whole(folder, 1, 2)
        made_checkpoint(folder / "step_00000003", 3, recipe={"checkpoint": {"resume": "step_00000001"}})

    def damaged(folder: Path) -> None:
        whole(folder, 1, 2)
        flip(folder / "step_00000001" / "weights" / "norm.safetensors")

    def nothing(folder: Path) -> None:
        pass

    cases = {"earlier": earlier, "gone on": gone_on, "damaged": damaged, "initial": nothing, "of another": nothing}
    rollbacks = {"rollback": 2, "rollback past damage": 1, "rollback far": 7}
    for case, make in cases.items():
        both_hosts(tmp_path / case, make)
        (tmp_path / case / "named").write_text("step_00000001")
    for case, step in rollbacks.items():
        both_hosts(tmp_path / case, damaged if case == "rollback past damage" else earlier)
        (tmp_path / case / "only").write_text(str(step))
    whole(tmp_path / "elsewhere", 7, run_id="that-run")
    (tmp_path / "initial" / "named").unlink()
    for case, name in (("initial", "initial"), ("of another", "named")):
        (tmp_path / case / name).write_text(str(tmp_path / "elsewhere" / "step_00000007"))
    first, second = run_ranks(Path(__file__).parent / "resume_rank.py", 2, [*cases, *rollbacks], tmp_path, timeout=90)
    assert (first["earlier"]["step"], second["earlier"]["step"]) == (1, 1)
    names = [path.name for path in sorted((tmp_path / "earlier" / "host_0" / "checkpoints").iterdir())]
    assert names[0] == "step_00000001"
    assert [name[:18] for name in names[1:]] == ["step_00000002.left", "step_00000003.left"]
    assert len(first["earlier"]["lines"]) == 2
    assert (first["gone on"]["step"], second["gone on"]["step"]) == (3, 3), "the same command again"
    assert len(list_checkpoints(tmp_path / "gone on" / "host_0" / "checkpoints")) == 3
    assert first["damaged"]["error"].endswith("; name another checkpoint with checkpoint.resume")
    assert len(list_checkpoints(tmp_path / "damaged" / "host_0" / "checkpoints")) == 2, "nothing is moved"
    assert (first["initial"]["step"], second["initial"]["step"]) == (7, 7)
    assert "belongs to another run" in first["of another"]["error"]
    assert first["of another"]["error"] == second["of another"]["error"]
    assert (first["rollback"]["step"], second["rollback"]["step"]) == (2, 2)
    assert sorted(path.name for path in (tmp_path / "rollback" / "host_0" / "checkpoints").iterdir()) == [
        "step_00000001", "step_00000002"
    ]  # fmt: skip
    assert len(first["rollback"]["lines"]) == 1
    for case in ("rollback past damage", "rollback far"):
        assert (first[case]["step"], second[case]["step"]) == (None, None), "no error: the caller has another way"
