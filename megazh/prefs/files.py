"""Checks of the file that a command for preference data writes, and the lock on it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megazh.conversation.rejects import rejected_path
from megazh.corpus.sources import Source
from megazh.errors import UsageError
from megazh.files import locked
from megazh.writing import check_writable


def check_output(output: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Check, before anything is read, that the output can be written and replaces nothing by mistake.

    Raises:
        UsageError: it is a folder, an input, has another suffix, is there already, or cannot be written.
    """
    if output.is_dir():
        raise UsageError(f"--to {output}: is a folder; give a file, such as {output}/prefs.jsonl")
    if output.suffix != ".jsonl":
        raise UsageError(f"--to {output}: expected a name that ends in .jsonl")
    for path in (output, rejected_path(output)):
        if any(os.path.realpath(path) == os.path.realpath(source.path) for source in sources):
            raise UsageError(f"--to {output}: {path} is one of the inputs; give another name")
    if output.exists() and not overwrite:
        raise UsageError(f"--to {output}: is there already; give another name, or --force to replace it")
    check_writable(output.parent, "choose another --to", f"--to {output}")


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other commands from writing `output` inside the block. Raises BusyError if one does."""
    lock = output.with_name(f".{output.name}.lock")
    with locked(lock, f"{output}: another command writes it"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
