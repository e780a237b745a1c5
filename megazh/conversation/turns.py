"""Turns as data sets write them: objects with a key for the role and a key for the text."""

from dataclasses import dataclass
from typing import Any

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import Fault, RowError, text_of, type_name

_WEIGHT = "weight"


@dataclass(frozen=True)
class Tags:
    """How the turns of a data set are written."""

    keys: tuple[tuple[str, str], ...] = (("from", "value"), ("role", "content"))
    """Keys of role and text in a turn; the first pair that a turn has is taken."""
    user: frozenset[str] = frozenset({"human", "user"})
    """Names of the user's role."""
    assistant: frozenset[str] = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})
    """Names of the assistant's role."""
    system: frozenset[str] = frozenset({"system"})
    """Names of the role of system turns."""
    tool: frozenset[str] = frozenset({"function", "function_call", "observation", "tool", "tool_call", "tool_response"})
    """Names of the roles of function calls and of their results."""

    def role(self, name: str) -> Role | None:
        """The role that a name stands for; None for an unknown one."""
        roles = ((self.user, Role.USER), (self.assistant, Role.ASSISTANT), (self.system, Role.SYSTEM))
        return next((role for names, role in roles if name in names), None)


DEFAULT_TAGS = Tags()
"""Those of ShareGPT (`from`, `value`) and of OpenAI (`role`, `content`)."""


def turn_of(value: Any, name: str, tags: Tags = DEFAULT_TAGS) -> Turn:
    """The turn in an object.

    A turn of the assistant with `weight: 0` is not trained, as in OpenAI's data for fine-tuning.

    Args:
        value: a value of a row.
        name: its name in messages.
        tags: how turns are written.

    Raises:
        RowError: it is no turn, of an unknown role, or of a tool.
    """
    keys = next((keys for keys in tags.keys if isinstance(value, dict) and all(key in value for key in keys)), None)
    if keys is None:
        expected = ", or ".join(f"{role_key} and {text_key}" for role_key, text_key in tags.keys)
        raise RowError(Fault.NOT_TEXT, f"'{name}' is no message: expected {expected}")
    role_key, text_key = keys
    role_name = text_of(value[role_key], f"{name}.{role_key}")
    if role_name in tags.tool or value.get("tool_calls"):
        raise RowError(Fault.TOOL_TURN, f"'{name}' is a function call, or its result ({role_name})")
    role = tags.role(role_name)
    if role is None:
        raise RowError(Fault.UNKNOWN_ROLE, f"'{name}' has the unknown role '{role_name}'")
    return Turn(role, text_of(value[text_key], f"{name}.{text_key}"), _is_trained(value, name))


def turns_of(value: Any, name: str, tags: Tags = DEFAULT_TAGS) -> list[Turn]:
    """The turns in a list of objects. Arguments and errors as of `turn_of`."""
    if not isinstance(value, list):
        raise RowError(Fault.NOT_TEXT, f"'{name}' is {type_name(value)}, not a list of messages")
    return [turn_of(each, f"{name}.{number}", tags) for number, each in enumerate(value)]


def _is_trained(value: dict[str, Any], name: str) -> bool:
    weight = value.get(_WEIGHT)
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(Fault.BROKEN_CONVERSATION, f"'{name}.{_WEIGHT}' is {weight!r}; expected 0 or 1")
    return bool(weight)
