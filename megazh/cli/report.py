"""`megazh report`: a run as one HTML file."""

import argparse
import contextlib
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, writing_output

EXAMPLES = """examples:
  megazh report runs/demo
  megazh report runs/demo -o demo.html

The page needs no other file and no network, and runs no script: send it by mail, or open it in any browser. It can be
written while the run trains; what is missing or damaged in the folder is named on the page."""


def add_to(commands: Subparsers) -> None:
    """Add `report`."""
    parser = add_command(
        commands, "report", "write a page about a run: curves, samples, events, data, recipe", EXAMPLES
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.set_defaults(call=_report)


def _report(options: argparse.Namespace) -> None:
    from megazh.training.report.page import write_report

    output = options.output or options.run / "report.html"
    with writing_output("-o", output) if options.output else contextlib.nullcontext():
        problems = write_report(options.run, output)
    for problem in problems:
        print(f"note: {problem}")
    print(output)
