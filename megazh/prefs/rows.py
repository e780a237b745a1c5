"""Rows of data sets: a prompt with two answers, or with one, in any of the forms that are common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import Fault, RowError, text_of
from megazh.conversation.turns import turn_of, turns_of
from megazh.prefs.messages import PairFault, check_order

_FORMS = "instruction, conversations, messages, or prompt"


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    instruction: str
    """The last message of the user."""
    input: str = ""
    """What the instruction is about, as in Alpaca's data; often empty."""
    before: tuple[Turn, ...] = ()
    """A system message and earlier turns."""
    is_whole: bool = False
    """Whether `instruction` is all that a model reads, so that no template applies."""

    def messages(self) -> list[Turn]:
        """The prompt as a conversation; instruction and input are one message of two lines."""
        text = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [*self.before, Turn(Role.USER, text)]


@dataclass(frozen=True)
class Preference:
    """A prompt, the better and the worse answer."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Instruction:
    """A prompt and the answer of the data set."""

    prompt: Prompt
    answer: str


def preference_of(row: Mapping[str, Any]) -> Preference:
    """The preference that a row holds.

    Prompts are `prompt` (text, or messages), `instruction` with `input`, `system` and `history`, or the messages under
    `conversations` (ShareGPT) or `messages` (OpenAI). Answers are `chosen` and `rejected`, each text, a message, or the
    messages of the whole conversation; else `output: [chosen, rejected]`, as older Alpaca data has it.

    Raises:
        RowError: a side is missing, empty or not text, both are equal, or the conversation is broken.
    """
    prompt = _prompt(row)
    values = _pair(row)
    chosen, rejected = (_answer(values[side], side, prompt) for side in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise RowError(PairFault.EQUAL_ANSWERS, _beginning(chosen))
    return Preference(prompt, chosen, rejected)


def instruction_of(row: Mapping[str, Any]) -> Instruction:
    """The prompt and the one answer that a row holds.

    Rows have `instruction` with `output`, or `conversations` or `messages` that end with an answer.

    Raises:
        RowError: an answer is missing, empty or not text, or the conversation is broken.
    """
    for name in ("conversations", "messages"):
        if row.get(name) is not None and row.get("instruction") is None:
            messages = turns_of(row[name], name)
            if not messages or messages[-1].role is not Role.ASSISTANT:
                raise RowError(Fault.MISSING_KEY, f"'{name}' does not end with an answer")
            return Instruction(_conversation(row, messages[:-1], name), _not_empty(messages[-1].text, name))
    if row.get("instruction") is None or row.get("output") is None:
        raise RowError(Fault.MISSING_KEY, f"expected instruction and output, conversations, or messages; {_keys(row)}")
    return Instruction(_prompt(row), _not_empty(text_of(row["output"], "output"), "output"))


def _prompt(row: Mapping[str, Any]) -> Prompt:
    for name in ("prompt", "conversations", "messages"):
        value = row.get(name)
        if value is None or row.get("instruction") is not None:
            continue
        if name != "prompt" or isinstance(value, list):
            return _conversation(row, turns_of(value, name), name)
        answers = (row.get("chosen"), row.get("rejected"))
        is_whole = not row.get("system") and all(isinstance(answer, str) for answer in answers)
        return Prompt(_asked(value, name), "", _system(row), is_whole)
    if row.get("instruction") is None:
        raise RowError(Fault.MISSING_KEY, f"no {_FORMS}; {_keys(row)}")
    added = row.get("input")
    history = [
        message for number, turn in enumerate(row.get("history") or ()) for message in _turn(turn, f"history.{number}")
    ]
    return Prompt(
        _asked(row["instruction"], "instruction"),
        "" if added is None else text_of(added, "input").strip("\n"),
        (*_system(row), *history),
    )


def _conversation(row: Mapping[str, Any], messages: Sequence[Turn], name: str) -> Prompt:
    if not (messages and messages[0].role is Role.SYSTEM):
        messages = [*_system(row), *messages]
    check_order(messages, name)
    return Prompt(messages[-1].text, "", tuple(messages[:-1]))


def _system(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    text = row.get("system")
    return (Turn(Role.SYSTEM, text_of(text, "system")),) if text else ()


def _turn(value: Any, name: str) -> list[Turn]:
    if not isinstance(value, list) or len(value) != 2:
        raise RowError(Fault.BROKEN_CONVERSATION, f"'{name}': expected a question and its answer")
    return [Turn(role, text_of(text, name)) for role, text in zip((Role.USER, Role.ASSISTANT), value, strict=True)]


def _asked(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text.strip():
        raise RowError(Fault.EMPTY_PROMPT, f"'{name}' is empty")
    return text


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `chosen` and `rejected`."""
    output = row.get("output")
    if isinstance(output, list) and row.get("chosen") is None and row.get("rejected") is None:
        if len(output) != 2:
            raise RowError(Fault.MISSING_KEY, f"'output' has {len(output)} answers, not a chosen and a rejected one")
        return {"chosen": output[0], "rejected": output[1]}
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise RowError(Fault.MISSING_KEY, f"no '{side}'; {_keys(row)}")
    return {side: row[side] for side in ("chosen", "rejected")}


def _answer(value: Any, name: str, prompt: Prompt) -> str:
    if isinstance(value, str):
        return _not_empty(text_of(value, name), name)
    messages = turns_of(value, name) if isinstance(value, list) else [turn_of(value, name)]
    asked = prompt.messages()
    if messages[: len(asked)] == asked:
        messages = messages[len(asked) :]
    if [each.role for each in messages] != [Role.ASSISTANT]:
        roles = ", ".join(each.role for each in messages) or "nothing"
        raise RowError(
            Fault.BROKEN_CONVERSATION,
            f"'{name}': expected one message of the assistant after the prompt, found {roles}",
        )
    return _not_empty(messages[0].text, name)


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise RowError(Fault.EMPTY_ANSWER, f"'{name}' is empty")
    return text


def _keys(row: Mapping[str, Any]) -> str:
    return f"keys: {', '.join(list(row)[:8])}"


def _beginning(text: str) -> str:
    return f"both begin with {text.strip()[:60]!r}"
