"""`megazh ctl`: look at a running run, and control it, from another terminal."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cli.ctl_watch import add_watch
from megazh.cli.options import Subparsers, add_command, count, run_folder
from megazh.errors import MegazhError, UsageError
from megazh.program import runnable

if TYPE_CHECKING:
    from megazh.run.requests import Answer, Request

EXAMPLES = """examples:
  megazh ctl runs/demo status                     what it does, or how it has ended
  megazh ctl runs/demo watch                      a live view
  megazh ctl runs/demo sample "从前，" -n 64
  megazh ctl runs/demo save
  megazh ctl runs/demo validate
  megazh ctl runs/demo set learning_rate=3e-4 checkpoint_every=100
  megazh ctl runs/demo pause
  megazh ctl runs/demo resume
  megazh ctl runs/demo stop                       save and end; the run's command goes on from there

The run carries a command out when its step ends; `status` and `watch` read its files. Only the user who started the run
can control it, from any machine that sees its folder. docs/running.md says more."""

_WITHOUT_OPTIONS = {
    "save": "save a checkpoint of the step that is under way; training goes on meanwhile",
    "validate": "validate after this step",
    "pause": "wait after this step, with everything in memory, until `resume` or `stop`",
    "resume": "end a pause",
    "stop": "save after this step, and end",
}


def add_to(commands: Subparsers) -> None:
    """Add `ctl` and its commands."""
    parser = add_command(commands, "ctl", "look at a running run, and control it, from another terminal", EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    below = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    _add(below, "status", "what the run is doing, or how it has ended").set_defaults(call=_status)
    add_watch(below)
    sample = _add(below, "sample", "continue a text, or answer a question where the run's data are conversations")
    sample.add_argument("text", help="the text to continue, or the question")
    sample.add_argument(
        "-n", "--max-tokens", type=count, metavar="N", help="largest number of tokens (default: the recipe's)"
    )
    sample.add_argument(
        "--temperature", type=float, metavar="T", help="0: greedy (default: that of the run's own samples)"
    )
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: 0)")
    for name, what in _WITHOUT_OPTIONS.items():
        _add(below, name, what)
    setting = _add(below, "set", "change settings from the next step on; a resume keeps them")
    setting.add_argument(
        "assignments", nargs="+", metavar="KEY=VALUE", help="learning_rate, checkpoint_every, validate_every ..."
    )


def _add(below: Subparsers, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = below.add_parser(name, help=what, description=what)
    parser.add_argument("--json", action="store_true", help="print the answer as a JSON object on one line")
    if name != "status":
        parser.add_argument(
            "--wait", type=count, default=60, metavar="SECONDS", help="time for the run to accept it (default: 60)"
        )
    parser.set_defaults(call=_ask)
    return parser


def _status(options: argparse.Namespace) -> None:
    with failure_as_json(options):
        from megazh.run.folder import RunFolder
        from megazh.training.status import status

        found = status(RunFolder(run_folder(options.run)))
        for line in [found.to_json()] if options.json else found.lines(time.time()):
            print(line)


def _ask(options: argparse.Namespace) -> None:
    from megazh.run.folder import RunFolder
    from megazh.run.requests import ask

    def accepted(answer: "Answer") -> None:
        print(answer.text, file=sys.stderr, flush=True)

    with failure_as_json(options):
        run = RunFolder(run_folder(options.run))
        if not run.exists:
            raise UsageError(f"{run.path}: not the folder of a run: {run.config.name} is missing")
        answer = ask(run, _request(options), accepted, options.wait)
        print(answer.to_json() if options.json else answer.text)


@contextlib.contextmanager
def failure_as_json(options: argparse.Namespace) -> Iterator[None]:
    """With `--json`, an error of the block is an object on stdout as well; it goes on to be a line on stderr."""
    try:
        yield
    except MegazhError as error:
        if options.json:
            outcome = "refused" if isinstance(error, UsageError) else "failed"
            values = {"outcome": outcome, "text": runnable(str(error)), "exit_code": error.exit_code}
            print(json.dumps(values, ensure_ascii=False))
        raise


def _request(options: argparse.Namespace) -> "Request":
    from megazh.config import from_mapping
    from megazh.run.requests import Request

    values = {"command": options.command}
    if options.command == "sample":
        if any("\ud800" <= each <= "\udfff" for each in options.text):  # surrogates: bytes that are not UTF-8
            raise UsageError("the text is not valid UTF-8: set the terminal to UTF-8")
        values |= {
            "text": options.text, "tokens": options.max_tokens, "temperature": options.temperature,
            "seed": options.seed,
        }  # fmt: skip
    if options.command == "set":
        for each in options.assignments:
            if not each.partition("=")[1]:
                raise UsageError(f"set {each}: no value: expected KEY=VALUE, such as learning_rate=3e-4")
        values["settings"] = options.assignments
    return from_mapping(values, Request, f"ctl {options.command}")
