"""Reasons why a row of a data set is refused, and the checks of single values that all forms share."""

from enum import StrEnum
from typing import Any

_DETAIL = 200  # characters


class Fault(StrEnum):
    """Why a row is refused."""

    BROKEN_JSON = "broken JSON"
    NOT_AN_OBJECT = "not an object"
    MISSING_KEY = "missing key"
    """None of the known forms, or a key of its form that is not there."""
    NOT_TEXT = "not text"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    NO_ANSWER = "no answer"
    """A conversation that ends with the user."""
    STARTS_WITH_ANSWER = "starts with an answer"
    SAME_ROLE_TWICE = "two turns of one role running"
    SYSTEM_NOT_FIRST = "system turn not first"
    UNKNOWN_ROLE = "unknown role"
    TOOL_TURN = "tool turn"
    """A function call or its result, for which no template of this project has a place."""
    BROKEN_CONVERSATION = "broken conversation"
    """Earlier turns that are not pairs of question and answer, or messages in an order that cannot be read."""


class RowError(Exception):
    """A row is refused. Carries the reason and a detail, both for the file of rejected rows."""

    def __init__(self, fault: StrEnum, detail: str) -> None:
        detail = " ".join(detail.split())  # one line, whatever it quotes
        super().__init__(detail)
        self.fault = fault
        """A member of `Fault`, or of the reader's own enumeration of further reasons."""
        self.detail = detail[:_DETAIL].encode("utf-8", "backslashreplace").decode()  # may quote a lone surrogate


def text_of(value: Any, name: str) -> str:
    """`value` if it is text that can be written as UTF-8. Raises RowError, which names the value as `name`."""
    if not isinstance(value, str):
        raise RowError(Fault.NOT_TEXT, f"'{name}' is {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(Fault.NOT_TEXT, f"'{name}': lone surrogate at character {error.start}") from None
    return value


def type_name(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), "a number")
