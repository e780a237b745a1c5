"""The `megazh` command: parses the line, calls the library, and turns errors into one line and an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megazh import __version__
from megazh.cli import index, mixture, pack, plan, pretrain, sample, stories, tokenizer
from megazh.errors import INTERRUPTED, MegazhError, WorkerError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `megazh ARGUMENTS`; ends the process."""
    parser = argparse.ArgumentParser(prog="megazh", description="From raw Chinese text to a chat model.")
    parser.add_argument("--version", action="version", version=f"megazh {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (index, tokenizer, mixture, pack, stories, plan, pretrain, sample):
        module.add_to(commands)
    options, rest = parser.parse_known_args(arguments)
    # Settings may stand anywhere among the options, which argparse does not allow for positional arguments.
    if rest and hasattr(options, "settings") and all("=" in word for word in rest):
        options.settings, rest = rest, []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    """Call what the options name; returns the exit code (see `megazh.errors`)."""
    try:
        options.call(options)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except MegazhError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept: run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full or gone, a file without permission
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return WorkerError.exit_code
    return 0
