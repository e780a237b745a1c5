"""Run folders that cannot be one, inputs that are not there, and disks that are too small."""

import os
from pathlib import Path
from typing import Any

import pytest
from cases import make_case, on_cpu
from made_runs import make_run

from megazh.errors import UsageError
from megazh.pipeline.memory import checkpoint_bytes, stage_parameters
from megazh.training.checks import place
from megazh.training.checks.place import checkpoints_to_come
from megazh.training.job import Case, Request
from megazh.training.preflight import warnings_of
from megazh.training.stages import work_of


def folder_case(tmp_path: Path, run: str) -> Case:
    """A case with the run folder `run`, as -r gives it."""
    case = make_case(tmp_path, request=Request(run=Path(run)))
    object.__setattr__(case.run, "path", Path(run))
    case.run.config = Path(run) / "config.yaml"
    return case


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("", "-r .: a run cannot use the current folder"),
        (".", "-r .: a run cannot use the current folder"),
        ("../here", "-r ../here: a run cannot use the current folder"),
        ("file", "-r file: file is a file, not a folder"),
        ("file/below", "-r file/below: file is a file, not a folder"),
        ("link", "-r link: link is a link to nothing"),
        ("full", "-r full: holds a.txt and 1 more, and no run (config.yaml is missing)"),
        ("..", "-r ..: holds here"),
        ("lost", "-r lost: holds checkpoints, and no run (config.yaml is missing)"),
        ("/proc", "-r /proc: "),
        ("theirs", "-r theirs: holds a config.yaml, and no run (run.json is missing)"),
    ],
)
def test_a_folder_that_cannot_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, words: str) -> None:
    here = tmp_path / "here"
    for name in ("full", "theirs", "lost/checkpoints"):
        (here / name).mkdir(parents=True)
    for name in ("file", "full/a.txt", "full/b.txt", "theirs/config.yaml"):
        (here / name).touch()
    (here / "link").symlink_to("nowhere")
    monkeypatch.chdir(here)
    with pytest.raises(UsageError) as refusal:
        warnings_of(folder_case(tmp_path, run), [place.run_folder])
    line = str(refusal.value)
    assert line.startswith(words.partition("here")[0] if run == ".." else words), line
    assert "give a folder of its own, such as -r runs/NAME" in line


@pytest.mark.parametrize("run", ["new", "new/below", "empty", "begun", "run", "link"])
def test_a_folder_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "begun/logs", "run/checkpoints"):
        Path(name).mkdir(parents=True)
    for name in ("begun/.lock", "begun/run.json", "begun/tokenizer.json", "run/config.yaml", "run/run.json"):
        Path(name).touch()
    Path("link").symlink_to("empty")
    assert warnings_of(folder_case(tmp_path, run), [place.run_folder]) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    with pytest.raises(UsageError, match=r"cannot be written: user .* has no permission.*; give a folder of its own"):
        warnings_of(folder_case(tmp_path, str(tmp_path / "theirs" / "run")), [place.run_folder])


def test_a_run_that_is_complete_is_described_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stories: Path
) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("cannot be written")

    monkeypatch.setattr(place, "check_writable", refuse)
    case = make_case(tmp_path, stories, steps=6)
    make_run(case.run.path, tmp_path / "mini.yaml", step=6)
    assert warnings_of(case, [place.run_folder]) == []
    longer = make_case(tmp_path, stories, steps=7)
    with pytest.raises(UsageError, match="cannot be written"):
        warnings_of(longer, [place.run_folder])


@pytest.mark.parametrize("given", ["nowhere", "nowhere/*.jsonl", "empty", ""])
def test_inputs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("there.txt").write_text("有")
    case = make_case(tmp_path, request=Request(inputs=["there.txt", given]))
    with pytest.raises(UsageError, match=r"^-i '': |nowhere|empty"):
        warnings_of(case, [place.inputs])


