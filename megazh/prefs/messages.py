"""The order of messages before the two answers, and the reasons for refusal that only preference rows have."""

from collections.abc import Sequence
from enum import StrEnum

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import Fault, RowError


class PairFault(StrEnum):
    """Why a row gives no preference row, beside the reasons in `Fault`."""

    EQUAL_ANSWERS = "equal answers"
    """Chosen and rejected answer differ at most in white space at their ends."""
    SEVERAL_MESSAGES = "several messages"
    """A system message or earlier turns, which plain text cannot hold."""


def check_order(messages: Sequence[Turn], name: str) -> None:
    """Check that an optional system message is first, and that user and assistant alternate, from user to user.

    Raises:
        RowError: they do not, or a message of the user is empty.
    """
    turns = messages[1:] if messages and messages[0].role is Role.SYSTEM else messages
    expected = [Role.USER if number % 2 == 0 else Role.ASSISTANT for number in range(len(turns))]
    if [each.role for each in turns] != expected or len(turns) % 2 == 0:
        roles = ", ".join(each.role for each in messages[:6]) or "none"
        raise RowError(
            Fault.BROKEN_CONVERSATION, f"'{name}': expected user, assistant, ..., user before the answer, found {roles}"
        )
    if any(not each.text.strip() for each in turns if each.role is Role.USER):
        raise RowError(Fault.EMPTY_PROMPT, f"'{name}' has an empty message of the user")
