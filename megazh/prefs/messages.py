"""Messages of a conversation, as the common forms of data sets write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_DETAIL = 200  # characters
_KEYS = (("from", "value"), ("role", "content"))
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Fault(StrEnum):
    """Why a row gives no preference row."""

    BROKEN_JSON = "broken JSON"
    NOT_AN_OBJECT = "not an object"
    MISSING_KEY = "missing key"
    """Neither of the known forms, or a chosen or rejected answer that is not there."""
    NOT_TEXT = "not text"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    EQUAL_ANSWERS = "equal answers"
    """Chosen and rejected answer differ at most in white space at their ends."""
    BROKEN_CONVERSATION = "broken conversation"
    """An unknown role, or messages that do not alternate between user and assistant."""
    SEVERAL_MESSAGES = "several messages"
    """A system message or earlier turns, which plain text cannot hold."""


class RowError(Exception):
    """A row gives no preference row. Carries the reason and a detail, both for the file of rejected rows."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault
        self.detail = detail[:_DETAIL].encode("utf-8", "backslashreplace").decode()  # may quote a lone surrogate


@dataclass(frozen=True)
class Message:
    """A message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str


def text_of(value: Any, name: str) -> str:
    """`value` if it is text that can be written as UTF-8. Raises RowError, which names the value as `name`."""
    if not isinstance(value, str):
        raise RowError(Fault.NOT_TEXT, f"'{name}' is {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(Fault.NOT_TEXT, f"'{name}': lone surrogate at character {error.start}") from None
    return value


def message_of(value: Any, name: str) -> Message:
    """A message in the form of ShareGPT (`from`, `value`) or of OpenAI (`role`, `content`).

    Raises:
        RowError: it is in neither form, or of an unknown role.
    """
    for role_key, text_key in _KEYS:
        if isinstance(value, dict) and role_key in value and text_key in value:
            role = _ROLES.get(text_of(value[role_key], f"{name}.{role_key}"))
            if role is None:
                raise RowError(Fault.BROKEN_CONVERSATION, f"'{name}' has the unknown role '{value[role_key]}'")
            return Message(role, text_of(value[text_key], f"{name}.{text_key}"))
    raise RowError(Fault.NOT_TEXT, f"'{name}' is no message: expected from and value, or role and content")


def messages_of(value: Any, name: str) -> list[Message]:
    """A list of messages. Raises RowError as `message_of`."""
    if not isinstance(value, list):
        raise RowError(Fault.NOT_TEXT, f"'{name}' is {type_name(value)}, not a list of messages")
    return [message_of(each, f"{name}.{number}") for number, each in enumerate(value)]


def check_order(messages: Sequence[Message], name: str) -> None:
    """Check that an optional system message is first, and that user and assistant alternate, from user to user.

    Raises:
        RowError: they do not, or a message of the user is empty.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    if [each.role for each in turns] != expected or len(turns) % 2 == 0:
        roles = ", ".join(each.role for each in messages[:6]) or "none"
        raise RowError(
            Fault.BROKEN_CONVERSATION, f"'{name}': expected user, assistant, ..., user before the answer, found {roles}"
        )
    if any(not each.text.strip() for each in turns if each.role == "user"):
        raise RowError(Fault.EMPTY_PROMPT, f"'{name}' has an empty message of the user")


def type_name(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), "a number")
