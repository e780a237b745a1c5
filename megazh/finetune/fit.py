"""A conversation as training takes it: which answers are trained, and what becomes of one that is too long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import Encoded, encode
from megazh.conversation.faults import RowError
from megazh.conversation.template import Template
from megazh.errors import UsageError
from megazh.tokenizer import Tokenizer


class Train(StrEnum):
    """Answers of a conversation that are trained."""

    ALL = "all"
    LAST_TURN = "last_turn"
    """The last answer only."""


class TooLong(StrEnum):
    """What becomes of a conversation that is too long."""

    CUT = "cut"
    """It ends with the last answer that is whole within the limit; dropped where not even the first answer is."""
    DROP = "drop"


class Drop(StrEnum):
    """Why a conversation gives no sample."""

    TOO_LONG = "too long"
    NOTHING_TRAINED = "nothing to train"
    """Every answer has weight 0."""
    BEHIND_A_BREAK = "file broken off"
    """What stands behind the break of damaged files; counted once, since nobody knows how many they are."""


@dataclass(frozen=True)
class Fitted:
    """A conversation as it is trained on."""

    conversation: Conversation
    """The turns that are left."""
    encoded: Encoded
    """Ends with the end of a document, which is not trained unless the template itself puts it behind an answer."""
    whole: int
    """Number of tokens of the whole conversation."""

    @property
    def is_cut(self) -> bool:
        """Whether turns at its end were left out."""
        return len(self.encoded) < self.whole


class Fitting:
    """Fits conversations into samples.

    Args:
        template: a template made by `template_for` of the same tokenizer.
        tokenizer: the tokenizer.
        train: the answers that are trained. An answer with weight 0 never is.
        max_tokens: largest number of tokens of a conversation; None for any number.
        too_long: what becomes of a longer one.

    Raises:
        UsageError: `max_tokens` is below 2.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        train: Train = Train.ALL,
        max_tokens: int | None = None,
        too_long: TooLong = TooLong.CUT,
    ) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise UsageError(f"--max-tokens {max_tokens}: expected at least 2")
        self.template, self.tokenizer = template, tokenizer
        self.train, self.max_tokens, self.too_long = train, max_tokens, too_long

    def fit(self, conversation: Conversation) -> Fitted:
        """The conversation as it is trained on.

        Args:
            conversation: whole, as `Conversation.check` wants it.

        Raises:
            RowError: it gives no sample; the fault is a `Drop` or a `TemplateFault`.
        """
        fitted = self._encoded(conversation.turns)
        limit = self.max_tokens
        if limit is not None and len(fitted.encoded) > limit:
            fitted = self._cut(conversation, len(fitted.encoded), limit)
        if not fitted.encoded.trained.any():
            raise RowError(Drop.NOTHING_TRAINED, "every answer has weight 0")
        return fitted

    def _cut(self, conversation: Conversation, length: int, limit: int) -> Fitted:
        """The longest beginning that ends with an answer and has at most `limit` tokens."""
        fault = RowError(Drop.TOO_LONG, f"{length:,} tokens, and at most {limit:,} are taken")
        if self.too_long is TooLong.DROP:
            raise fault
        turns = conversation.turns
        ends = [at + 1 for at, turn in enumerate(turns) if turn.role is Role.ASSISTANT]
        found, fits, reaches = None, 0, len(ends) - 1  # ends[:fits] fit, ends[reaches:] do not
        while fits < reaches:
            middle = (fits + reaches) // 2
            fitted = self._encoded(turns[: ends[middle]])
            if len(fitted.encoded) <= limit:
                found, fits = replace(fitted, whole=length), middle + 1
            else:
                reaches = middle
        if found is None:
            raise fault
        return found

    def _encoded(self, turns: Sequence[Turn]) -> Fitted:
        if self.train is Train.LAST_TURN:
            turns = [*(replace(turn, trained=False) for turn in turns[:-1]), turns[-1]]
        left = Conversation(tuple(turns))
        encoded = _ended(encode(left, self.template, self.tokenizer), self.tokenizer.eod_id)
        return Fitted(left, encoded, len(encoded))


def _ended(encoded: Encoded, end: int) -> Encoded:
    """The tokens of a document, which ends with the id `end`."""
    if encoded.ids[-1] == end:
        return encoded
    return Encoded(np.append(encoded.ids, np.int32(end)), np.append(encoded.trained, False))
