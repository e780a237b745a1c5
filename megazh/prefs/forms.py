"""The rows that TRL's trainers read, and the template that makes plain text of a prompt.

Source: TRL's documentation, "Dataset formats and types": a preference row is `prompt`, `chosen` and `rejected`, either
all text (standard form) or all lists of messages with `role` and `content` (conversational form).
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import RowError
from megazh.errors import UsageError
from megazh.prefs.messages import PairFault
from megazh.prefs.rows import Preference, Prompt

DEFAULT_TEMPLATE = "{instruction}\n{input}\n"
_INPUT = "{input}"


class Form(StrEnum):
    """Form of the rows that are written."""

    TEXT = "text"
    """Plain text: TRL's standard form, for models without a chat template."""
    MESSAGES = "messages"
    """Lists of messages: TRL's conversational form, for models with a chat template."""


class Template:
    """Makes plain text of an instruction and its input.

    Args:
        text: holds `{instruction}` and, on a line of its own or elsewhere, `{input}`. Where a row has no input, a line
            that is just `{input}` is left out.

    Raises:
        UsageError: it lacks `{instruction}`.
    """

    def __init__(self, text: str = DEFAULT_TEMPLATE) -> None:
        if "{instruction}" not in text:
            raise UsageError(f"--template {text!r}: lacks {{instruction}}")
        self.text = text

    def __call__(self, prompt: Prompt) -> str:
        """The text of a prompt.

        Raises:
            RowError: it has a system message or earlier turns.
        """
        if prompt.before:
            raise RowError(
                PairFault.SEVERAL_MESSAGES,
                f"{len(prompt.before) + 1} messages before the answer, and plain text has room for one",
            )
        if prompt.is_whole:
            return prompt.instruction
        lines = [line for line in self.text.split("\n") if prompt.input or line.strip() != _INPUT]
        # In two halves, since an instruction may hold the word {input}.
        parts = "\n".join(lines).split("{instruction}")
        return prompt.instruction.join(part.replace(_INPUT, prompt.input) for part in parts)


def trl_row(preference: Preference, form: Form, template: Template) -> dict[str, Any]:
    """A preference as TRL reads it.

    Raises:
        RowError: the form cannot hold it.
    """
    if form is Form.TEXT:
        return {
            "prompt": template(preference.prompt),
            "chosen": preference.chosen,
            "rejected": preference.rejected,
        }
    return {
        "prompt": _written(preference.prompt.messages()),
        "chosen": _written([Turn(Role.ASSISTANT, preference.chosen)]),
        "rejected": _written([Turn(Role.ASSISTANT, preference.rejected)]),
    }


def _written(messages: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.text} for each in messages]
