"""Conversations: which are whole, and the reason of each that is not."""

import pytest

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.faults import Fault, RowError

ROLES = {"s": Role.SYSTEM, "u": Role.USER, "a": Role.ASSISTANT}


def conversation(roles: str, empty: int | None = None) -> Conversation:
    """A conversation of the roles `s`, `u`, `a`; the turn `empty` has only white space."""
    return Conversation(
        tuple(Turn(ROLES[role], " \n" if number == empty else f"第{number}句") for number, role in enumerate(roles))
    )


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suauaua"])
def test_whole_conversations(roles: str) -> None:
    conversation(roles).check()


@pytest.mark.parametrize(
    ("roles", "empty", "fault", "detail"),
    [
        ("", None, Fault.NO_ANSWER, "found no turn"),
        ("s", None, Fault.NO_ANSWER, "found system"),
        ("u", None, Fault.NO_ANSWER, "found user"),
        ("uau", None, Fault.NO_ANSWER, "found user, assistant, user"),
        ("uauauau", None, Fault.NO_ANSWER, "found user, assistant, user, assistant, user, assistant, ..."),
        ("uua", None, Fault.SAME_ROLE_TWICE, "turns 1 and 2 of 3 are both of the user"),
        ("suaa", None, Fault.SAME_ROLE_TWICE, "turns 3 and 4 of 4 are both of the assistant"),
        ("aua", None, Fault.STARTS_WITH_ANSWER, "found assistant, user, assistant"),
        ("saua", None, Fault.STARTS_WITH_ANSWER, "found system, assistant"),
        ("uasua", None, Fault.SYSTEM_NOT_FIRST, "turn 3 of 5"),
        ("ssua", None, Fault.SYSTEM_NOT_FIRST, "turn 2 of 4"),
        ("sua", 0, Fault.EMPTY_PROMPT, "turn 1 of 3 (system) is empty"),
        ("uaua", 2, Fault.EMPTY_PROMPT, "turn 3 of 4 (user) is empty"),
        ("uaua", 1, Fault.EMPTY_ANSWER, "turn 2 of 4 (assistant) is empty"),
    ],
)
def test_broken_conversations(roles: str, empty: int | None, fault: Fault, detail: str) -> None:
    with pytest.raises(RowError) as raised:
        conversation(roles, empty).check()
    assert raised.value.fault is fault
    assert detail in raised.value.detail
