"""placeholder"""

from megazh.cli.options import Subparsers


def add_to(commands: Subparsers) -> None:
    pass
