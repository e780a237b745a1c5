"""Text of limited width, with Chinese, on a terminal."""

import pytest

from megazh.run.screen import BOLD, RED, Span, beside, clip, render, width_of, wrapped


def test_chinese_is_twice_as_wide() -> None:
    assert [width_of(text) for text in ("abc", "小猫", "，", "e\u0301", "🙂", "")] == [3, 4, 2, 1, 2, 0]


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("小猫", 4, "小猫"), ("小猫", 3, "小…"), ("小猫", 2, "…"), ("小猫", 1, "…"), ("小猫", 0, ""), ("abcd", 3, "ab…")],
)
def test_what_does_not_fit_is_cut_off(text: str, width: int, shown: str) -> None:
    assert clip(text, width) == shown


def test_lines_break_between_words_or_chinese_characters() -> None:
    assert wrapped("小猫在树下睡觉", 6, 9) == ["小猫在", "树下睡", "觉"]
    assert wrapped("one two three", 8, 9) == ["one two", "three"]
    assert wrapped("小猫在树下睡觉", 6, 2) == ["小猫在", "树下…"]
    assert wrapped("小猫", 1, 3) == ["…"]
    assert wrapped("", 9, 3) == []


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert wrapped("a\x1b[2Jb\nc\td", 20, 2) == ["a [2Jb c d"]


def test_styles_take_no_columns() -> None:
    line = [Span("小猫", BOLD), Span(" x", RED), Span("yz")]
    assert render(line, 6, colours=True) == "\x1b[1m小猫\x1b[0m\x1b[31m x\x1b[0m"
    assert render(line, 20, colours=False) == "小猫 xyz"


def test_two_blocks_side_by_side() -> None:
    lines = beside([[Span("小")], [Span("abc")]], [[Span("1")], [Span("2")]], 4)
    assert [render(line, 20, colours=False) for line in lines] == ["小    1", "abc   2"]
