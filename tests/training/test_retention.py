"""Which checkpoints are kept, and that removing leaves nothing half."""

from pathlib import Path

import pytest
from pieces import in_layout, whole_state, write_checkpoint

from megazh.training.checkpoint_list import MANIFEST, read_manifest
from megazh.training.guard_state import GuardState
from megazh.training.retention import KeepRule, prune, superfluous, validation_losses, whole_steps
from megazh.training.saver import write_manifest

STEPS = range(100, 1100, 100)
LOSSES = {100: 9.0, 300: 2.0, 500: 1.5, 700: 1.5, 900: float("nan"), 1000: 3.0}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (KeepRule(0, 0, False), list(STEPS)),
        (KeepRule(0, 300, True), list(STEPS)),
        (KeepRule(2, 0, False), [900, 1000]),
        (KeepRule(2, 0, True), [700, 900, 1000]),
        (KeepRule(1, 400, True), [400, 700, 800, 1000]),
        (KeepRule(50, 0, True), list(STEPS)),
    ],
)
def test_what_is_kept(rule: KeepRule, kept: list[int]) -> None:
    removed = rule.removed(reversed(STEPS), LOSSES)
    assert [step for step in STEPS if step not in removed] == kept
    assert removed == sorted(removed)


@pytest.mark.parametrize(
    ("rule", "validated", "most"),
    [
        (KeepRule(3, 0, True), True, 5),
        (KeepRule(3, 0, True), False, 4),
        (KeepRule(3, 0, False), True, 4),
        (KeepRule(0, 0, True), True, 20),
        (KeepRule(2, 500, False), True, 7),
        (KeepRule(30, 0, False), True, 20),
    ],
)
def test_the_most_that_are_on_disk(rule: KeepRule, validated: bool, most: int) -> None:
    assert rule.most_kept(20, 2000, validated) == most


def test_a_run_never_holds_more_than_the_most() -> None:
    for rule in (KeepRule(3, 0, True), KeepRule(1, 300, True), KeepRule(2, 700, False)):
        there: list[int] = []
        for step in range(100, 2100, 100):
            there.append(step)
            assert len(there) <= rule.most_kept(20, 2000, True)
            gone = rule.removed(there, {each: 1000 / each if each < 900 else each for each in range(100, step, 100)})
            assert step not in gone
            there = [each for each in there if each not in gone]


def test_pruning_removes_whole_folders_and_leaves_damaged_and_later_ones(tmp_path: Path) -> None:
    paths = {step: write_checkpoint(tmp_path, in_layout(whole_state(1), 1, 1), step) for step in (1, 2, 3, 4, 5, 9)}
    (paths[2] / MANIFEST).write_text("{")
    assert whole_steps(tmp_path) == [1, 3, 4, 5, 9]
    assert prune(tmp_path, KeepRule(1, 0, True), {3: 1.0, 4: 2.0}, newest=5) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [paths[step].name for step in (2, 3, 5, 9)]


@pytest.mark.parametrize(("spike", "kept"), [("rollback", [2, 5]), ("skip", [5]), (None, [5])])
def test_the_checkpoint_of_a_rollback_is_kept(tmp_path: Path, spike: str | None, kept: list[int]) -> None:
    for step in (1, 2, 4, 5):
        path = write_checkpoint(tmp_path, in_layout(whole_state(1), 1, 1), step)
        state = GuardState(regular_step=min(step, 2))
        update = {"guard": state, "recipe": {"guard": {"spike": spike} if spike else {}}}
        write_manifest(path, read_manifest(path).model_copy(update=update))
    rule = KeepRule(1, 0, False)
    assert superfluous(tmp_path, rule, {}) == [step for step in (1, 2, 4) if step not in kept]
    prune(tmp_path, rule, {})
    assert whole_steps(tmp_path) == kept


def test_losses_come_from_the_metrics(tmp_path: Path) -> None:
    assert validation_losses(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 1, "loss": 4.0}\n{"kind": "validation", "step": 1, "loss": 3.5}\n'
        '{"kind": "sample", "step": 2, "prompt": "validation", "text": ""}\n["validation"]\n\0\0"validation"\n'
        '{"kind": "validation", "step": 2, "loss": 3.0}\n{"kind": "validation", "st'
    )
    assert validation_losses(tmp_path) == {1: 3.5, 2: 3.0}
