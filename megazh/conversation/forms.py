"""Rows of data sets for supervised fine-tuning, read as conversations.

Forms, each recognised by its keys unless a `Layout` names it:

- Alpaca (also BELLE, LongAlpaca): `instruction`, `output`, and where there are any, `input`, `system` and `history`,
  a list of pairs of question and answer. Instruction and input are one turn of two lines, as in LLaMA-Factory.
- BELLE's conversations: an `instruction` that begins with `Human:` and ends with `Assistant:`, with the earlier turns
  between these words at the start of lines. Source: card of the data set BelleGroup/multiturn_chat_0.8M.
- ShareGPT: `conversations` of `from` and `value`; messages (OpenAI, LongAlign): `messages` of `role` and `content`.
  Either key with either kind of turn; a `system` key beside them is the system turn unless the list has one.

Left out of ShareGPT and messages, and counted (`Trim`): an answer before the first question, since what it answers is
not there, and a question after the last answer, since nothing answers it. Every other fault refuses the whole row.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.faults import Fault, RowError, text_of, type_name
from megazh.conversation.turns import DEFAULT_TAGS, Tags, turns_of

_BELLE_TURN = re.compile(r"^(Human|Assistant):", re.MULTILINE)
_BELLE_ROLES = {"Human": Role.USER, "Assistant": Role.ASSISTANT}


class Form(StrEnum):
    """Form of the rows of a data set."""

    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    """A list of turns, ShareGPT's or OpenAI's."""


class Trim(StrEnum):
    """What was left out of a row that was kept."""

    LEADING_ANSWER = "answer before the first question"
    TRAILING_QUESTION = "question after the last answer"


@dataclass(frozen=True)
class Columns:
    """Keys of a row, by what they hold."""

    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str = "history"
    system: str = "system"
    tools: str = "tools"
    """Descriptions of functions; a row that has any is refused."""
    messages: tuple[str, ...] = ("messages", "conversations")
    """Keys of the list of turns; the first one that a row has is taken."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a data set are written; by default, as their keys say."""

    form: Form | None = None
    """None to recognise the form of each row: one with a prompt is Alpaca's, one with a list of turns ShareGPT's."""
    columns: Columns = Columns()
    tags: Tags = DEFAULT_TAGS


ANY_LAYOUT = Layout()


@dataclass(frozen=True)
class Reading:
    """What a row gives."""

    conversation: Conversation
    """Whole: `Conversation.check` has passed."""
    trims: tuple[Trim, ...] = ()
    """What was left out of it."""


def conversation_of(row: Mapping[str, Any], layout: Layout = ANY_LAYOUT) -> Reading:
    """The conversation that a row holds.

    Empty system turns are left out. Text is kept as it is, but for white space around BELLE's turns and line breaks
    around an input.

    Args:
        row: keys and values, as read from JSON or a table.
        layout: how the row is written.

    Raises:
        RowError: the row is refused, with the reason.
    """
    columns = layout.columns
    messages_key = next((key for key in columns.messages if row.get(key) is not None), None)
    form = layout.form or (Form.SHAREGPT if messages_key and row.get(columns.prompt) is None else Form.ALPACA)
    if row.get(columns.tools):
        raise RowError(Fault.TOOL_TURN, f"'{columns.tools}' describes functions, which no template has a place for")
    trims: list[Trim] = []
    if form is Form.ALPACA:
        turns = _alpaca(row, columns)
    elif messages_key is None:
        raise RowError(Fault.MISSING_KEY, f"no {' or '.join(map(repr, columns.messages))}; {_keys(row)}")
    else:
        turns, trims = _trimmed(turns_of(row[messages_key], messages_key, layout.tags))
    if not any(turn.role is Role.SYSTEM and turn.text.strip() for turn in turns):
        turns = [*_system(row, columns), *turns]
    conversation = Conversation(tuple(turn for turn in turns if turn.role is not Role.SYSTEM or turn.text.strip()))
    conversation.check()
    return Reading(conversation, tuple(trims))


def _alpaca(row: Mapping[str, Any], columns: Columns) -> list[Turn]:
    for key in (columns.prompt, columns.response):
        if row.get(key) is None:
            raise RowError(Fault.MISSING_KEY, f"'{key}' is null" if key in row else f"no '{key}'; {_keys(row)}")
    prompt = text_of(row[columns.prompt], columns.prompt)
    query = "" if row.get(columns.query) is None else text_of(row[columns.query], columns.query).strip("\n")
    answer = Turn(Role.ASSISTANT, text_of(row[columns.response], columns.response))
    history = row.get(columns.history) or []  # some data sets write "" for none
    if not history and not query.strip() and (belle := _belle(prompt)):
        return [*belle, answer]
    if not isinstance(history, list):
        raise RowError(Fault.BROKEN_CONVERSATION, f"'{columns.history}' is {type_name(history)}, not a list of pairs")
    asked = "\n".join(part for part in (prompt, query) if part.strip())
    earlier = [turn for number, pair in enumerate(history) for turn in _pair(pair, f"{columns.history}.{number}")]
    return [*earlier, Turn(Role.USER, asked), answer]


def _belle(prompt: str) -> list[Turn]:
    """The turns before the answer, in BELLE's form; empty for a prompt that is not in this form."""
    text = prompt.strip()
    marks = list(_BELLE_TURN.finditer(text))
    if not marks or not text.startswith("Human:") or marks[-1].group(1) != "Assistant" or marks[-1].end() != len(text):
        return []
    return [
        Turn(_BELLE_ROLES[mark.group(1)], text[mark.end() : following.start()].strip())
        for mark, following in itertools.pairwise(marks)
    ]


def _pair(value: Any, name: str) -> list[Turn]:
    if not isinstance(value, list) or len(value) != 2:
        raise RowError(Fault.BROKEN_CONVERSATION, f"'{name}': expected a question and its answer")
    return [Turn(role, text_of(text, name)) for role, text in zip((Role.USER, Role.ASSISTANT), value, strict=True)]


def _trimmed(turns: list[Turn]) -> tuple[list[Turn], list[Trim]]:
    """The turns without an answer before the first question and a question after the last answer."""
    trims = []
    system = turns[:1] if turns and turns[0].role is Role.SYSTEM else []
    spoken = turns[len(system) :]
    roles = [turn.role for turn in spoken]
    if roles[:2] == [Role.ASSISTANT, Role.USER]:
        spoken = spoken[1:]
        trims.append(Trim.LEADING_ANSWER)
    if roles[-2:] == [Role.ASSISTANT, Role.USER] and len(spoken) > 1:
        spoken = spoken[:-1]
        trims.append(Trim.TRAILING_QUESTION)
    return [*system, *spoken], trims


def _system(row: Mapping[str, Any], columns: Columns) -> list[Turn]:
    text = row.get(columns.system)
    return [] if text is None else [Turn(Role.SYSTEM, text_of(text, columns.system))]


def _keys(row: Mapping[str, Any]) -> str:
    return f"keys: {', '.join(list(row)[:8])}"
