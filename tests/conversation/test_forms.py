"""Rows in every form of fine-tuning data, what is left out of them, and the reasons for refusal."""

from typing import Any

import pytest

from megazh.conversation.conversation import Role
from megazh.conversation.faults import Fault, RowError
from megazh.conversation.forms import Columns, Form, Layout, Trim, conversation_of
from megazh.conversation.turns import Tags

ONE = [("user", "一"), ("assistant", "二")]
TWO = [*ONE, ("user", "三"), ("assistant", "四")]
BELLE = "Human:一\nAssistant: 二\nHuman:三\nAssistant:\n"


def gpt(*pairs: str) -> list[dict[str, str]]:
    """Turns in ShareGPT's form, each `role text`."""
    return [dict(zip(("from", "value"), pair.split(" ", 1), strict=True)) for pair in pairs]


def openai(*pairs: str) -> list[dict[str, str]]:
    """Turns in OpenAI's form, each `role text`."""
    return [dict(zip(("role", "content"), pair.split(" ", 1), strict=True)) for pair in pairs]


def turns(row: dict[str, Any], layout: Layout | None = None) -> list[tuple[str, str]]:
    """(role, text) of each turn of a row."""
    return [(each.role.value, each.text) for each in conversation_of(row, layout or Layout()).conversation.turns]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "一", "output": "二"}, ONE),
        ({"instruction": "一", "input": "", "output": "二", "system": "", "history": []}, ONE),
        ({"instruction": "一", "input": None, "output": "二", "history": None, "messages": None}, ONE),
        ({"instruction": "一", "output": "二", "history": ""}, ONE),
        ({"instruction": "译", "input": "hi\n", "output": "二"}, [("user", "译\nhi"), ("assistant", "二")]),
        ({"instruction": "", "input": "一", "output": "二"}, ONE),
        ({"instruction": "三", "output": "四", "history": [["一", "二"]]}, TWO),
        ({"instruction": "一", "output": "二", "system": "短"}, [("system", "短"), *ONE]),
        ({"instruction": BELLE, "input": "", "output": "四"}, TWO),
        ({"instruction": "Human: 一\nAssistant:", "output": "二"}, ONE),
        ({"conversations": gpt("human 一", "gpt 二")}, ONE),
        ({"conversations": gpt("user 一", "assistant 二", "human 三", "chatgpt 四")}, TWO),
        ({"conversations": gpt("human 一", "gpt 二"), "system": "短"}, [("system", "短"), *ONE]),
        ({"conversations": gpt("system 长", "human 一", "gpt 二"), "system": "短"}, [("system", "长"), *ONE]),
        ({"conversations": gpt("system  ", "human 一", "gpt 二")}, ONE),
        ({"messages": openai("system 短", "user 一", "assistant 二")}, [("system", "短"), *ONE]),
        ({"messages": openai("user 一", "assistant 二", "user 三", "assistant 四"), "length": 9}, TWO),
        ({"conversations": openai("user 一", "assistant 二")}, ONE),
    ],
)
def test_every_form(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


@pytest.mark.parametrize(
    "instruction",
    [
        "Human: 这是什么？",
        "解释这段对话：\nHuman:你好\nAssistant:",
        "Human:写到 Assistant: 为止",
        "Human:一\nAssistant:二",
    ],
)
def test_only_the_whole_form_of_belle_is_a_conversation(instruction: str) -> None:
    assert turns({"instruction": instruction, "output": "好"}) == [("user", instruction), ("assistant", "好")]


def test_belle_with_an_input_or_a_history_is_plain_text() -> None:
    assert turns({"instruction": BELLE, "input": "五", "output": "四"})[0] == ("user", f"{BELLE}\n五")
    assert len(turns({"instruction": BELLE, "history": [["一", "二"]], "output": "四"})) == 4


@pytest.mark.parametrize(
    ("said", "expected", "trims"),
    [
        (gpt("gpt 零", "human 一", "gpt 二"), ONE, (Trim.LEADING_ANSWER,)),
        (gpt("human 一", "gpt 二", "human 三"), ONE, (Trim.TRAILING_QUESTION,)),
        (gpt("gpt 零", "human 一", "gpt 二", "human 三"), ONE, (Trim.LEADING_ANSWER, Trim.TRAILING_QUESTION)),
        (
            gpt("system 短", "gpt 零", "human 一", "gpt 二"),
            [("system", "短"), *ONE],
            (Trim.LEADING_ANSWER,),
        ),
    ],
)
def test_what_is_left_out_is_named(said: Any, expected: list[tuple[str, str]], trims: tuple[Trim, ...]) -> None:
    assert turns({"conversations": said}) == expected
    assert conversation_of({"conversations": said}).trims == trims


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "一篇文章"}, Fault.MISSING_KEY),
        ({"instruction": "一"}, Fault.MISSING_KEY),
        ({"instruction": "一", "chosen": "好", "rejected": "坏"}, Fault.MISSING_KEY),
        ({"instruction": "一", "output": " \n"}, Fault.EMPTY_ANSWER),
        ({"instruction": " ", "input": "", "output": "二"}, Fault.EMPTY_PROMPT),
        ({"instruction": "一", "output": ["二", "三"]}, Fault.NOT_TEXT),
        ({"instruction": "一", "input": 3, "output": "二"}, Fault.NOT_TEXT),
        ({"instruction": "一", "output": "\ud800"}, Fault.NOT_TEXT),
        ({"instruction": "一", "output": "二", "history": [["一"]]}, Fault.BROKEN_CONVERSATION),
        ({"instruction": "一", "output": "二", "history": "一"}, Fault.BROKEN_CONVERSATION),
        ({"instruction": "一", "output": "二", "history": [["一", ""]]}, Fault.EMPTY_ANSWER),
        ({"instruction": "Human:一\nHuman:二\nAssistant:", "output": "三"}, Fault.SAME_ROLE_TWICE),
        ({"instruction": "一", "output": "二", "tools": "[{}]"}, Fault.TOOL_TURN),
        ({"conversations": "一"}, Fault.NOT_TEXT),
        ({"conversations": []}, Fault.NO_ANSWER),
        ({"conversations": gpt("human 一")}, Fault.NO_ANSWER),
        ({"conversations": gpt("gpt 一")}, Fault.STARTS_WITH_ANSWER),
        ({"conversations": gpt("gpt 一", "human 二")}, Fault.NO_ANSWER),
        ({"conversations": gpt("human 一", "human 二", "gpt 三")}, Fault.SAME_ROLE_TWICE),
        ({"conversations": gpt("gpt 零", "gpt 零", "human 一", "gpt 二")}, Fault.STARTS_WITH_ANSWER),
        ({"conversations": gpt("human 一", "gpt 二", "human 三", "human 四")}, Fault.SAME_ROLE_TWICE),
        ({"conversations": gpt("human 一", "gpt 二", "system 短", "human 三", "gpt 四")}, Fault.SYSTEM_NOT_FIRST),
        ({"conversations": gpt("human 一", "function_call {}", "observation 3", "gpt 二")}, Fault.TOOL_TURN),
        ({"conversations": gpt("human 一", "narrator 二")}, Fault.UNKNOWN_ROLE),
        ({"messages": openai("user 一", "assistant  ")}, Fault.EMPTY_ANSWER),
    ],
)
def test_refused_rows(row: dict[str, Any], fault: Fault) -> None:
    with pytest.raises(RowError) as raised:
        conversation_of(row)
    assert raised.value.fault is fault


