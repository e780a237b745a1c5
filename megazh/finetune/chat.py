"""A chat with a model: its history, its prompts as the model was trained on them, and what becomes of old turns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import encode, stop_id
from megazh.conversation.faults import RowError
from megazh.conversation.template import Template
from megazh.errors import UsageError
from megazh.model.generate import PrefixCache, generate
from megazh.model.sampling import SamplingOptions
from megazh.tokenizer.stream import TextStream
from megazh.training.text_model import TextModel

_ROOM = 4
"""Share of the context, as its divisor, that is kept free for an answer (less for shorter answers)."""


class End(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model ended it."""
    MAX_TOKENS = "max_tokens"
    """It has as many tokens as were allowed."""
    CONTEXT = "context"
    """The context is full."""
    INTERRUPTED = "interrupted"
    """The user ended it."""


@dataclass(frozen=True)
class ChatOptions:
    """How answers are made; may change from answer to answer."""

    sampling: SamplingOptions
    max_tokens: int = 512
    """Largest number of tokens of an answer."""
    seed: int = 0
    """Seed of the first answer; each later one has the next number."""


class ChatModel:
    """A model that answers conversations, one at a time.

    Args:
        model: the model.
        template: its chat template, made for its tokenizer.
        context: largest number of tokens of a prompt with its answer. Default: what the model was trained on.
        graphs: see `megazh.model.decode.Decoding`.
    """

    def __init__(
        self, model: TextModel, template: Template, context: int | None = None, graphs: bool | None = None
    ) -> None:
        self.template, self.tokenizer = template, model.tokenizer
        self.context = context or model.trained_length
        self.stop_ids = model.end_ids | {stop_id(template, model.tokenizer)}
        """Ids that end an answer: the template's end token, and those that end the model's other texts."""
        self._model = model.model
        self._cache = PrefixCache(model.model, self.context, graphs)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of turns that end with a question, and of the beginning of an answer: a prefix of the training ids.

        Raises:
            UsageError: the template has no place for the turns.
        """
        try:
            ids: list[int] = encode(
                Conversation(tuple(turns)), self.template, self.tokenizer, for_answer=True
            ).ids.tolist()
        except RowError as error:
            raise UsageError(str(error)) from None
        return ids

    def tokens(self, prompt: Sequence[int], count: int, options: ChatOptions) -> Iterator[int]:
        """Yield the ids of the answer to a prompt, up to one of `stop_ids`, which is not yielded, or `count` ids."""
        forward = self._cache.forward(len(prompt) + count)
        size = self.tokenizer.vocab_size
        yield from generate(forward, prompt, count, options.sampling, size, self.stop_ids, options.seed)


class Answer:
    """An answer that is being written: iterate over its pieces of text, which hold whole characters only.

    Question and answer join the history when the iteration ends, however it ends, unless the answer is empty.

    Attributes:
        question: the text that it answers.
        forgotten: number of oldest turns that no longer fit into the context, and are left out from now on.
        tokens: number of tokens so far.
        text: the text so far, without characters that are not complete.
        end: why it ended; None until then.
    """

    def __init__(self, chat: "Chat", question: str, prompt: list[int], options: ChatOptions, forgotten: int) -> None:
        self._chat, self._prompt, self._options = chat, prompt, options
        self.question, self.forgotten = question, forgotten
        self.text, self.tokens = "", 0
        self.end: End | None = None
        self.interrupted = False
        """Whether the user has ended it."""

    def interrupt(self) -> None:
        """End the answer after the token that is being computed. May be called from a signal handler or a thread."""
        self.interrupted = True

    def __iter__(self) -> Iterator[str]:
        model, options = self._chat.model, self._options
        room = model.context - len(self._prompt)
        count = min(options.max_tokens, room)
        stream = TextStream(model.tokenizer)
        end = End.INTERRUPTED
        try:
            for token in model.tokens(self._prompt, count, options):
                self.tokens += 1
                piece = stream.put(token)
                self.text += piece
                yield piece
                if self.interrupted:
                    break
            else:
                end = End.STOP if self.tokens < count else End.CONTEXT if count == room else End.MAX_TOKENS
            rest = stream.end()
            self.text += rest
            yield rest
        finally:
            self.end = end
            self._chat._add(self)


class Chat:
    """A conversation with a model.

    Args:
        model: the model.
        system: text of the system turn, if any.

    Raises:
        UsageError: see `set_system`.
    """

    def __init__(self, model: ChatModel, system: str | None = None) -> None:
        self.model = model
        self.turns: list[Turn] = []
        """All turns but the system turn, those that were forgotten included."""
        self.system: str | None = None
        self._first = 0  # of the turns that the model still sees
        self._last: Answer | None = None
        self._answers = 0
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Set the system turn, which the model sees from the next question on; None removes it.

        Raises:
            UsageError: it has no text, does not fit into the context, or the template has no place for it.
        """
        if text is not None:
            _check_text(text, "the system turn")
            self._check_fits([Turn(Role.SYSTEM, text), Turn(Role.USER, "。")], "the system turn")
        self.system = text

    def reset(self) -> None:
        """Forget all turns; the system turn stays."""
        self.turns, self._first, self._last = [], 0, None

    def ask(self, text: str, options: ChatOptions) -> Answer:
        """Ask a question; the answer is computed as it is iterated over.

        Where the conversation has become too long for the context, the model no longer sees the oldest turns.

        Raises:
            UsageError: the question has no text, or is too long by itself; the history is as before.
        """
        _check_text(text, "the message")
        question = Turn(Role.USER, text)
        self._check_fits([*self._system_turn(), question], "the message")
        room, before = min(options.max_tokens, self.model.context // _ROOM), self._first
        while len(prompt := self._prompt(question)) + room > self.model.context and self._first < len(self.turns):
            self._first += 2
        options = replace(options, seed=options.seed + self._answers)
        self._answers += 1
        self._last = Answer(self, text, prompt, options, self._first - before)
        return self._last

    def retry(self, options: ChatOptions) -> Answer:
        """Ask the last question again, in place of its answer.

        Raises:
            UsageError: nothing was asked yet, or as `ask`.
        """
        if self._last is None:
            raise UsageError("nothing was asked yet")
        before = self.turns, self._first
        if self._last.text.strip():
            self.turns = self.turns[:-2]
            self._first = min(self._first, len(self.turns))
        try:
            return self.ask(self._last.question, options)
        except UsageError:
            self.turns, self._first = before
            raise

    def interrupt(self) -> None:
        """Interrupt the answer that is being written, if any; see `Answer.interrupt`."""
        if self._last is not None:
            self._last.interrupt()

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation as `role` and `content` of each turn."""
        return [{"role": turn.role.value, "content": turn.text} for turn in (*self._system_turn(), *self.turns)]

    def spoken(self) -> list[dict[str, str]]:
        """As `messages`, without the system turn."""
        return self.messages()[len(self._system_turn()) :]

    def _add(self, answer: Answer) -> None:
        if answer.text.strip():
            self.turns += [Turn(Role.USER, answer.question), Turn(Role.ASSISTANT, answer.text)]

    def _prompt(self, question: Turn) -> list[int]:
        return self.model.prompt([*self._system_turn(), *self.turns[self._first :], question])

    def _system_turn(self) -> list[Turn]:
        return [] if self.system is None else [Turn(Role.SYSTEM, self.system)]

    def _check_fits(self, turns: list[Turn], what: str) -> None:
        count, context = len(self.model.prompt(turns)), self.model.context
        if count >= context:
            raise UsageError(
                f"{what} has {count:,} tokens with all that the template puts around it, and the model takes "
                f"{context:,} at a time: give a shorter one"
            )


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise UsageError(f"{what} is empty: give at least one character")
    if any("\ud800" <= each <= "\udfff" for each in text):  # surrogates stand for bytes that are not UTF-8
        raise UsageError(f"{what} is not valid UTF-8: set the terminal to UTF-8")
