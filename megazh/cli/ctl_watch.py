"""`megazh ctl RUN watch`: a live view of a run."""

import argparse

from megazh.cli.options import Subparsers, add_command, run_folder
from megazh.errors import UsageError

EXAMPLES = """examples:
  megazh ctl runs/demo watch
  megazh ctl runs/demo watch --once > now.txt

q leaves the view; the run goes on, and does not know of it. A run that has not begun is waited for, and the view ends
when the run does. Where the output is no terminal, the run is shown once, if it has begun."""


def add_watch(below: Subparsers) -> None:
    """Add `watch` to the commands of `ctl`."""
    what = "a live view of the run: losses, throughput, memory, samples, events"
    parser = add_command(below, "watch", what, EXAMPLES)
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(call=_watch)


def _watch(options: argparse.Namespace) -> None:
    from megazh.run.watch import watch

    if options.json:
        raise UsageError(f"watch has no --json: 'megazh ctl {options.run} status --json' prints the state as JSON")
    watch(run_folder(options.run), options.once)
