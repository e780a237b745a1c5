"""`megazh mixture`: show the corpora of a manifest."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_shape, amount
from megazh.index.choices import Packing


def add_to(commands: Subparsers) -> None:
    """Add `mixture` and its command."""
    parser = commands.add_parser("mixture", help="show a manifest: shares, epochs, validation documents")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    show = add_command(
        below,
        "show",
        "check a manifest's corpora, and show tokens, shares, epochs, and where each second epoch begins",
        "examples:\n  megazh mixture show data_index/pretrain.yaml\n"
        "  megazh mixture show data_index/pretrain.yaml --tokens 30B --seq-len 1024",
    )
    show.add_argument("manifest", type=Path, metavar="MANIFEST", help="data_index/NAME.yaml, or the PREFIX of an index")
    show.add_argument("--tokens", type=amount, metavar="N", help="length of the run in tokens, such as 500M or 30B")
    add_shape(show)
    show.add_argument(
        "--packing",
        choices=[packing.value for packing in Packing],
        default=Packing.BEST_FIT.value,
        help="how documents are packed (default: best_fit)",
    )
    show.set_defaults(call=_show)


def _show(options: argparse.Namespace) -> None:
    from megazh.index.fingerprint import digest_of
    from megazh.index.mixture import Mixture  # slow to import (numba)
    from megazh.index.report import describe_mixture

    mixture = Mixture(options.manifest, options.seq_len, Packing(options.packing), options.max_docs, options.seed)
    for line in describe_mixture(mixture, options.tokens):
        print(line)
    print(f"fingerprint  {digest_of(mixture.fingerprint)} (equal where all samples are)")
