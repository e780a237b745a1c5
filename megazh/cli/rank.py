"""`megazh rank`: one rank of a run; launchers call it, people do not."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command

EXAMPLE = """example:
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 megazh rank runs/demo"""


def add_to(commands: Subparsers) -> None:
    """Add `rank`."""
    parser = add_command(commands, "rank", "train as one rank of the run in a folder (pretrain starts them)", EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, whose config.yaml says how to train")
    parser.set_defaults(call=_rank, outlives_output=True, continues=True)


def _rank(options: argparse.Namespace) -> None:
    from megazh.training.worker import leave, work

    leave(work(options.run))  # `work` raises nothing
