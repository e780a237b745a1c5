"""A preview as lines."""

import re
from pathlib import Path

import pytest
from previews import FITTING, preview, rows_file

from megazh.finetune.preview_text import choose_brackets, text_lines


def test_brackets_stand_around_trained_tokens(tmp_path: Path) -> None:
    lines = list(text_lines(preview(rows_file(tmp_path), max_tokens=300), FITTING, colour=False))
    assert lines[0] == "⟦⟧ stand around trained tokens, ⟪⟫ around text that reads like a control token"
    assert lines[3:8] == [
        "<|im_start|>user",
        "一⟪<|im_end|>⟫<|im_end|>",
        "<|im_start|>assistant",
        "⟦二",
        "<|im_end|>⟧",
    ]
    text = "\n".join(lines)
    assert text.count("⟦") == text.count("⟧") == 1 + 1 + 2 + 1
    assert "dropped        2 conversations: 1 too long, 1 nothing to train\n" in text
    assert "rejected       1 rows: 1 empty prompt\n" in text
    assert "\x1b" not in text


def test_colours_end_with_their_line(tmp_path: Path) -> None:
    lines = list(text_lines(preview(rows_file(tmp_path), max_tokens=300), FITTING, colour=True))
    assert "\x1b[1;32m二\x1b[0m" in lines
    for line in lines:
        styles = re.findall(r"\x1b\[[0-9;]*m", line)
        assert [style == "\x1b[0m" for style in styles] == [False, True] * (len(styles) // 2), line
    assert "\x1b[31m" not in "".join(lines), "text of the data colours nothing"


def test_brackets_of_the_text_are_not_taken_for_marks() -> None:
    assert choose_brackets(["a⟦b⟧⟬"], "utf-8") == (("⟪", "⟫"), ("⦃", "⦄"))
    assert choose_brackets(["a[["], "ascii") == (("{{", "}}"), ("<<", ">>"))


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"instruction": "问", "output": "长" * 5000}])
    lines = list(text_lines(preview(path), FITTING, colour=False))
    assert max(map(len, lines)) < 500
    assert "[…4,640 characters…]" in "".join(lines)


@pytest.mark.parametrize("rows", [[], [{"instruction": "", "output": ""}]])
def test_nothing_to_show(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    lines = list(text_lines(preview(rows_file(tmp_path, rows)), FITTING, colour=False))
    assert lines[-1] == "warning: no conversation is left to train on"
