"""The `megazh` command: parses the line, calls the library, and turns errors into one line and an exit code."""

import argparse
import contextlib
import importlib
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from megazh import __version__
from megazh.caches import provide_caches
from megazh.console import Console, ReaderGone, open_console
from megazh.errors import INTERRUPTED, READER_GONE, REQUEUE, MegazhError, Stopped, WorkerError
from megazh.program import runnable

# Each command with its line of help; the module of a command is imported only when it is called, so that
# `megazh --help` and tab completion are quick.
COMMANDS = {
    "recipe": "list, show and check recipes",
    "plan": "what a recipe needs, and the best layout for it",
    "doctor": "whether machines are fit for training, and the settings to use",
    "pretrain": "train a model through a pipeline of stages",
    "finetune": "fine-tune a trained model on conversations",
    "slurm": "jobs of Slurm: submit a chain, write an sbatch file, look at the job of a run",
    "ctl": "look at a running run, and control it, from another terminal",
    "sample": "continue a text with a trained model",
    "chat": "chat with a fine-tuned model",
    "checkpoint": "list, verify, prune and export the checkpoints of a run",
    "import": "check a Hugging Face folder, and make a checkpoint of it that runs can begin from",
    "export": "write a trained model as a Hugging Face folder, or the adapter of a LoRA run",
    "merge": "write a base with an adapter merged into it as a Hugging Face folder",
    "index": "build, inspect, verify, merge and adopt indexes of tokens",
    "tokenizer": "train a tokenizer, or look at one",
    "mixture": "look at a manifest: shares, epochs, validation side",
    "pack": "how documents become samples: numbers, and a picture of one",
    "prefs": "preference data for DPO, converted or generated with a model",
    "sft": "data for supervised fine-tuning: convert it, look at it",
    "eval": "what a trained model can do with long texts",
    "stories": "write Chinese micro-stories made from a seed: a small corpus to try everything with",
    "metrics": "the records of a run as a table",
    "plot": "draw the curves of one or several runs",
    "report": "write a page about a run",
    "rank": "one rank of a run (pretrain starts them)",
}

_MODULES = {"import": "import_model"}
"""Modules of commands that Python could not import under their own names."""


class _Parser(argparse.ArgumentParser):
    """A parser that takes `-你好` for text, and that says how to give other text that begins with a dash."""

    words: tuple[str, ...] = ()
    """The command line, or the part of it that is wrong."""
    innermost: "_Parser"
    """The parser of the command, or of the command below it, that parsed last."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse, as argparse does, and note which parser it was."""
        _Parser.innermost = self
        return super().parse_known_args(*arguments, **options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            import difflib

            if near := difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1):
                error.message += f"; did you mean {near[0]!r}?"
            raise

    def _parse_optional(self, arg_string: str) -> Any:
        # The names of options are ASCII; None stands for text.
        after = arg_string.lstrip("-")[:1]
        return None if after and not after.isascii() else super()._parse_optional(arg_string)

    def error(self, message: str) -> NoReturn:
        """Print usage and message; ends the process."""
        known = tuple(name for name in self._option_string_actions if len(name) == 2)
        for word in self.words:
            if word[:1] == "-" and word[1:2] not in ("", "-") and not word.startswith(known):
                message += (
                    f"; {word!r} looks like an option: text that begins with a dash goes to the end, behind --, and a "
                    "value behind =, as in --option=-value"
                )
                break
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `megazh ARGUMENTS`; ends the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_guarded(lambda: _parse(words)))


def run(options: argparse.Namespace) -> int:
    """Call the command that the options name; returns the exit code (see `megazh.errors`)."""
    return _guarded(lambda: options)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="megazh", description="From raw Chinese text to a language model.")
    _Parser.words = tuple(words)
    parser.add_argument("--version", action="version", version=f"megazh {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    called = words[0] if words else None
    for name, help_line in COMMANDS.items():
        if name == called:
            importlib.import_module(f"megazh.cli.{_MODULES.get(name, name)}").add_to(commands)
        else:
            commands.add_parser(name, help=help_line)
    options, rest = parser.parse_known_args(words)
    # Settings may stand anywhere among the options, which argparse does not allow for positional arguments.
    if rest and hasattr(options, "settings") and all("=" in word for word in rest):
        options.settings, rest = rest, []
    if rest:
        _Parser.words = tuple(rest)
        if torn := _torn_setting(words):
            _Parser.innermost.error(f"a setting in several words: quote it: {torn}")
        _Parser.innermost.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _torn_setting(words: list[str]) -> str | None:
    """The first setting such as `key={0: 16, 1K: 32}` that the shell has split at its blanks, quoted; None if none."""
    for first, word in enumerate(words):
        value = word.partition("=")[2]
        close = {"{": "}", "[": "]"}.get(value[:1])
        if close is None or value.endswith(close):
            continue
        for last in range(first + 1, len(words)):
            if words[last].endswith(close):
                return shlex.quote(" ".join(words[first : last + 1]))
    return None


def _guarded(options: Callable[[], argparse.Namespace]) -> int:
    """Parse and call a command; every end of it becomes an exit code, and every error a line on stderr."""
    with open_console() as console:
        try:
            code = _call(console, options)
            sys.stdout.flush()  # here, where a reader that has gone is no error
        except MegazhError as error:
            code = _failed(f"error: {runnable(str(error))}", error.exit_code)
        except KeyboardInterrupt:  # while the line was parsed
            code = _failed("interrupted", INTERRUPTED)
        except ReaderGone:
            code = READER_GONE
        except OSError as error:  # a disk that is full or gone, a file without permission
            what = f"{error.filename or 'input or output'}: {error.strerror or error}"
            code = _failed(f"error: {what}", WorkerError.exit_code)
        except Exception:
            traceback.print_exc()
            code = 1
        console.finish(code)
    return code


def _call(console: Console, options: Callable[[], argparse.Namespace]) -> int:
    given = argparse.Namespace()
    try:
        given = options()
        if getattr(given, "outlives_output", False) and not getattr(given, "dry_run", False):
            # The launcher names the log once the run folder is there.
            console.outlive(log_follows=getattr(given, "keeps_log", False))
        provide_caches()
        with _scheduled() if getattr(given, "scheduled", False) else contextlib.nullcontext():
            given.call(given)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            return _failed(ended.code, 1)
        return ended.code or 0
    except KeyboardInterrupt as error:
        return _failed(_interrupted(given), REQUEUE if isinstance(error, Stopped) else INTERRUPTED)
    return 0


@contextlib.contextmanager
def _scheduled() -> Iterator[None]:
    """End the block on the signals of schedulers as on Ctrl-C, but with an exit code that requests another start."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGHUP else Stopped

    before = {}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(given: argparse.Namespace) -> str:
    """What Ctrl-C leaves: commands that continue have set `continues`."""
    if getattr(given, "continues", False):
        return "interrupted; finished work is kept: run the same command again to continue"
    if getattr(given, "outlives_output", False):
        return "interrupted; nothing is kept of it: the same command begins anew"
    return "interrupted"


def _failed(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code
