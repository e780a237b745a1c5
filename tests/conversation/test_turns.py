"""Turns in the forms of ShareGPT and OpenAI."""

from typing import Any

import pytest

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import Fault, RowError
from megazh.conversation.turns import Tags, turn_of, turns_of


@pytest.mark.parametrize(
    ("value", "turn"),
    [
        ({"from": "human", "value": "问"}, Turn(Role.USER, "问")),
        ({"from": "gpt", "value": "答"}, Turn(Role.ASSISTANT, "答")),
        ({"from": "system", "value": "短"}, Turn(Role.SYSTEM, "短")),
        ({"role": "user", "content": "问"}, Turn(Role.USER, "问")),
        ({"role": "assistant", "content": "答", "weight": 0}, Turn(Role.ASSISTANT, "答", trained=False)),
        ({"role": "assistant", "content": "答", "weight": 1}, Turn(Role.ASSISTANT, "答")),
    ],
)
def test_turns(value: dict[str, Any], turn: Turn) -> None:
    assert turn_of(value, "messages.0") == turn


@pytest.mark.parametrize(
    ("value", "fault", "detail"),
    [
        ("问", Fault.NOT_TEXT, "'messages.0' is no message: expected from and value, or role and content"),
        ({"from": "human", "text": "问"}, Fault.NOT_TEXT, "is no message"),
        ({"from": "human", "value": None}, Fault.NOT_TEXT, "'messages.0.value' is null"),
        ({"from": 1, "value": "问"}, Fault.NOT_TEXT, "'messages.0.from' is a number"),
        ({"from": "narrator", "value": "问"}, Fault.UNKNOWN_ROLE, "unknown role 'narrator'"),
        ({"from": "function_call", "value": "{}"}, Fault.TOOL_TURN, "(function_call)"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, Fault.TOOL_TURN, "(assistant)"),
        ({"role": "assistant", "content": "答", "weight": 0.5}, Fault.BROKEN_CONVERSATION, "is 0.5; expected 0 or 1"),
    ],
)
def test_what_is_no_turn(value: Any, fault: Fault, detail: str) -> None:
    with pytest.raises(RowError) as raised:
        turn_of(value, "messages.0")
    assert raised.value.fault is fault
    assert detail in raised.value.detail


def test_other_tags() -> None:
    tags = Tags(keys=(("who", "what"),), user=frozenset({"Q"}), assistant=frozenset({"A"}))
    assert turns_of([{"who": "Q", "what": "问"}, {"who": "A", "what": "答"}], "dialog", tags) == [
        Turn(Role.USER, "问"),
        Turn(Role.ASSISTANT, "答"),
    ]
    with pytest.raises(RowError, match="unknown role 'human'"):
        turn_of({"who": "human", "what": "问"}, "dialog.0", tags)
