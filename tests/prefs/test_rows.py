"""Preference rows and instructions in every form that is read, and what is wrong with the others."""

from typing import Any

import pytest

from megazh.conversation.faults import Fault, RowError
from megazh.prefs.messages import PairFault
from megazh.prefs.rows import instruction_of, preference_of

HUMAN = {"from": "human", "value": "你好"}
USER = {"role": "user", "content": "你好"}


def human(role: str, text: str) -> dict[str, str]:
    """A message in ShareGPT's form."""
    return {"from": role, "value": text}


def role(name: str, text: str) -> dict[str, str]:
    """A message in OpenAI's form."""
    return {"role": name, "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你好", "chosen": "好", "rejected": "坏"},
        {"instruction": "你好", "input": "", "output": ["好", "坏"]},
        {"instruction": "你好", "input": None, "output": ["好", "坏"], "chosen": None, "rejected": None},
        {"conversations": [HUMAN], "chosen": human("gpt", "好"), "rejected": human("gpt", "坏")},
        {"conversations": [HUMAN], "chosen": "好", "rejected": "坏"},
        {"messages": [USER], "chosen": role("assistant", "好"), "rejected": role("assistant", "坏")},
        {"prompt": "你好", "chosen": "好", "rejected": "坏"},
        {"prompt": [USER], "chosen": [role("assistant", "好")], "rejected": [role("assistant", "坏")]},
        # Whole conversations as both sides, as UltraFeedback has them.
        {
            "prompt": "你好",
            "chosen": [USER, role("assistant", "好")],
            "rejected": [USER, role("assistant", "坏")],
            "messages": [USER, role("assistant", "好")],
        },
    ],
    ids=lambda row: "+".join(row),
)
def test_every_form_gives_the_same_preference(row: dict[str, Any]) -> None:
    found = preference_of(row)
    assert (found.chosen, found.rejected) == ("好", "坏")
    assert [(each.role, each.text) for each in found.prompt.messages()] == [("user", "你好")]


def test_the_input_follows_the_instruction_in_one_message() -> None:
    found = preference_of({"instruction": "翻译", "input": "hello", "chosen": "你好", "rejected": "再见"})
    assert [each.text for each in found.prompt.messages()] == ["翻译\nhello"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "三", "system": "短", "history": [["一", "二"]], "chosen": "四", "rejected": "五"},
        {
            "system": "短",
            "conversations": [human("human", "一"), human("gpt", "二"), human("human", "三")],
            "chosen": human("gpt", "四"),
            "rejected": human("gpt", "五"),
        },
        {
            "messages": [role("system", "短"), role("user", "一"), role("assistant", "二"), role("user", "三")],
            "chosen": "四",
            "rejected": "五",
        },
    ],
    ids=["alpaca", "sharegpt", "messages"],
)
def test_system_and_earlier_turns_come_before_the_question(row: dict[str, Any]) -> None:
    found = [(each.role, each.text) for each in preference_of(row).prompt.messages()]
    assert found == [("system", "短"), ("user", "一"), ("assistant", "二"), ("user", "三")]


@pytest.mark.parametrize(
    ("row", "fault", "detail"),
    [
        ({"instruction": "问", "chosen": "好"}, Fault.MISSING_KEY, "no 'rejected'; keys: instruction, chosen"),
        ({"question": "问", "chosen": "好", "rejected": "坏"}, Fault.MISSING_KEY, "no instruction, conversations,"),
        ({"instruction": "问", "output": ["好"]}, Fault.MISSING_KEY, "'output' has 1 answers"),
        ({"instruction": "问", "output": "好"}, Fault.MISSING_KEY, "no 'chosen'"),
        ({"instruction": "问", "chosen": " \n", "rejected": "坏"}, Fault.EMPTY_ANSWER, "'chosen' is empty"),
        ({"instruction": "问", "chosen": "好", "rejected": "好\n"}, PairFault.EQUAL_ANSWERS, "both begin with '好'"),
        ({"instruction": "问", "chosen": 3, "rejected": "坏"}, Fault.NOT_TEXT, "'chosen' is no message"),
        ({"instruction": 7, "chosen": "好", "rejected": "坏"}, Fault.NOT_TEXT, "'instruction' is a number"),
        ({"instruction": "问", "chosen": "\ud800", "rejected": "坏"}, Fault.NOT_TEXT, "lone surrogate at character 0"),
        ({"instruction": " ", "chosen": "好", "rejected": "坏"}, Fault.EMPTY_PROMPT, "'instruction' is empty"),
        ({"prompt": "", "chosen": "好", "rejected": "坏"}, Fault.EMPTY_PROMPT, "'prompt' is empty"),
        (
            {"conversations": [HUMAN, human("gpt", "好")], "chosen": "好", "rejected": "坏"},
            Fault.BROKEN_CONVERSATION,
            "found user, assistant",
        ),
        (
            {"conversations": [human("narrator", "x")], "chosen": "好", "rejected": "坏"},
            Fault.UNKNOWN_ROLE,
            "unknown role 'narrator'",
        ),
        ({"messages": [], "chosen": "好", "rejected": "坏"}, Fault.BROKEN_CONVERSATION, "found none"),
        ({"messages": "你好", "chosen": "好", "rejected": "坏"}, Fault.NOT_TEXT, "'messages' is text, not a list"),
        (
            {"prompt": [USER], "chosen": [role("user", "好")], "rejected": [role("assistant", "坏")]},
            Fault.BROKEN_CONVERSATION,
            "'chosen': expected one message of the assistant after the prompt, found user",
        ),
        (
            {"instruction": "问", "history": [["一"]], "chosen": "好", "rejected": "坏"},
            Fault.BROKEN_CONVERSATION,
            "'history.0'",
        ),
    ],
)
def test_bad_rows_have_a_reason(row: dict[str, Any], fault: Fault | PairFault, detail: str) -> None:
    with pytest.raises(RowError) as raised:
        preference_of(row)
    assert raised.value.fault is fault
    assert detail in raised.value.detail


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你好", "input": "", "output": "您好"},
        {"conversations": [HUMAN, human("gpt", "您好")]},
        {"messages": [USER, role("assistant", "您好")]},
    ],
    ids=["alpaca", "sharegpt", "messages"],
)
def test_instructions_with_one_answer(row: dict[str, Any]) -> None:
    found = instruction_of(row)
    assert (found.prompt.instruction, found.answer) == ("你好", "您好")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "问"}, Fault.MISSING_KEY),
        ({"instruction": "问", "output": ""}, Fault.EMPTY_ANSWER),
        ({"instruction": "问", "output": ["好", "坏"]}, Fault.NOT_TEXT),
        ({"conversations": [HUMAN]}, Fault.MISSING_KEY),
        ({"conversations": []}, Fault.MISSING_KEY),
        ({"text": "一篇文章"}, Fault.MISSING_KEY),
    ],
)
def test_rows_without_a_prompt_and_an_answer(row: dict[str, Any], fault: Fault) -> None:
    with pytest.raises(RowError) as raised:
        instruction_of(row)
    assert raised.value.fault is fault
