"""Chat templates: one jinja text for training, preview, sampling, chat and export.

A template is rendered as `transformers` renders it: in jinja's immutable sandbox, with `messages` (`role`, `content`),
`add_generation_prompt`, `eos_token` and, where there is one, `bos_token`. What belongs to whom follows from the
rendering itself: the template is rendered with a mark in place of each turn's text, and what stands between the marks
is the template's own.
"""

import contextlib
import re
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.faults import RowError
from megazh.errors import UsageError

CHATML = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HUMAN_ASSISTANT = (
    "{% for message in messages %}"
    r"{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    r"{% elif message['role'] == 'user' %}{{ 'Human:\n' + message['content'] + '\n' }}"
    r"{% else %}{{ 'Assistant:\n' + message['content'] + '\n' + eos_token }}{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML, "human-assistant": HUMAN_ASSISTANT}
"""Templates by name. `human-assistant` needs no control token but the end of a document, which ends answers."""
DEFAULT = "chatml"
END_OF_TEXT = "<|endoftext|>"

_MARK = re.compile("\ue000([0-9]+)\ue001")
_CONTROL = r"<\|[^<>|\s]+\|>"
_PROBE = "问"
_SECONDS = 10  # in which a template has to try itself; others take milliseconds
_MOST_OWN = 1 << 20  # characters of a template's own in a conversation


class TemplateFault(StrEnum):
    """Why a template has no place for a conversation."""

    REFUSED = "refused by the template"
    CHANGED = "changed by the template"
    """The template leaves out, repeats or rewrites a turn, so that its tokens cannot be found again."""


@dataclass(frozen=True)
class Segment:
    """A run of the rendered text that is encoded by itself."""

    text: str
    special: str | None = None
    """The control token that the text is; None for ordinary text."""
    trained: bool = False
    """Whether the loss covers its tokens."""


class Template:
    """A chat template.

    The trained segments are those of an answer and of what follows it up to its end token, the first control token of
    the template behind the answer.

    Args:
        jinja: the template.
        name: its name, for messages.
        eos_token: value of `eos_token` in the template.
        bos_token: value of `bos_token` in the template; None where its tokenizer names none.
        controls: control tokens of the tokenizer. In the template's own text, these, `eos_token` and whatever is
            written like `<|...|>` are control tokens; in the text of turns nothing is.

    Attributes:
        jinja: the template's text, for export as `chat_template`.
        stop: control token that ends an answer.
        warnings: what the template cannot do, for the person at the terminal.

    Raises:
        UsageError: it is no jinja, leaves turns out, puts no end token after an answer, or begins an answer otherwise
            than training text does.
    """

    def __init__(
        self,
        jinja: str,
        name: str = "template",
        eos_token: str = END_OF_TEXT,
        controls: Collection[str] = (),
        bos_token: str | None = None,
    ) -> None:
        self.jinja, self.name = jinja, name
        self._special = {"eos_token": eos_token} | ({} if bos_token is None else {"bos_token": bos_token})
        strings = sorted({*controls, *self._special.values()}, key=lambda text: (-len(text), text))
        self._controls = re.compile(f"({'|'.join([*map(re.escape, strings), _CONTROL])})")
        self.warnings: list[str] = []
        self._compiled = self._compile()
        with _time_limit():
            self.stop = self._probe()

    def _compile(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from megazh.conversation.jinja_tags import Generation

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.jinja)
        except Exception as error:  # also RecursionError and SyntaxError, where it is nested too deeply
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"template {self.name}: not a jinja template: {reason}; correct it") from None

    def render(self, conversation: Conversation, for_answer: bool = False) -> str:
        """The text of a conversation, as `apply_chat_template` of `transformers` gives it.

        Args:
            conversation: any turns; they are not checked.
            for_answer: whether the beginning of an answer follows (`add_generation_prompt`).

        Raises:
            RowError: the template refuses the conversation.
        """
        return self._render([(turn.role, turn.text) for turn in conversation.turns], for_answer)

    def _render(self, turns: Sequence[tuple[Role, str]], for_answer: bool) -> str:
        messages = [{"role": role.value, "content": text} for role, text in turns]
        left = _MOST_OWN + sum(len(text) for _, text in turns)
        pieces = []
        try:
            for piece in self._compiled.generate(messages=messages, add_generation_prompt=for_answer, **self._special):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise ValueError(f"it writes more than {_MOST_OWN:,} characters of its own")
        except Exception as error:  # whatever the code in the template raises
            reason = str(error) or type(error).__name__
            raise RowError(TemplateFault.REFUSED, f"template {self.name}: {reason}") from None
        return "".join(pieces)

    def segments(self, conversation: Conversation, for_answer: bool = False) -> list[Segment]:
        """The rendered text in segments; joined, they are what `render` gives.

        Args:
            conversation: turns that end with an answer or, with `for_answer`, with a question.
            for_answer: whether the beginning of an answer follows: the prompt of a chat.

        Raises:
            RowError: the template refuses the conversation, or changes the text of a turn (beyond white space at its
                ends, which some templates remove; the segments lack it, too).
        """
        turns = conversation.turns
        marked = self._render([(turn.role, f"\ue000{at}\ue001") for at, turn in enumerate(turns)], for_answer)
        own = _MARK.split(marked)  # text, number, text, number, ..., text
        if own[1::2] != [str(at) for at in range(len(turns))]:
            raise RowError(TemplateFault.CHANGED, f"template {self.name} leaves out, repeats or reorders turns")
        rendered = self.render(conversation, for_answer)
        for texts in ([turn.text for turn in turns], [turn.text.strip() for turn in turns]):
            found = self._assemble(turns, texts, own[::2])
            if "".join(segment.text for segment in found) == rendered:
                return found
        raise RowError(TemplateFault.CHANGED, f"template {self.name} changes the text of a turn")

    def _assemble(self, turns: Sequence[Turn], texts: Sequence[str], own: Sequence[str]) -> list[Segment]:
        """Segments of the texts of turns, and of the template's own text before, between and after them."""
        found = self._own_segments(own[0], trained=False)
        for turn, text, after in zip(turns, texts, own[1:], strict=True):
            trained = turn.role is Role.ASSISTANT and turn.trained
            found.append(Segment(text, trained=trained))
            found += self._own_segments(after, trained)
        return [segment for segment in found if segment.text]

    def _own_segments(self, text: str, trained: bool) -> list[Segment]:
        """Segments of text of the template; trained up to the first control token."""
        found = []
        for at, part in enumerate(self._controls.split(text)):
            is_control = at % 2 == 1
            if part:
                found.append(Segment(part, part if is_control else None, trained))
            trained = trained and not is_control
        return found

    def _probe(self) -> str:
        """Try the template on a conversation of two questions; returns the end token of answers."""
        turns = (Turn(Role.USER, _PROBE), Turn(Role.ASSISTANT, _PROBE)) * 2
        try:
            whole = self.segments(Conversation(turns))
            prompts = [self.segments(Conversation(turns[:length]), for_answer=True) for length in (1, 3)]
        except RowError as error:
            raise UsageError(f"{error}, in a conversation of two questions and two answers; correct it") from None
        ends = [segment.special for segment in whole if segment.trained and segment.special]
        if len(ends) != 2 or len(set(ends)) != 1 or ends[0] is None:
            raise UsageError(
                f"template {self.name}: no end token after an answer, so a model would not learn to stop; put "
                "{{ eos_token }} or another control token directly after the content of an assistant's message"
            )
        for prompt in prompts:
            begun = [(segment.text, segment.special) for segment in whole[: len(prompt)]]
            asked = [(segment.text, segment.special) for segment in prompt]
            # The answer itself comes next in the whole.
            if asked != begun or whole[len(prompt) - 1].trained or not whole[len(prompt)].trained:
                raise UsageError(
                    f"template {self.name}: with add_generation_prompt it does not begin an answer as it begins those "
                    "of a whole conversation, so a model would be asked otherwise than it was trained; correct it"
                )
        try:
            self.segments(Conversation((Turn(Role.SYSTEM, _PROBE), *turns)))
        except RowError:
            self.warnings.append(f"template {self.name} has no place for a system turn; such conversations are dropped")
        return ends[0]

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Control tokens that the template puts into a conversation, in their order there."""
        turns = (Turn(Role.USER, _PROBE), Turn(Role.ASSISTANT, _PROBE)) * 2
        return tuple(dict.fromkeys(s.special for s in self.segments(Conversation(turns)) if s.special))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer than `_SECONDS`; Python can do so in the main thread only."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"it does not end within {_SECONDS} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load_template(given: str, eos_token: str = END_OF_TEXT, controls: Collection[str] = ()) -> Template:
    """The built-in template of a name, or the one in a file. For the other arguments see `Template`.

    Raises:
        UsageError: there is neither, the file is not UTF-8, or as `Template`.
    """
    if given in BUILT_IN:
        return Template(BUILT_IN[given], given, eos_token, controls)
    try:
        text = Path(given).read_text(encoding="utf-8-sig")  # a mark of byte order would be text of every conversation
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        names = ", ".join(BUILT_IN)
        raise UsageError(f"--template {given}: neither {names} nor a file that can be read: {reason}") from None
    return Template(text, given, eos_token, controls)
