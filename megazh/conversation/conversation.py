"""A conversation: turns of user and assistant, with an optional system turn before them."""

from dataclasses import dataclass
from enum import StrEnum

from megazh.conversation.faults import Fault, RowError

_SHOWN = 6  # roles in a message


class Role(StrEnum):
    """Whose turn it is."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation."""

    role: Role
    text: str
    trained: bool = True
    """Whether the loss covers the turn. Counts for turns of the assistant only: no other turn is trained."""


@dataclass(frozen=True)
class Conversation:
    """Turns in their order. Not checked when it is made: `check` says whether it can be trained on."""

    turns: tuple[Turn, ...]

    def check(self) -> None:
        """Check that an optional system turn is first, that user and assistant alternate from user to assistant, and
        that every turn has text other than white space.

        Raises:
            RowError: it does not; the reason is the first fault in the order of the turns.
        """
        expected = Role.USER
        for number, turn in enumerate(self.turns):
            self._check_role(number, turn.role, expected)
            if not turn.text.strip():
                fault = Fault.EMPTY_ANSWER if turn.role is Role.ASSISTANT else Fault.EMPTY_PROMPT
                raise RowError(fault, f"turn {number + 1} of {len(self.turns)} ({turn.role}) is empty")
            if turn.role is not Role.SYSTEM:
                expected = Role.USER if turn.role is Role.ASSISTANT else Role.ASSISTANT
        if not self.turns or self.turns[-1].role is not Role.ASSISTANT:
            raise RowError(Fault.NO_ANSWER, f"expected an answer at the end, found {self._roles()}")

    def _check_role(self, number: int, role: Role, expected: Role) -> None:
        if role is Role.SYSTEM and number:
            raise RowError(Fault.SYSTEM_NOT_FIRST, f"turn {number + 1} of {len(self.turns)} is a system turn")
        if role in (Role.SYSTEM, expected):
            return
        is_first = not any(turn.role is not Role.SYSTEM for turn in self.turns[:number])
        if is_first:
            raise RowError(Fault.STARTS_WITH_ANSWER, f"expected the user first, found {self._roles()}")
        raise RowError(
            Fault.SAME_ROLE_TWICE, f"turns {number} and {number + 1} of {len(self.turns)} are both of the {role}"
        )

    def _roles(self) -> str:
        roles = ", ".join(turn.role for turn in self.turns[:_SHOWN]) or "no turn"
        return f"{roles}, ..." if len(self.turns) > _SHOWN else roles
