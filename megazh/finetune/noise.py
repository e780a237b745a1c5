"""Noise on questions: characters dropped or repeated, as people do who type in haste."""

import random
import re
from dataclasses import dataclass, replace

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.errors import UsageError

_ASCII_CODE = r"[\x21-\x7e]*[{}()\[\]<>=_\\/;#$&*+|~^@:][\x21-\x7e]*"
# What noise would make into something else: code, numbers, addresses, special strings.
_KEPT = re.compile(
    r"```.*?(?:```|\Z)"  # fenced code
    r"|`[^`\n]*`"
    r"|^(?: {4}|\t)[^\n]*"  # indented code
    r"|<\|[^|\n]*\|>"
    rf"|{_ASCII_CODE}"
    r"|[0-9零〇一二三四五六七八九十百千万亿两]+",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Noise:
    """Noise on the turns of the user. A pure function of its values, the conversation's number and the copy.

    Letters (Chinese characters are letters) are dropped or repeated; everything else stays, and so do letters in code,
    numbers, addresses and special strings. A turn of letters alone keeps at least one of them.

    Raises:
        UsageError: a value is no probability.
    """

    probability: float = 0.15
    """Probability that a turn has noise: letters dropped in one half of the cases, repeated in the other."""
    drop: float = 0.1
    """Probability that a letter is dropped, where letters are."""
    repeat: float = 0.1
    """Probability that a letter comes twice, where letters do."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probability", "drop", "repeat"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"noise: {name} {getattr(self, name):g}: expected a probability from 0 to 1")

    def on(self, conversation: Conversation, number: int, copy: int) -> Conversation:
        """A conversation with noise.

        Args:
            conversation: the conversation.
            number: what tells it from others, such as a hash of its texts.
            copy: which copy of it this is: that of an epoch.
        """
        return replace(
            conversation, turns=tuple(self._turn(turn, at, number, copy) for at, turn in enumerate(conversation.turns))
        )

    def _turn(self, turn: Turn, at: int, number: int, copy: int) -> Turn:
        draw = random.Random(f"noise/{self.seed}/{number}/{copy}/{at}")
        if turn.role is not Role.USER or draw.random() >= self.probability:
            return turn
        drops = draw.random() < 0.5
        rate, times = (self.drop, 0) if drops else (self.repeat, 2)
        pieces, place = [], 0
        for kept in _KEPT.finditer(turn.text):
            pieces += [_noised(turn.text[place : kept.start()], rate, times, draw), kept.group()]
            place = kept.end()
        text = "".join([*pieces, _noised(turn.text[place:], rate, times, draw)])
        return replace(turn, text=text) if text.strip() else turn


def _noised(text: str, rate: float, times: int, draw: random.Random) -> str:
    return "".join(letter * times if letter.isalpha() and draw.random() < rate else letter for letter in text)
