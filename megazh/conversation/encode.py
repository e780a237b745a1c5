"""Conversations as token ids, with a mask of the trained ones that is exact at every boundary.

Each segment of a template is encoded by itself. A mask by the length of the encoded prompt would be wrong wherever a
tokenizer merges the last characters of a prompt with the first ones of an answer, as Qwen's does with `:\\n` and `\\n`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megazh.conversation.conversation import Conversation
from megazh.conversation.template import DEFAULT, Template, load_template
from megazh.errors import UsageError
from megazh.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation."""

    ids: npt.NDArray[np.int32]
    """(tokens,) int32."""
    trained: npt.NDArray[np.bool_]
    """(tokens,) whether the loss covers a token, as the one to be predicted."""

    def __len__(self) -> int:
        return len(self.ids)


def template_for(tokenizer: Tokenizer, given: str = DEFAULT) -> Template:
    """The template of a name or in a file, with the end token and the control tokens of a tokenizer.

    Raises:
        UsageError: as `load_template`; or the tokenizer lacks a control token that the template puts into text.
    """
    return _checked(load_template(given, tokenizer.eod, _controls(tokenizer)), tokenizer)


def recorded_template(
    tokenizer: Tokenizer, jinja: str, name: str, eos_token: str | None = None, bos_token: str | None = None
) -> Template:
    """The template of a text that was recorded with a model; errors as of `template_for`.

    Args:
        tokenizer: the tokenizer of the model.
        jinja: the template.
        name: its name, for messages.
        eos_token: value of `eos_token` in it. Default: the tokenizer's end of a document.
        bos_token: value of `bos_token` in it. Default: none.
    """
    return _checked(Template(jinja, name, eos_token or tokenizer.eod, _controls(tokenizer), bos_token), tokenizer)


def _checked(template: Template, tokenizer: Tokenizer) -> Template:
    known = _controls(tokenizer)
    missing = [token for token in template.controls if token not in known]
    if missing:
        raise UsageError(
            f"template {template.name}: {tokenizer.path} has no control token {', '.join(missing)}; take the template "
            "human-assistant, which needs none but the end of a document, or a tokenizer that has it ('megazh "
            "tokenizer train' makes one)"
        )
    return template


def encode(conversation: Conversation, template: Template, tokenizer: Tokenizer, for_answer: bool = False) -> Encoded:
    """Encode a conversation, segment by segment.

    Control tokens stand only where the template puts them: their strings in the text of turns are ordinary text.

    Args:
        conversation: turns that end with an answer or, with `for_answer`, with a question.
        template: a template made by `template_for` of the same tokenizer.
        tokenizer: the tokenizer.
        for_answer: whether the beginning of an answer follows. The ids are then a prefix of those of the conversation
            with the answer.

    Raises:
        RowError: the template has no place for the conversation; see `Template.segments`.
    """
    controls = _controls(tokenizer)
    ids: list[int] = []
    trained: list[bool] = []
    for segment in template.segments(conversation, for_answer):
        if segment.special is None:
            # The template's own texts are few, and come again in every conversation.
            few = len(segment.text) < _SHORT
            found = _short(tokenizer, segment.text) if few else tuple(tokenizer.encode(segment.text))
        else:
            found = (controls[segment.special],)
        ids += found
        trained += [segment.trained] * len(found)
    return Encoded(np.array(ids, np.int32), np.array(trained, np.bool_))


def stop_id(template: Template, tokenizer: Tokenizer) -> int:
    """Id of the token that ends an answer. Arguments as of `encode`."""
    return _controls(tokenizer)[template.stop]


_SHORT = 32  # characters


@lru_cache(maxsize=1 << 14)
def _short(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


@lru_cache(maxsize=8)
def _controls(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the control tokens by their text."""
    return {tokenizer.piece(number): number for number in sorted(tokenizer.control_ids)}
