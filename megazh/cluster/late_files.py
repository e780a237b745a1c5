"""Wait for files that another machine has written: a shared disk may show them late.

NFS clients keep what they know of a folder for up to a minute (acdirmax). A job that is started on another node than
the one before it would miss its checkpoint, or its data, and the checks before the start would refuse it or fall back.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megazh.errors import DataError
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import checkpoint_path, read_manifest
from megazh.training.checks.data import is_there
from megazh.training.recipe import Recipe

_SECONDS = 75.0
_POLL_SECONDS = 0.5


def await_data(recipe: Recipe) -> None:
    """Wait for the manifest or index of the data, in a Slurm job that depends on another, which may just have written
    it."""
    if os.environ.get("SLURM_JOB_DEPENDENCY"):
        why = "the job before this one may have written it"
        _await(Path(recipe.data.manifest), lambda: is_there(recipe), why)


def await_checkpoint(run: RunFolder) -> None:
    """Wait until the newest checkpoint of the last attempt, if that ran on another machine, is there as a whole."""
    try:
        attempts = run.info().attempts if run.exists else []
    except DataError:  # which the start refuses
        return
    if not attempts or attempts[-1].saved is None or attempts[-1].host == socket.gethostname():
        return
    path = checkpoint_path(run.checkpoints, attempts[-1].saved)

    def is_whole() -> bool:
        try:
            read_manifest(path)
        except DataError:
            return False
        return True

    _await(path, is_whole, f"the last attempt wrote it on {attempts[-1].host}")


def _await(path: Path, seen: Callable[[], bool], why: str) -> None:
    """Wait until a file is seen, and say so; where it does not come, go on: the checks of a start decide."""
    deadline, said = time.monotonic() + _SECONDS, False
    while not seen():
        if not said:
            line = f"{path}: not there, or not whole; {why}, and a shared disk may show it late: waiting for it"
            print(line, file=sys.stderr, flush=True)
            said = True
        if time.monotonic() > deadline:
            print(f"{path}: not there after {_SECONDS:.0f} s; going on without it", file=sys.stderr, flush=True)
            return
        time.sleep(_POLL_SECONDS)
        for folder in (path.parent.parent, path.parent):  # a listing asks the server anew
            if folder.is_dir():
                os.listdir(folder)