def test_a_named_layout() -> None:
    alpaca = Layout(Form.ALPACA, Columns(prompt="question", query="about", response="answer"))
    assert turns({"question": "一", "about": "", "answer": "二", "messages": []}, alpaca) == ONE
    tags = Tags(keys=(("who", "what"),), user=frozenset({"Q"}), assistant=frozenset({"A"}))
    dialog = Layout(Form.SHAREGPT, Columns(messages=("dialog",)), tags)
    assert (
        turns({"instruction": "无", "dialog": [{"who": "Q", "what": "一"}, {"who": "A", "what": "二"}]}, dialog) == ONE
    )
    with pytest.raises(RowError, match="no 'dialog'; keys: messages"):
        conversation_of({"messages": []}, dialog)


def test_an_untrained_turn_stays_untrained() -> None:
    said = openai("user 一", "assistant 二", "user 三", "assistant 四")
    row = {"messages": [said[0], {**said[1], "weight": 0}, *said[2:]]}
    found = conversation_of(row).conversation.turns
    assert [each.trained for each in found if each.role is Role.ASSISTANT] == [False, True]


def test_a_value_that_is_null_is_not_called_missing() -> None:
    with pytest.raises(RowError, match=r"^'output' is null$"):
        conversation_of({"instruction": "一", "output": None})
