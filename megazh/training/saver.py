"""Saving off the critical path: a step waits for a copy to host memory, and a thread of each rank writes it.

The threads call no collective. `Saver.poll` at a step's end, or `Saver.wait`, brings the ranks together: once all have
written, a thread of rank 0 adds the manifest, gives the checkpoint its name by a rename, and removes older ones.
"""

import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megazh import __version__
from megazh.errors import SaveError, WriteError
from megazh.files import fsync_directory, write_atomic
from megazh.training.checkpoint_list import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_path,
    manifest_text,
    read_manifest,
)
from megazh.training.checkpoint_write import HostCopy, Written, merged
from megazh.training.collect import gather, of_rank_0
from megazh.writing import check_room, free_bytes, write_error, writing

KEPT = "earlier checkpoints are whole"
FAILURES_LIMIT = 3
"""Number of failed saves in a row that stop a run."""


class _Thread:
    """Runs a function in a thread, and keeps what it returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.failure: str = ""
        """Line of a WriteError; empty if there was none."""
        self.bug: str = ""
        """Traceback of any other exception."""
        self._function = function
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether the function has not ended."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except WriteError as error:
            self.failure = str(error)
        except BaseException:  # raised on all ranks by the main thread
            self.bug = traceback.format_exc()


class Saver:
    """Writes the checkpoints of a run. All ranks make one, and call its methods in the same order.

    Args:
        optimizer: what holds this rank's pieces: has `pieces_to_save()`, `name` and `updates`.
        folder: folder of the run's checkpoints.
        log: prints a line once, on rank 0.
        retain: called on rank 0 with the new checkpoint's path after each save, in a thread: removes those that are no
            longer to be kept, and returns lines to print.
        complete: called on rank 0 with the folder of a checkpoint whose tensors are written, in a thread: adds files.
        note_failure: called on all ranks where training goes on without a checkpoint that could not be written: with
            the line to print, and its step. Default: prints the line.
    """

    def __init__(
        self,
        optimizer: Any,
        folder: Path,
        log: Callable[[str], None] = print,
        retain: Callable[[Path], list[str]] = lambda path: [],
        complete: Callable[[Path], None] = lambda folder: None,
        note_failure: Callable[[str, int], None] | None = None,
    ) -> None:
        self._optimizer, self._folder, self._log, self._retain = optimizer, folder, log, retain
        self._complete = complete
        self._note_failure = note_failure or (lambda line, step: log(line))
        self._copy = HostCopy(optimizer.pieces_to_save(), dist.get_rank())  # now: to page-lock memory takes seconds
        self._needed = sum(gather(self._copy.bytes))
        self._manifest: CheckpointManifest | None = None  # of the save under way, and so on all ranks or on none
        self._thread: _Thread | None = None
        self._finishing = False
        self._begun = self._waited = 0.0
        self._required = False
        self._failures = 0
        self.failure = ""
        """Why the last save failed; empty if it did not."""
        self.saved_at: int | None = None
        """Step of the newest checkpoint that this run can be resumed from; None without one."""

    @property
    def step(self) -> int | None:
        """Step of the save that is under way; None without one."""
        return None if self._manifest is None else self._manifest.step

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.runs

    def check_room(self) -> None:
        """Check that there is room for a checkpoint.

        Raises:
            WriteError: there is too little; names both sizes. All ranks raise it.
        """
        message = ""
        try:
            check_room(self._folder, self._needed, KEPT)
        except WriteError as error:
            message = str(error)
        if message := of_rank_0(message):
            raise WriteError(message)

    def begin(self, manifest: CheckpointManifest, required: bool = False) -> None:
        """Begin to save the state of this moment; returns when it is copied to host memory.

        Args:
            manifest: step, layout and whatever else describes the checkpoint, but for tensors, files, versions and
                optimizer.
            required: whether the caller ends the run where the save fails, so that nothing is printed then.

        Raises:
            SaveError: the third save in a row has failed.
        """
        self.wait()
        self._begun, self._required = time.perf_counter(), required
        if message := of_rank_0(self._prepared(manifest.step)):
            self._failed(message, manifest.step)
            return
        self._copy.take()
        update = {"optimizer": self._optimizer.name, "updates": self._optimizer.updates, "versions": _versions()}
        self._manifest = manifest.model_copy(update=update)
        target, temporary = self._paths()
        free = free_bytes(self._folder)

        def write() -> Written:
            try:
                return self._copy.write(temporary)
            except OSError as error:
                by = f"rank {dist.get_rank()} on {socket.gethostname()}"
                raise write_error(target, error, self._needed, free, KEPT, by=by) from error

        self._thread = _Thread(write)
        self._waited = time.perf_counter() - self._begun

    def poll(self, busy_anywhere: bool) -> None:
        """Go on with the save under way, if no rank's thread still writes.

        Raises:
            SaveError: the third save in a row has failed.
        """
        if self._manifest is not None and not busy_anywhere:
            self._settle()

    def wait(self) -> None:
        """Wait for the save under way; afterwards `failure` says whether it has failed.

        Raises:
            SaveError: it was the third in a row.
        """
        while self._manifest is not None:
            if self._thread is not None:
                self._thread.join()
            self._settle()

    def save(self, manifest: CheckpointManifest) -> None:
        """Save, and wait until the checkpoint is there; arguments as for `begin`.

        Raises:
            WriteError: it cannot be written. All ranks raise it.
        """
        self.begin(manifest, required=True)
        self.wait()
        if self.failure:
            raise WriteError(self.failure)

    def _prepared(self, step: int) -> str:
        """Make the folder on rank 0; returns why that is not possible."""
        if dist.get_rank():
            return ""
        target = checkpoint_path(self._folder, step)
        temporary = _unfinished(target)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            check_room(target, self._needed, KEPT)
            with writing(target, kept=KEPT):
                temporary.mkdir(parents=True)
        except WriteError as error:
            return str(error)
        return ""

    def _paths(self) -> tuple[Path, Path]:
        assert self._manifest is not None
        target = checkpoint_path(self._folder, self._manifest.step)
        return target, _unfinished(target)

    def _settle(self) -> None:
        """Compare what the threads of all ranks have come to. All ranks call it once their threads have ended."""
        assert self._manifest is not None
        thread = self._thread
        found = gather((thread.result, thread.failure, thread.bug) if thread is not None else (None, "", ""))
        target, temporary = self._paths()
        self._thread = None
        for rank, (_, _, bug) in enumerate(found):
            if bug:
                raise RuntimeError(f"rank {rank} failed to write {target}:\n{bug}")
        if failure := next((failure for _, failure, _ in found if failure), ""):
            self._remove(temporary)
            step = self._manifest.step
            self._manifest, self._finishing = None, False
            self._failed(failure, step)
        elif not self._finishing:
            self._finishing = True
            if dist.get_rank() == 0:
                parts = [result for result, _, _ in found]
                self._thread = _Thread(lambda: self._finish(parts))
        else:
            self.saved_at, self._failures, self.failure = self._manifest.step, 0, ""
            self._manifest, self._finishing = None, False
            seconds = time.perf_counter() - self._begun
            self._log(
                f"checkpoint {os.path.relpath(target)} ({seconds:.1f} s, of which the step waited {self._waited:.2f} s)"
            )
            for line in found[0][0]:
                self._log(line)

    def _finish(self, parts: list[Written]) -> list[str]:
        """Add the manifest and give the checkpoint its name; then remove those that are no longer to be kept."""
        assert self._manifest is not None
        target, temporary = self._paths()
        written = merged(parts)
        manifest = self._manifest.model_copy(update={"files": written.files, "tensors": written.tensors})
        with writing(target, kept=KEPT):
            self._complete(temporary)
            write_manifest(temporary, manifest)
            shutil.rmtree(target, ignore_errors=True)  # left by an earlier attempt that was rolled back past this step
            temporary.rename(target)
            fsync_directory(target.parent)
        return self._retain(target)

    def _remove(self, temporary: Path) -> None:
        """Remove an unfinished checkpoint, so that its space is free again before anyone reports the failure."""
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()

    def _failed(self, message: str, step: int) -> None:
        self._failures, self.failure = self._failures + 1, message
        if self._failures >= FAILURES_LIMIT:
            last = "no checkpoint was saved" if self.saved_at is None else f"the newest is that of step {self.saved_at}"
            raise SaveError(f"{message}; {self._failures} saves in a row have failed, and {last}: training is stopped")
        if not self._required:
            line = f"warning: {message.split(';')[0]}; {KEPT}; training goes on to the next checkpoint"
            self._note_failure(line, step)


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest into the folder of a checkpoint. Raises WriteError."""
    write_atomic(checkpoint / MANIFEST, manifest_text(manifest).encode())


def mark_complete(checkpoint: Path) -> None:
    """Note in the manifest of the last step's checkpoint that the run is done. All ranks call it.

    Raises:
        WriteError: the manifest cannot be written.
    """
    amend_manifest(checkpoint, {"complete": True})


def amend_manifest(checkpoint: Path, values: Mapping[str, Any]) -> None:
    """Replace some values in the manifest of a finished checkpoint. All ranks call it.

    Raises:
        WriteError: the manifest cannot be written.
    """
    message = ""
    if dist.get_rank() == 0:
        manifest = read_manifest(checkpoint).model_copy(update=dict(values))
        try:
            with writing(checkpoint / MANIFEST, kept=KEPT):
                write_manifest(checkpoint, manifest)
        except WriteError as error:
            message = str(error)
    if message := of_rank_0(message):
        raise WriteError(message)


def _unfinished(target: Path) -> Path:
    return target.parent / f".{target.name}.unfinished"


def _versions() -> dict[str, str]:
    return {"megazh": __version__, **{name: version(name) for name in ("torch", "deepspeed")}}
