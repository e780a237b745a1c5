"""Start the ranks of a script, and collect the results of each rank."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from processes import Running, start_command

TESTS = Path(__file__).parent
_LAUNCHER = """
import json, sys
from pathlib import Path
from megazh.cluster.launchers.local import run_ranks
arguments, ranks, logs = json.loads(sys.argv[1])
sys.exit(run_ranks(arguments, ranks, {}, None, Path(logs)))
"""


@contextlib.contextmanager
def start_ranks(script: Path, ranks: int, arguments: Sequence[object], folder: Path) -> Iterator[Running]:
    """Start `script FOLDER ARGUMENTS` on CPU ranks; they are killed when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps([[str(script), str(folder), *map(str, arguments)], ranks, str(folder / "logs")])
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with start_command([sys.executable, "-c", _LAUNCHER, settings], env, folder) as running:
        yield running


def run_ranks(
    script: Path, ranks: int, arguments: Sequence[object], folder: Path, timeout: float
) -> list[dict[str, Any]]:
    """Run `script FOLDER ARGUMENTS` on CPU ranks to the end; returns what each rank gave to `save_results`.

    Raises AssertionError, with all logs, if a rank fails or `timeout` seconds have passed.
    """
    with start_ranks(script, ranks, arguments, folder) as running:
        finished = running.wait(timeout)
    logs = "".join(log.read_text() for log in sorted((folder / "logs").glob("*.log")))
    assert finished.returncode == 0, f"{finished.stdout}{finished.stderr}{logs}"
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)]


def save_results(folder: Path, results: dict[str, Any]) -> None:
    """Hand the results of this rank, tensors and plain values, to `run_ranks`."""
    torch.save(results, folder / f"rank_{os.environ['RANK']}.pt")


def join_ranks() -> None:
    """Join the process group, as a rank of a run does."""
    import deepspeed

    from megazh.pipeline.engine import quiet, use_no_compiled_operators

    torch.set_num_threads(1)
    use_no_compiled_operators()
    with quiet():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
