"""Data of the demo of fine-tuning: generated questions to train on, and others with which to try a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from megazh.conversation.conversation import Conversation
from megazh.conversation.encode import template_for
from megazh.conversation.forms import conversation_of
from megazh.conversation.registry import DataSet
from megazh.demo.questions import Row, long_question, question, write_questions
from megazh.errors import UsageError
from megazh.finetune.conversion_folder import MANIFEST
from megazh.finetune.convert import Request, convert
from megazh.finetune.fit import Fitting, TooLong
from megazh.tokenizer import Tokenizer

SEED = 1
ANSWER_TOKENS = 24
"""Largest number of tokens of an answer; the longest right one has about half of them."""


@dataclass(frozen=True)
class Questions:
    """A kind of questions.

    Attributes:
        name: name of the data set.
        make: question of a number.
        trained: number of questions to train on: the first ones.
        tried: number of other questions to try a model on.
    """

    name: str
    make: Callable[[int], Row]
    trained: int
    tried: int

    def training_rows(self) -> Iterator[Row]:
        """The questions to train on."""
        return map(self.make, range(self.trained))

    def held_out(self) -> list[Conversation]:
        """The questions to try a model on: later numbers, of which no text is that of a question to train on."""
        known = {_asked(row) for row in self.training_rows()}
        others = (row for row in map(self.make, count(self.trained)) if _asked(row) not in known)
        return [conversation_of(row).conversation for row in islice(others, self.tried)]


SHORT = Questions("questions", lambda number: question(SEED, number), trained=34_000, tried=200)
LONG = Questions("long_questions", lambda number: long_question(SEED, number, 500), trained=1_200, tried=100)
"""Conversations of about 900 tokens; the answer to their last question stands at their beginning, or near."""


def _asked(row: Row) -> str:
    """All that was told and asked before the last answer."""
    return "\n".join([text for turn in row.get("history", []) for text in turn] + [row["instruction"]])


def prepare(
    questions: Questions, manifest: Path, tokenizer: Tokenizer, max_tokens: int, say: Callable[[str], None]
) -> None:
    """Write the questions to train on beside the folder of `manifest`, and convert them into that folder.

    Args:
        questions: the questions.
        manifest: path of the manifest; nothing is done where it is there already.
        tokenizer: tokenizer of the base model.
        max_tokens: largest number of tokens of a conversation; the few that are longer are dropped.
        say: called with each line for the person at the terminal.

    Raises:
        UsageError: the name of `manifest` is not that of a conversion's.
        WriteError: a file cannot be written.
    """
    if manifest.is_file():
        return
    if manifest.name != MANIFEST:
        raise UsageError(f"data.manifest={manifest}: the demo makes FOLDER/{MANIFEST}; leave the setting out")
    folder = manifest.parent
    rows = folder.with_name(f"{folder.name}.jsonl")
    write_questions(rows, questions.training_rows())
    fitting = Fitting(template_for(tokenizer), tokenizer, max_tokens=max_tokens, too_long=TooLong.DROP)
    say(f"questions: {questions.trained:,}: {rows}")
    convert(Request([DataSet(questions.name, (str(rows),))], fitting, folder, validation=0.02, seed=SEED), say)
