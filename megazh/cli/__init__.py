"""The `megazh` command: parses the line, calls the library, and turns errors into one line and an exit code."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megazh import __version__
from megazh.caches import provide_caches
from megazh.errors import INTERRUPTED, MegazhError, WorkerError
from megazh.program import runnable

# Each command with its line of help; the module of a command is imported only when it is called, so that
# `megazh --help` and tab completion are quick.
COMMANDS = {
    "recipe": "list, show and check recipes",
    "plan": "what a recipe needs, and the best layout for it",
    "pretrain": "train a model through a pipeline of stages",
    "sample": "continue a text with a trained model",
    "index": "build, inspect, verify, merge and adopt indexes of tokens",
    "tokenizer": "train a tokenizer, or look at one",
    "mixture": "look at a manifest: shares, epochs, validation side",
    "pack": "how documents become samples: numbers, and a picture of one",
    "stories": "write Chinese micro-stories made from a seed: a small corpus to try everything with",
    "rank": "one rank of a run (pretrain starts them)",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `megazh ARGUMENTS`; ends the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="megazh", description="From raw Chinese text to a language model.")
    parser.add_argument("--version", action="version", version=f"megazh {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    called = words[0] if words else None
    for name, help_line in COMMANDS.items():
        if name == called:
            importlib.import_module(f"megazh.cli.{name}").add_to(commands)
        else:
            commands.add_parser(name, help=help_line)
    options, rest = parser.parse_known_args(words)
    # Settings may stand anywhere among the options, which argparse does not allow for positional arguments.
    if rest and hasattr(options, "settings") and all("=" in word for word in rest):
        options.settings, rest = rest, []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    """Call the command that the options name; returns the exit code (see `megazh.errors`)."""
    try:
        provide_caches()
        options.call(options)
        sys.stdout.flush()  # here, where a closed pipe is no error
    except MegazhError as error:
        print(f"error: {runnable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished work is kept: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full or gone, a file without permission
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return WorkerError.exit_code
    return 0