def with_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoints: float, **changes: Any) -> list[str]:
    """The warnings on a disk that holds this number of checkpoints."""
    case = make_case(tmp_path, **changes)
    size = checkpoint_bytes(work_of(case.recipe, case.job.layout, case.job.precision))
    assert size == 12 * stage_parameters(case.recipe.model, 0, 4), "fp32 weights and two averages"
    monkeypatch.setattr(place, "free_bytes", lambda _: int(checkpoints * size))
    return warnings_of(case, [place.disk])


def test_a_disk_that_holds_not_even_two_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^4 checkpoints of .* kB need .* has .* free, which holds 1; free some"):
        with_disk(monkeypatch, tmp_path, 1.9, steps=100, checkpoint_every=10)
    with pytest.raises(UsageError, match=r"^1 checkpoint of .* which holds none"):
        with_disk(monkeypatch, tmp_path, 0.9, steps=100)
    assert with_disk(monkeypatch, tmp_path, 1.1, steps=100) == [], "only the last one is kept"
    (line,) = with_disk(monkeypatch, tmp_path, 0.9, steps=100, request=Request(stages=1, dry_run=True))
    assert line.startswith("warning: 1 checkpoint of ")
    assert line.endswith("; a start will refuse that"), "a dry run is often made on another machine"


@pytest.mark.parametrize(
    ("holds", "keep", "remedy", "fits"),
    [
        (3.5, {"keep_last": 6}, "checkpoint.keep_last=1,", {"keep_last": 1}),
        (4.5, {"keep_last": 6, "keep_best": False}, "checkpoint.keep_last=3,", {"keep_last": 3, "keep_best": False}),
        (4.5, {"keep_last": 0}, "checkpoint.keep_last=2,", {"keep_last": 2}),
        (5.5, {"keep_last": 2, "keep_every": 10}, "checkpoint.keep_every=100 or", {"keep_last": 2, "keep_every": 100}),
    ],
)
def test_a_disk_that_holds_some_is_warned_of_with_a_rule_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    holds: float,
    keep: dict[str, Any],
    remedy: str,
    fits: dict[str, Any],
) -> None:
    changes = {"steps": 100, "checkpoint_every": 10, "validate_every": 10}
    (line,) = with_disk(monkeypatch, tmp_path, holds, **changes, **keep)
    assert f"which holds {int(holds)}: saves will fail once it is full; keep fewer with {remedy}" in line
    assert with_disk(monkeypatch, tmp_path, holds, **changes, **fits) == []
    assert with_disk(monkeypatch, tmp_path, 10.5, **changes, **keep) == []


def test_a_resumed_run_needs_only_what_is_still_to_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stories: Path
) -> None:
    case = make_case(tmp_path, stories, steps=6)
    make_run(case.run.path, tmp_path / "mini.yaml", step=6)
    changes = {"manifest": stories, "checkpoint_every": 2}
    assert with_disk(monkeypatch, tmp_path, 2.1, steps=10, **changes) == []
    assert with_disk(monkeypatch, tmp_path, 0.0, steps=6, **changes) == [], "it is complete"


def test_the_room_that_an_interrupted_save_has_taken_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = make_case(tmp_path).run.checkpoints / ".step_00000004.unfinished" / "state"
    left.mkdir(parents=True)
    with pytest.raises(UsageError, match="which holds none"):
        with_disk(monkeypatch, tmp_path, 0.0, steps=100)
    (left / "file").write_bytes(bytes(600_000))
    assert with_disk(monkeypatch, tmp_path, 0.0, steps=100) == [], "the start removes it"


@pytest.mark.parametrize(
    ("steps", "every", "done", "expected"),
    [
        (100, 10, 0, 10),
        (100, 0, 0, 1),
        (101, 10, 0, 11),
        (100, 10, 90, 1),
        (100, 10, 55, 5),
        (9, 10, 0, 1),
        (5, 1, 5, 0),
    ],
)
def test_checkpoints_to_come(tmp_path: Path, steps: int, every: int, done: int, expected: int) -> None:
    recipe = make_case(tmp_path, steps=steps, checkpoint_every=every, devices=on_cpu()).recipe
    assert checkpoints_to_come(recipe, done) == expected
    saved = [step for step in range(done + 1, steps + 1) if step == steps or (every and step % every == 0)]
    assert len(saved) == expected
