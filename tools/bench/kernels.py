#!/usr/bin/env python3
"""Compile every Triton kernel for several cards, without a GPU: registers, shared memory, spills, resident warps.

    python tools/bench/kernels.py

The functions of `megazh/kernels` are called with tensors that have no memory, and what they launch is compiled instead
of run: block sizes, warps and specialisation of arguments are those of training.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from compiled_kernels import CARDS, Found, check_compiler, compile_kernels

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import WorkerError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/kernels.py
  python tools/bench/kernels.py --cards sm86 --head-dims 64 128
  python tools/bench/kernels.py --cards sm86 --blocks-of sm90    # attention with the block sizes of another card

Exits with 5 if a kernel needs more shared memory than a block of the card may have, or if more than --most-spills bytes
of its registers are spilled to memory."""
MOST_SPILLS = 64
HEAD_DIMS = [32, 48, 64, 128]


def call(arguments: argparse.Namespace) -> None:
    """Compile for each card in a process of its own, and print what was found."""
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    check_compiler()
    cards = list(dict.fromkeys(arguments.cards))
    print(f"{'card':<5} {'kernel':<27} {'shape':<33} registers   shared  spills  warps  resident", flush=True)
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory(prefix="megazh-kernels-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty one, since ptxas reports only what it compiles
        spawn = multiprocessing.get_context("spawn")
        workers = min(len(cards), len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(workers, spawn, initializer=_one_thread) as pool:
            pending = {
                pool.submit(compile_kernels, card, arguments.head_dims, arguments.blocks_of): card for card in cards
            }
            for done in as_completed(pending):
                found[pending[done]] = done.result()
                for each in found[pending[done]]:
                    print(_line(each), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for card in cards for each in found[card]], indent=1) + "\n")
    check([each for card in cards for each in found[card]], arguments.most_spills)


def _one_thread() -> None:
    """Keep torch in this process to one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _line(each: Found) -> str:
    return (
        f"{each.card:<5} {each.kernel:<27} {each.shape:<33} {each.registers:>9} {each.shared / 1024:>4.1f} KiB "
        f"{each.spills:>7} {each.warps:>6} {each.resident_warps:>9}"
    )


def check(found: list[Found], most_spills: int) -> None:
    """Refuse kernels that exceed their card.

    Raises:
        WorkerError: names each of them.
    """
    if faults := [fault for each in found for fault in _faults(each, most_spills)]:
        raise WorkerError("; ".join(faults))


def _faults(each: Found, most_spills: int) -> list[str]:
    """What a kernel exceeds on its card."""
    where, found = f"{each.kernel} ({each.shape}) on {each.card}", []
    limit = CARDS[each.card].block_shared
    if each.shared > limit:
        found.append(f"{where} needs {each.shared / 1024:g} KiB of shared memory, a block may have {limit >> 10} KiB")
    if each.spills > most_spills:
        found.append(f"{where} spills {each.spills} bytes, at most {most_spills} are allowed")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = standalone("compile every Triton kernel for several cards, without a GPU", EXAMPLES)
    add = found.add_argument
    add("--cards", nargs="+", choices=CARDS, default=list(CARDS), metavar="CARD", help=f"default: {' '.join(CARDS)}")
    add(
        "--head-dims",
        nargs="+",
        type=count,
        default=HEAD_DIMS,
        metavar="N",
        help=f"dimensions of each head (default: {' '.join(map(str, HEAD_DIMS))})",
    )
    add("--blocks-of", choices=CARDS, metavar="CARD", help="take the attention's block sizes of this card")
    add("--most-spills", type=int, default=MOST_SPILLS, metavar="BYTES", help=f"default: {MOST_SPILLS}")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
