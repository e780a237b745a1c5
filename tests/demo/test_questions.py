"""Questions of the demo: reproducible from a seed, many, each with the right answer, found here from the text alone."""

import json
import re
from pathlib import Path

import pytest

from megazh.demo.questions import FACTS, TOLD, Row, long_question, question, write_questions
from megazh.demo.words import FOREST, FRUITS, THINGS, VILLAGE, hanzi

COUNT = 4_000
VALUES = {hanzi(number): number for number in range(1000)} | {"两": 2}
FULL = {each.full: each.name for world in (VILLAGE, FOREST) for each in world.children}
NUMBER = r"(\d+|[零一二三四五六七八九十百两]+)"
WHO = "(" + "|".join(FULL) + ")"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [question(3, number) for number in range(COUNT)]


def text_of(row: Row) -> str:
    """All that was told and asked, first turn to last."""
    history = row.get("history", [])
    assert isinstance(history, list)
    return "".join(turn[0] for turn in history) + str(row["instruction"])


def value(text: str) -> int:
    return int(text) if text.isdigit() else VALUES[text]


def answer(row: Row) -> str | None:
    """The answer by the text alone; None where it is none of the questions about what is told."""
    text, asked = text_of(row), str(row["instruction"]).rpartition("。")[2]
    if "颜色" in asked:
        colours = {(FULL[who], thing): colour for who, thing, colour in re.findall(WHO + "的(.+?)是(..)的", text)}
        who, thing = re.fullmatch("(.+)的(.+)是什么颜色？", asked).groups()  # type: ignore[union-attr]
        return f"{colours[who, thing]}。"
    if "谁有" in asked:
        owners = {thing: FULL[who] for who, thing in re.findall(WHO + "有一.(.+?)[，。]", text)}
        thing = asked.rpartition("谁有")[2].removesuffix("？")
        return f"{owners[thing]}有{thing}。"
    if "去了哪里" in asked:
        places = re.search("先去(.+)，后来去(.+)，最后去(.+?)。", text).groups()  # type: ignore[union-attr]
        return f"{places[2 if '最后' in asked else 0]}。"
    if picked := re.findall(WHO + f"摘了{NUMBER}个", text):
        counts = {FULL[who]: value(number) for who, number in picked}
        if "一共" in asked:
            found = re.fullmatch(f"一共有{NUMBER}个。", str(row["output"]))
            assert found is not None
            assert value(found[1]) == sum(counts.values()), row
            return str(row["output"])
        return f"{max(counts, key=lambda who: counts[who])}摘得多。"
    if "在哪里" in asked or "在做什么" in asked:
        name = asked.partition("在")[0]
        full = next(each for each, short in FULL.items() if short == name and each in text)
        told = re.search(f"{full}在(.+?)[，。]", text)
        assert told is not None
        place, doing = next(
            (each.place, each.doing)
            for world in (VILLAGE, FOREST)
            for each in world.haunts
            if told[1] == each.place + each.doing
        )
        return f"{name}在{place if '哪里' in asked else doing}。"
    return None


def test_a_question_is_a_function_of_seed_and_number(rows: list[Row]) -> None:
    assert [question(3, number) for number in range(50)] == rows[:50]
    assert question(4, 0) != rows[0] or question(4, 1) != rows[1]


def test_answers_are_right(rows: list[Row]) -> None:
    found = [(row, answer(row)) for row in rows]
    assert all(right is None or right == row["output"] for row, right in found)
    assert sum(right is not None for _, right in found) > 0.7 * COUNT


def test_facts_are_those_of_the_world(rows: list[Row]) -> None:
    facts = {str(row["instruction"]): str(row["output"]) for row in rows if answer(row) is None}
    seasons, measures = dict(FRUITS), dict(THINGS)
    for asked, output in facts.items():
        if found := re.fullmatch("(.+?)(?:什么|在哪个)季节成熟？", asked):
            assert output == f"{found[1]}在{seasons[found[1]]}成熟。"
        elif found := re.fullmatch("“(.+)”用什么量词？", asked):
            assert output == f"一{measures[found[1]]}{found[1]}。"
    numerals = {asked: output for asked, output in facts.items() if "怎么写" in asked}
    assert numerals
    for asked, output in numerals.items():
        assert value(asked.partition("用")[0]) == value(output.removesuffix("。"))


def test_most_questions_are_different(rows: list[Row]) -> None:
    told = [json.dumps(row, ensure_ascii=False) for row in rows if answer(row) is not None]
    assert len(set(told)) > 0.98 * len(told)


def test_all_kinds_are_asked(rows: list[Row]) -> None:
    texts = "\n".join(text_of(row) for row in rows)
    asked = (
        "颜色",
        "谁有",
        "去了哪里",
        "一共",
        "谁摘得多",
        "在哪里",
        "叫什么名字",
        "什么动物",
        "季节",
        "量词",
        "怎么写",
    )
    assert len(TOLD) + len(FACTS) == 9
    assert all(words in texts for words in asked)
    assert any("history" in row for row in rows), "some questions go on"


def test_files_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_questions(tmp_path / name, (question(5, number) for number in range(100)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    lines = (tmp_path / "a").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [question(5, number) for number in range(100)]


def test_half_of_long_conversations_ask_at_last_for_what_only_their_first_question_tells() -> None:
    far = 0
    for number in range(60):
        row = long_question(3, number, 600)
        history = row["history"]
        texts = [text for turn in history for text in turn]
        assert 500 <= sum(map(len, texts)) < 700
        assert long_question(3, number, 600) == row
        told = re.findall(WHO + "的(.+?)是(..)的[，。]", texts[0])
        answers = {f"{FULL[who]}的{thing}是什么颜色？": f"{colour}。" for who, thing, colour in told}
        if row["instruction"] in answers:
            far += 1
            assert row["output"] == answers[row["instruction"]]
            name = row["instruction"].partition("的")[0]
            assert [at for at, text in enumerate(texts) if name in text] == [0]
        else:
            own: Row = {"instruction": row["instruction"], "output": row["output"]}
            if "。" not in row["instruction"]:
                own["history"] = history[-1:]
            assert answer(own) in (None, row["output"])
    assert 20 < far < 40
