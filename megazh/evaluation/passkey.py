"""Passkey retrieval: five digits are hidden in a long text, and the model is asked for them (arXiv 2305.16300)."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megazh.errors import UsageError
from megazh.evaluation.filler import Filler, Language, made_up
from megazh.progress import Progress

LENGTHS = (1024, 2048, 4096, 8192)
"""Usual lengths of a prompt in tokens, answer included."""
DEPTHS = (0, 25, 50, 75, 100)
"""Usual places of the passkey, in percent of the filler that stands in front of it."""
ANSWER_TOKENS = 16
"""Tokens that an answer may have."""
_SPARE = 1.25
"""Filler that is made, relative to the room for it, since sentences by themselves may have more tokens."""

Encode = Callable[[str], Sequence[int]]
Answer = Callable[[Sequence[str]], Sequence[str]]
"""Function from prompts to the texts that go on from them."""


@dataclass(frozen=True)
class _Words:
    task: str
    needle: str
    question: str


_WORDS = {
    Language.CHINESE: _Words(
        "下面很长的文字里藏着一个重要的密码。请找到它，并记住它，最后会问到这个密码。\n",
        "密码是{key}。请记住，{key}就是密码。",
        "\n密码是多少？密码是",
    ),
    Language.ENGLISH: _Words(
        "There is an important pass key hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
        "you about the pass key at the end.\n",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "\nWhat is the pass key? The pass key is",
    ),
}


@dataclass(frozen=True)
class Question:
    """A prompt with a hidden passkey."""

    language: Language
    length: int
    """Tokens that the prompt and its answer may have."""
    depth: int
    """Share of the filler in front of the passkey, in percent."""
    key: str
    """The passkey, five digits."""
    prompt: str
    tokens: int
    """Tokens of the prompt."""


@dataclass(frozen=True)
class Answered:
    """A question with its answer."""

    question: Question
    answer: str

    @property
    def right(self) -> bool:
        """Whether the first number in the answer is the passkey."""
        found = re.search(r"[0-9]+", self.answer)
        return found is not None and found[0] == self.question.key


def question(
    encode: Encode, language: Language, length: int, depth: int, seed: int, number: int, filler: Filler = made_up
) -> Question:
    """Make a question: a pure function of its arguments.

    The prompt is at most one sentence shorter than `length` - `ANSWER_TOKENS` tokens.

    Args:
        encode: gives the token ids of a text.
        language, length, depth: see `Question`.
        seed, number: decide passkey and filler.
        filler: makes the text around the passkey.

    Raises:
        UsageError: the length is too short for the question alone.
    """
    draw = random.Random(f"{seed}/{language}/{length}/{depth}/{number}")  # hashed, the same in every process
    words, room = _WORDS[language], length - ANSWER_TOKENS
    key = str(draw.randrange(10_000, 100_000))

    def prompt_of(sentences: Sequence[str]) -> str:
        before = round(len(sentences) * depth / 100)
        text = [*sentences[:before], words.needle.format(key=key), *sentences[before:]]
        return words.task + language.joint.join(text) + words.question

    needed = len(encode(prompt_of([])))
    if needed > room:
        raise UsageError(
            f"--lengths {length}: the question alone has {needed} tokens, and its answer may have {ANSWER_TOKENS}; "
            f"give {needed + ANSWER_TOKENS} or more"
        )
    sentences, guessed = list[str](), needed
    for sentence in filler(language, draw):
        if key in sentence:
            continue
        sentences.append(sentence)
        guessed += max(len(encode(language.joint + sentence)), 1)
        if guessed > room * _SPARE:
            break
    # Sentences together have another number of tokens than each by itself: look for the largest number that fits.
    fitting, tokens, too_many, each = 0, needed, len(sentences) + 1, (guessed - needed) / len(sentences)
    while too_many - fitting > 1:
        tried = fitting + min(max(round((room - tokens) / each), 1), too_many - fitting - 1)
        found = len(encode(prompt_of(sentences[:tried])))
        each = max((found - needed) / tried, 1.0)
        if found > room:
            too_many = tried
        else:
            fitting, tokens = tried, found
    return Question(language, length, depth, key, prompt_of(sentences[:fitting]), tokens)


def questions(
    encode: Encode,
    languages: Sequence[Language],
    lengths: Sequence[int],
    depths: Sequence[int],
    tries: int,
    seed: int,
    filler: Filler = made_up,
) -> Iterator[Question]:
    """Yield `tries` questions for each language, length and depth, shortest first. Raises UsageError as `question`."""
    for length in sorted(lengths):
        for language in languages:
            for depth in depths:
                for number in range(tries):
                    yield question(encode, language, length, depth, seed, number, filler)


def ask(asked: Iterable[Question], total: int, answer: Answer, batch_size: int = 1) -> list[Answered]:
    """Put questions to a model, several at a time; shows progress.

    Args:
        asked: the questions.
        total: sum of their lengths.
        answer: the model.
        batch_size: number of questions at a time.
    """
    found: list[Answered] = []
    left = iter(asked)
    with Progress("passkey", total, unit="tok") as progress:
        while batch := list(itertools.islice(left, batch_size)):
            answers = answer([each.prompt for each in batch])
            found += [Answered(each, text) for each, text in zip(batch, answers, strict=True)]
            progress.advance(sum(each.length for each in batch))
    return found


def table(answered: Sequence[Answered]) -> Iterator[str]:
    """Lines of a table of length and depth for each language: right answers of those asked."""
    depths = sorted({each.question.depth for each in answered})
    for language in dict.fromkeys(each.question.language for each in answered):
        own = [each for each in answered if each.question.language is language]
        yield _row(f"{language}, depth", [*(f"{depth} %" for depth in depths), "all"])
        for length in sorted({each.question.length for each in own}):
            row = [each for each in own if each.question.length == length]
            cells = [[each for each in row if each.question.depth == depth] for depth in depths]
            yield _row(f"{length:,}", [_tally(cell) for cell in [*cells, row]])


def _row(head: str, cells: Sequence[str]) -> str:
    return f"{head:>12}" + "".join(f"{cell:>9}" for cell in cells)


def _tally(answered: Sequence[Answered]) -> str:
    return f"{sum(each.right for each in answered)}/{len(answered)}"


def as_json(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """The questions, without their prompts, with their answers."""
    return [
        {
            **{name: value for name, value in asdict(each.question).items() if name != "prompt"},
            "answer": each.answer,
            "right": each.right,
        }
        for each in answered
    ]
