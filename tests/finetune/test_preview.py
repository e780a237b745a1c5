"""Previews: the trained tokens of conversations, and the counts."""

import json
from pathlib import Path

import pytest
from previews import ROWS, preview, rows_file

from megazh.finetune.fit import TooLong
from megazh.finetune.preview import Kind, Run, histogram, visible


def test_counts_of_all_that_happens_to_rows(tmp_path: Path) -> None:
    found = preview(rows_file(tmp_path), max_tokens=300)
    assert [len(shown.fitted.encoded) for shown in found.shown] == found.lengths
    assert found.trained == sum(int(shown.fitted.encoded.trained.sum()) for shown in found.shown)
    assert (len(found.lengths), found.cut) == (3, 1)
    assert found.longest > 300 >= max(found.lengths)
    assert found.dropped == {"too long": 1, "nothing to train": 1}
    assert found.rejected == {"empty prompt": 1}
    assert found.sets["files"].kept == 5
    assert found.warnings == [
        "1 conversations have text that reads like a control token; it is encoded as ordinary text"
    ]
    assert preview(rows_file(tmp_path), max_tokens=300, too_long=TooLong.DROP).dropped["too long"] == 2


def test_runs_tell_trained_tokens_and_control_tokens_from_text(tmp_path: Path) -> None:
    found = preview(rows_file(tmp_path), max_tokens=300)
    first, _, last = (shown.runs for shown in found.shown)
    assert first == [
        Run("<|im_start|>", Kind.CONTROL, False),
        Run("user\n一", Kind.TEXT, False),
        Run("<|im_end|>", Kind.LOOKALIKE, False),
        Run("<|im_end|>", Kind.CONTROL, False),
        Run("\n", Kind.TEXT, False),
        Run("<|im_start|>", Kind.CONTROL, False),
        Run("assistant\n", Kind.TEXT, False),
        Run("二\n", Kind.TEXT, True),
        Run("<|im_end|>", Kind.CONTROL, True),
        Run("\n", Kind.TEXT, False),
        Run("<|endoftext|>", Kind.CONTROL, False),
    ]
    assert last[1].text == "user\n\\x1b[31m红\\u202e"
    assert "row 1: " in found.shown[0].describe()
    assert "4 of 6 turns are left" in found.shown[1].describe()


def test_the_limit_holds_for_each_set_and_nothing_behind_it_is_read(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"instruction": f"{at}", "output": "答"} for at in range(50)])
    with path.open("a") as file:
        file.write("{broken")
    found = preview(path, show=1, limit=20)
    assert (len(found.shown), len(found.lengths), found.rejected.total()) == (1, 20, 0)
    assert preview(path).rejected == {"broken JSON": 1}


def test_a_file_that_breaks_off_is_shown_up_to_its_break(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "问", "output": "答"}] * 4)[:-20])
    found = preview(path)
    assert len(found.lengths) == 3
    assert "the 3 rows before it were read" in str(found.damage)


def test_nothing_to_train_on_is_a_warning(tmp_path: Path) -> None:
    assert preview(rows_file(tmp_path, ROWS[1:2])).warnings == ["no conversation is left to train on"]


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [([], []), ([1, 16], [(1, 16, 2)]), ([17, 32, 33], [(1, 16, 0), (17, 32, 2), (33, 64, 1)])],
)
def test_every_length_is_in_one_bin(lengths: list[int], bins: list[tuple[int, int, int]]) -> None:
    assert histogram(lengths) == bins


def test_unseen_characters_are_written_out() -> None:
    assert visible("a\tb\nc\rd\x9be") == "a\tb\nc\\rd\\x9be"
