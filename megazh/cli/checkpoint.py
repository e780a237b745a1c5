"""`megazh checkpoint`: list, verify, prune and export the checkpoints of a run."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, count

EXAMPLES = """examples:
  megazh checkpoint list runs/demo
  megazh checkpoint verify runs/demo
  megazh checkpoint prune runs/demo --keep-last 1 --dry-run
  megazh checkpoint export-weights runs/demo model.safetensors --dtype bf16"""


def add_to(commands: Subparsers) -> None:
    """Add `checkpoint` and the commands below it."""
    parser = add_command(commands, "checkpoint", "list, verify, prune and export the checkpoints of a run", EXAMPLES)
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_list(below)
    _add_verify(below)
    _add_prune(below)
    _add_export(below)


def _add_list(below: Subparsers) -> None:
    parser = add_command(
        below,
        "list",
        "list the checkpoints: step, tokens, size, layout, optimizer, validation loss",
        "examples:\n  megazh checkpoint list runs/demo",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.set_defaults(call=_list)


def _add_verify(below: Subparsers) -> None:
    parser = add_command(
        below,
        "verify",
        "read every file of checkpoints again, and compare its hash",
        "examples:\n  megazh checkpoint verify runs/demo\n  megazh checkpoint verify runs/demo step_00001000",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints in RUN/checkpoints (default: all)")
    parser.set_defaults(call=_verify)


def _add_prune(below: Subparsers) -> None:
    parser = add_command(
        below,
        "prune",
        "remove checkpoints; the newest and damaged ones stay",
        "examples:\n  megazh checkpoint prune runs/demo --keep-last 1 --dry-run\n"
        "  megazh checkpoint prune runs/demo --keep-last 2 --keep-every 10000 --keep-best",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--keep-last", type=count, required=True, metavar="N", help="number of newest checkpoints to keep"
    )
    parser.add_argument("--keep-every", type=count, metavar="STEPS", help="keep those whose step is a multiple")
    parser.add_argument("--keep-best", action="store_true", help="keep the one of the lowest validation loss")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    parser.set_defaults(call=_prune)


def _add_export(below: Subparsers) -> None:
    parser = add_command(
        below,
        "export-weights",
        "write the weights of a checkpoint to one safetensors file",
        "examples:\n  megazh checkpoint export-weights runs/demo model.safetensors\n"
        "  megazh checkpoint export-weights runs/demo model.safetensors --checkpoint step_00001000 --dtype fp32",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("target", type=Path, metavar="FILE", help="file to write; there must be none of that name")
    parser.add_argument("--checkpoint", metavar="NAME", help="one of RUN/checkpoints (default: the newest whole one)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="fp32 takes the masters (default: bf16)"
    )
    parser.set_defaults(call=_export)


def _list(options: argparse.Namespace) -> None:
    from megazh.training.checkpoint_report import describe_checkpoints

    for line in describe_checkpoints(options.run):
        print(line)


def _verify(options: argparse.Namespace) -> None:
    from megazh.training.checkpoint_report import verify

    for line in verify(options.run, options.names):
        print(line, flush=True)


def _prune(options: argparse.Namespace) -> None:
    from megazh.training.checkpoint_report import pruned
    from megazh.training.retention import KeepRule

    rule = KeepRule(options.keep_last, options.keep_every or 0, options.keep_best)
    for line in pruned(options.run, rule, options.dry_run):
        print(line)


def _export(options: argparse.Namespace) -> None:
    import torch

    from megazh.errors import UsageError
    from megazh.training.checkpoint_report import chosen
    from megazh.training.weights import export_weights
    from megazh.writing import size_text, writing

    path, target = chosen(options.run, options.checkpoint), options.target
    if target.exists():
        raise UsageError(f"{target}: exists already; give another name, or remove it")
    with writing(target):
        number = export_weights(path, target, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    print(f"{target}: {number:,} weights of {path} in {options.dtype}, {size_text(target.stat().st_size)}")
