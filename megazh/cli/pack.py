"""`megazh pack`: show how documents are packed into samples."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_shape
from megazh.index.choices import Packing


def add_to(commands: Subparsers) -> None:
    """Add `pack` and its commands."""
    parser = commands.add_parser("pack", help="how documents are packed into samples: numbers, and a picture of one")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    stats = add_command(
        below,
        "stats",
        "tokens in and out, padding, and documents cut, for each corpus",
        "examples:\n  megazh pack stats data_index/pretrain.yaml --seq-len 1024\n"
        "  megazh pack stats data_index/wiki --packing best_fit --seq-len 8192",
    )
    _add_target(stats)
    stats.add_argument("--packing", choices=[packing.value for packing in Packing], help="one method (default: both)")
    stats.set_defaults(call=_stats)
    show = add_command(
        below,
        "show",
        "show the pieces of documents in a training sample, and draw it with its attention mask",
        "example:\n  megazh pack show data_index/pretrain.yaml --sample 5 --output sample.png",
    )
    _add_target(show)
    show.add_argument(
        "--packing",
        choices=[packing.value for packing in Packing],
        default=Packing.BEST_FIT.value,
        help="how documents are packed (default: best_fit)",
    )
    show.add_argument("--sample", type=int, default=0, metavar="N", help="number of the sample, from 0 (default: 0)")
    show.add_argument("--output", type=Path, metavar="FILE", help="also draw it, to this .png or .svg")
    show.add_argument("--text", action="store_true", help="also show the text of its pieces")
    show.set_defaults(call=_show)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="MANIFEST", help="data_index/NAME.yaml, or the PREFIX of an index")
    add_shape(parser)


def _stats(options: argparse.Namespace) -> None:
    from megazh.index.report import describe_packing  # slow to import (numba)

    packings = [Packing(options.packing)] if options.packing else list(Packing)
    for line in describe_packing(options.target, options.seq_len, packings, options.max_docs, options.seed):
        print(line)


def _show(options: argparse.Namespace) -> None:
    from megazh.index.mixture import Mixture
    from megazh.index.picture import draw_sample
    from megazh.index.report import describe_sample

    mixture = Mixture(options.target, options.seq_len, Packing(options.packing), options.max_docs, options.seed)
    for line in describe_sample(mixture, options.sample, options.text):
        print(line)
    if options.output:
        draw_sample(mixture, options.sample, options.output)
        print(f"picture: {options.output}")
