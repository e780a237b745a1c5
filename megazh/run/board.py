"""The TensorBoard file of a run: scalars and texts, each on the disk at once; a run goes on without it."""

from __future__ import annotations

import os
import socket
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megazh.writing import warn_once

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


class _Whole(FileIO):
    """A new file, unbuffered, that takes all of a record or raises an OSError."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ab")

    def write(self, data: Any) -> int:
        """Append `data`; returns its size in bytes."""
        view = memoryview(data)
        while len(view):
            view = view[super().write(view) or 0 :]
        return len(data)


class Board:
    """Appends to one new event file in `folder`.

    Where a write fails, it warns once and writes nothing more: the same numbers are in metrics.jsonl. (torch's own
    SummaryWriter writes in a thread, which ends with a traceback on a full disk.)

    Args:
        folder: the folder of the run's event files; made if need be.
        purge_step: TensorBoard hides what earlier files in the folder hold from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        import torch.utils.tensorboard.summary  # takes a second, which the first step would wait for  # noqa: F401
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        unique = f"{_second(folder):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9}"
        self._path = folder / f"events.out.tfevents.{unique}"
        self._records: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(_Whole(self._path))
        except OSError as error:
            self._give_up(error)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to the curve `tag`."""
        from torch.utils.tensorboard.summary import scalar

        self._add_summary(scalar(tag, value), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text, which TensorBoard reads as Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._add_summary(text_summary(tag, text), step)

    def close(self) -> None:
        """Close the file."""
        if self._records is not None:
            try:
                self._records.close()
            except OSError as error:
                self._give_up(error)

    def _add_summary(self, summary: Summary, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(summary=summary, step=step))

    def _add(self, event: Event) -> None:
        if self._records is None:
            return
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._records = None
        warn_once(self._path, error, "TensorBoard gets no more points of this start; metrics.jsonl has them")


def _second(folder: Path) -> int:
    """Time in the name of a new event file, later than those of all others even where the clock was set back.

    TensorBoard reads files in the order of their names, and only what it has read before is hidden.
    """
    others = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    return max(int(time.time()), *(int(each) + 1 for each in others if each.isascii() and each.isdigit()), 0)
