"""A chat in the terminal, with commands and line editing, and one through a pipe."""

import contextlib
import json
import locale
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from megazh.errors import INTERRUPTED, UsageError, WriteError
from megazh.files import write_atomic
from megazh.finetune.chat import Answer, Chat, ChatOptions
from megazh.finetune.chat_notes import ended, forgotten

PROMPT = "> "
HELP = """\
/reset          begin a new conversation; the system turn stays
/system TEXT    set the system turn; without TEXT, remove it
/retry          answer the last message again
/save FILE      write the conversation as a row of messages (JSONL), as data sets for fine-tuning have them
/help           show these lines
/exit           end the chat; so does Ctrl-D, or Ctrl-C twice
Ctrl-C interrupts an answer. A pasted text of several lines is one message. // begins a message that begins with /."""

_PASTED_SECONDS = 0.02  # within which further lines belong to a paste, where the terminal does not mark its end
_SHOWN = str.maketrans({**dict.fromkeys((*range(32), *range(127, 160)), "�"), "\n": "\n", "\t": "\t", "\r": ""})
"""Control characters in an answer could change what the terminal does."""


class TerminalChat:
    """A chat with a person at a terminal.

    Args:
        chat: the chat.
        options: how answers are made.
    """

    def __init__(self, chat: Chat, options: ChatOptions) -> None:
        self._chat, self._options = chat, options
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/retry": self._retry, "/save": self._save,
            "/help": self._help,
        }  # fmt: skip

    def run(self, title: str) -> None:
        """Print a title, then read messages and commands until the person ends the chat."""
        print(f"{title}. /help lists commands.")
        read = line_reader()
        interrupted = False
        while True:
            try:
                text = read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                print("(Ctrl-C again, Ctrl-D or /exit ends the chat)")
                continue
            interrupted = False
            if text.strip() == "/exit":
                return
            try:
                self._handle(text)
            except (UsageError, WriteError) as error:  # such as a message that is too long; the chat goes on
                print(f"error: {error}")

    def _handle(self, text: str) -> None:
        word, _, rest = text.strip().partition(" ")
        if not word:
            return
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("//"):
            self._show(self._chat.ask(text.lstrip()[1:], self._options))
        elif word.startswith("/") and "\n" not in text.strip():
            raise UsageError(f"{word}: no command; /help lists them, and a message that begins with / begins with //")
        else:
            self._show(self._chat.ask(text, self._options))

    def _show(self, answer: Answer) -> None:
        if line := forgotten(answer, self._chat):
            print(f"({line})")
        with _interruptible(answer):
            for piece in answer:
                sys.stdout.write(piece.translate(_SHOWN))
                sys.stdout.flush()
        print()
        if line := ended(answer, self._chat):
            print(f"({line})")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        print("(a new conversation)")

    def _system(self, rest: str) -> None:
        self._chat.set_system(rest or None)
        print("(the system turn is set)" if rest else "(no system turn)")

    def _retry(self, rest: str) -> None:
        self._show(self._chat.retry(self._options))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save: give the name of a file")
        if not self._chat.turns:
            raise UsageError("/save: nothing was said yet")
        path = Path(rest).expanduser()
        if path.exists() and path not in self._saved:
            raise UsageError(f"{path}: exists already; give another name")
        row = json.dumps({"messages": self._chat.messages()}, ensure_ascii=False)
        write_atomic(path, f"{row}\n".encode())
        self._saved.add(path)
        print(f"({len(self._chat.turns)} turns written to {path})")

    def _help(self, rest: str) -> None:
        print(HELP)


def chat_by_lines(chat: Chat, options: ChatOptions) -> None:
    """A chat through a pipe: each line of stdin is a message, and stdout gets the answers alone.

    Raises:
        SystemExit: with 2, at the end, where a line was refused.
    """
    refused = False
    for text in sys.stdin:
        if not text.strip():
            continue
        try:
            answer = chat.ask(text.rstrip("\r\n"), options)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            refused = True
            continue
        if line := forgotten(answer, chat):
            print(f"note: {line}", file=sys.stderr)
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print(flush=True)
        if line := ended(answer, chat):
            print(f"note: {line}", file=sys.stderr)
    if refused:
        raise SystemExit(UsageError.exit_code)


@contextlib.contextmanager
def _interruptible(answer: Answer) -> Iterator[None]:
    """Ctrl-C interrupts the answer inside the block; a second one ends the process."""

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if answer.interrupted:
            raise SystemExit(INTERRUPTED)
        answer.interrupt()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def line_reader() -> Callable[[], str]:
    """A function that reads a message from the terminal, with line editing and history where Python has readline.

    A pasted text of several lines is one message.
    """
    # Under LC_ALL=C readline, which looks at the environment, would take each byte for a character.
    locale.setlocale(locale.LC_CTYPE, "")
    if locale.nl_langinfo(locale.CODESET).startswith("ANSI"):
        os.environ["LC_ALL"] = "C.UTF-8"
    try:
        import readline
    except ImportError:
        return _read_paste
    if "GNU" not in (readline.__doc__ or ""):  # libedit knows nothing of pastes
        return _read_paste
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind("tab: tab-insert")
    return lambda: input(PROMPT)


def _read_paste() -> str:
    lines = [input(PROMPT)]
    while select.select([sys.stdin], [], [], _PASTED_SECONDS)[0]:
        lines.append(input())
    return "\n".join(lines)
