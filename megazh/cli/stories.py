"""`megazh stories`: write the demo corpus."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, count
from megazh.errors import UsageError
from megazh.writing import check_writable


def add_to(commands: Subparsers) -> None:
    """Add `stories`."""
    stories = add_command(
        commands,
        "stories",
        "write Chinese micro-stories generated from a seed: a small corpus for trying everything out",
        "example:\n  megazh stories --count 20000 --seed 1 --output raw/stories.jsonl",
    )
    stories.add_argument("--count", type=count, default=20000, metavar="N", help="number of stories (default: 20000)")
    stories.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the stories (default: 1)")
    stories.add_argument("--output", type=Path, required=True, metavar="FILE", help=".jsonl file to write")
    stories.set_defaults(call=_write, outlives_output=True)


def _write(options: argparse.Namespace) -> None:
    from megazh.demo.stories import write_stories

    if options.output.is_dir():
        raise UsageError(f"--output {options.output}: is a folder; give a file, such as {options.output}/stories.jsonl")
    check_writable(options.output.parent, "choose another --output", f"--output {options.output}")
    write_stories(options.output, options.count, options.seed)
    print(f"{options.output}: {options.count:,} stories, {options.output.stat().st_size / 1e6:.1f} MB")
