"""Sends the records of a run to one tracker, in a process of its own: `python -m megazh.run.trackers.follow`.

It reads `metrics.jsonl` from its begin, and goes on until its standard input ends, which is when the run has closed it
or has died. What was sent is kept in `trackers/NAME.json`, written before it is sent: no step is sent twice, whatever
ends either process, and what one process could not send, the next one does, except for the record at which it failed.
"""

import contextlib
import dataclasses
import json
import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megazh.files import locked, write_atomic
from megazh.run.records import record_of
from megazh.run.scalars import scalars_of
from megazh.run.trackers.tracker import TrackedRun, Tracker, TrackerName, make_tracker

_POLL_SECONDS = 0.5
_FINISH_SECONDS = 600.0
_PIECE = 1 << 20


class Sent:
    """What a tracker was sent of a run: for each kind of record, its last step and how many records of that step.

    Events are counted over the whole file, as if all were of step 0: unlike other records, they are not removed when
    the run goes back to an earlier step.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._run_id = path, run_id
        self._sent: dict[str, list[int]] = {}
        self._read: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a new run, or another one's file
            found = json.loads(path.read_bytes())
            if found["run_id"] == run_id:
                self._sent = {kind: [int(step), int(count)] for kind, (step, count) in found["sent"].items()}

    def send(self, records: Iterable[dict[str, Any]], tracker: Tracker) -> None:
        """Send the next records of the file, without those that were sent before."""
        new = []
        for record in records:
            kind, step = record["kind"], 0 if record["kind"] == "event" else record["step"]
            before = self._read.get(kind, [step, 0])
            place = self._read[kind] = [step, before[1] + 1 if before[0] == step else 1]
            if place > self._sent.get(kind, [-1, 0]):
                new.append((kind, place, record))
        if new:
            self._save({**self._sent, **{kind: place for kind, place, _ in new}})
        try:
            for kind, place, record in new:
                self._sent[kind] = place
                _send(tracker, record)
            tracker.flush()
        except Exception:
            self._save(self._sent)  # what follows the record that failed was not sent
            raise

    def read_again(self) -> None:
        """Note that the file is read from its begin again: a run that goes back to an earlier step replaces it."""
        self._read.clear()

    def _save(self, sent: dict[str, list[int]]) -> None:
        note = {"run_id": self._run_id, "sent": sent}
        write_atomic(self._path, json.dumps(note).encode(), durable=False)


def follow(metrics: Path, tracker: Tracker, sent: Sent, ends: Iterator[bool]) -> None:
    """Send all records of a metrics.jsonl, until a look at `ends` gives true and all are sent."""
    file, rest = open(metrics, "rb"), b""  # noqa: SIM115 (replaced where the run replaces the file)
    for end in ends:
        while True:
            while data := file.read(_PIECE):
                *lines, rest = (rest + data).split(b"\n")
                sent.send(filter(None, map(record_of, lines)), tracker)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(metrics)):
                break
            file.close()
            file, rest = open(metrics, "rb"), b""  # noqa: SIM115 (as above)
            sent.read_again()
        if end:
            break
    file.close()


def _send(tracker: Tracker, record: dict[str, Any]) -> None:
    kind, step = record["kind"], record["step"]
    if kind in ("step", "validation"):
        tracker.scalars(step, scalars_of(record))
    elif kind == "sample":
        tracker.text(step, "sample", f"{record['prompt']}{record['text']}")
    else:
        tracker.text(step, f"event/{record['name']}", record["text"])


def _input_ends() -> Iterator[bool]:
    """Whether the standard input has ended, twice a second; the last time it is true."""
    end = False
    while not end:
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        end = bool(readable) and not os.read(0, 4096)
        if end:  # a service that does not answer must not keep this process, and its lock, for good
            limit = threading.Timer(_FINISH_SECONDS, os._exit, [1])
            limit.daemon = True
            limit.start()
        yield end


def _main() -> None:
    """Read from the first line of standard input what to do; write lines for the user to standard output."""
    user = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a tracker prints goes to its log
    order = json.loads(_first_line())
    name, metrics = TrackerName(order["tracker"]), Path(order["metrics"])
    run = TrackedRun(**{**order["run"], "folder": Path(order["run"]["folder"])})

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # the run has ended
            user.write(f"{line}\n")

    try:
        with locked(run.folder / f"{name}.lock"):  # another attempt's process may still send
            tracker = make_tracker(name)
            tell(f"{name:<12}{tracker.start(run)}")
            follow(metrics, tracker, Sent(run.folder / f"{name}.json", run.run_id), _input_ends())
            tracker.finish()
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"warning: {name}: {reason[:300]}; the rest is sent later")
        raise  # the traceback goes to the log


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def order_of(tracker: TrackerName, metrics: Path, run: TrackedRun) -> bytes:
    """The line that tells a new process what to do."""
    values = {
        "tracker": tracker,
        "metrics": str(metrics),
        "run": {**dataclasses.asdict(run), "folder": str(run.folder)},
    }
    return json.dumps(values).encode() + b"\n"


if __name__ == "__main__":
    _main()
    sys.stdout.flush()
