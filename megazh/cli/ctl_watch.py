"""`megazh ctl RUN watch`: a live view of a run."""

import argparse

from megazh.cli.options import Subparsers, add_command

EXAMPLES = """examples:
  megazh ctl runs/demo watch
  megazh ctl runs/demo watch --once > now.txt

q leaves the view; the run goes on, and does not know of it. A run that has not begun is waited for, and the view ends
when the run does. Where the output is no terminal, the run is shown once."""


def add_watch(below: Subparsers) -> None:
    """Add `watch` to the commands of `ctl`."""
    what = "a live view of the run: losses, throughput, memory, samples, events"
    parser = add_command(below, "watch", what, EXAMPLES)
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.set_defaults(call=_watch)


def _watch(options: argparse.Namespace) -> None:
    from megazh.run.watch import watch

    watch(options.run, options.once)
