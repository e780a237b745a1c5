"""`megazh rank`: one rank of a run; launchers call it, people do not."""

import argparse
import sys
from pathlib import Path

from megazh.cli.options import Subparsers, add_command

EXAMPLE = """example:
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 megazh rank runs/demo"""


def add_to(commands: Subparsers) -> None:
    """Add `rank`."""
    parser = add_command(commands, "rank", "train as one rank of the run in a folder (pretrain starts them)", EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, whose config.yaml says how to train")
    parser.add_argument(
        "--started-by", choices=["srun", "deepspeed", "mpirun"], help="program whose variables say which rank this is"
    )
    parser.add_argument("--attempt", metavar="ID", help="with --started-by: attempt in RUN/control/launch.json")
    parser.set_defaults(call=_rank, outlives_output=True, continues=True)


def _rank(options: argparse.Namespace) -> None:
    if options.started_by is not None:
        from megazh.cluster.launchers.guard import guard
        from megazh.training.job import Launcher

        sys.exit(guard(options.run, Launcher(options.started_by), options.attempt or ""))
    from megazh.training.worker import leave, work

    leave(work(options.run))  # `work` raises nothing
