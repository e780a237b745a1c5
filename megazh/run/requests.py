"""Requests to a run from another terminal, and its answers: files in RUN/control, which only its user can reach.

A client writes `requests/TIME-UUID.json` and waits for `answers/TIME-UUID.json`. The run takes a request by removing
its file, so that either the run carries it out or the client withdraws it. Each file appears by a rename, is a small
JSON object with known keys, and is refused where it is a link, or another user's.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from megazh.config import Config, choice, from_mapping
from megazh.errors import BusyError, DataError, MegazhError, UsageError, WorkerError, WriteError
from megazh.files import holder, write_atomic
from megazh.run.folder import RunFolder
from megazh.writing import writing

_NAME = re.compile(r"\d{19}-[0-9a-f]{32}\.json")
_LARGEST_ANSWER = 1 << 24
"""Bytes of the largest answer that is read: it may hold a sample as long as the context."""
_LARGEST = 1 << 18
"""Bytes of the largest file of any other kind that is read, such as a request."""
_MOST = 64
"""Files that are taken at a time."""
_KEPT_SECONDS = 3600.0
"""Age at which an answer that nobody has fetched is removed."""
_POLL_SECONDS = 0.05

ConfigType = TypeVar("ConfigType", bound=Config)


class Command(StrEnum):
    """What a run can be asked for."""

    SAMPLE = "sample"
    """Continue a text, or answer it."""
    SAVE = "save"
    """Save a checkpoint."""
    VALIDATE = "validate"
    """Validate."""
    PAUSE = "pause"
    """Wait, with everything in memory."""
    RESUME = "resume"
    """End a pause."""
    STOP = "stop"
    """Save and end."""
    SET = "set"
    """Change settings."""


class Request(Config):
    """A request, as its file holds it."""

    format_version: Literal[1] = 1
    command: Annotated[Command, choice(Command)]
    text: str | None = None
    """Text that `sample` continues or answers."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Largest number of tokens to sample. Default: the recipe's, or fewer where the context holds no more."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Temperature of `sample`. Default: that of the run's own samples."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of `sample`."""
    settings: Annotated[list[str], Field(max_length=_MOST)] = Field(default_factory=list)
    """`key=value` settings that `set` changes."""


class Outcome(StrEnum):
    """How far a request has come."""

    ACCEPTED = "accepted"
    """It will be carried out; another answer follows."""
    DONE = "done"
    REFUSED = "refused"
    ENDED = "ended"
    """The run has ended before that was done."""


class Answer(Config):
    """An answer, as its file holds it."""

    format_version: Literal[1] = 1
    outcome: Annotated[Outcome, choice(Outcome)]
    text: str
    """One line for the person who asked, or the text that `sample` has sampled."""
    step: int | None = None
    """Optimizer steps done."""
    details: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Values of the answer by name."""

    def to_json(self) -> str:
        """A JSON object on one line."""
        return json.dumps(self.model_dump(mode="json", exclude={"format_version"}), ensure_ascii=False)


class Inbox:
    """The run's side. `Inbox.clear` makes the folder before the run listens.

    Raises:
        UsageError: RUN/control is no folder of this user alone.
    """

    def __init__(self, run: RunFolder) -> None:
        self._requests, self._answers = _folders(run)
        self._passed: set[str] = set()
        """Names of what cannot be removed, such as a folder."""
        check_private(run.control)

    @staticmethod
    def clear(run: RunFolder) -> str:
        """Make the folder anew, without what an earlier run or client left.

        Returns:
            A line that says why the run will take no commands; empty where it does.
        """
        shutil.rmtree(run.control, ignore_errors=True)
        try:
            with writing(run.control):
                for folder in (run.control, *_folders(run)):
                    folder.mkdir(mode=0o700)
            check_private(run.control)
        except (WriteError, UsageError) as error:
            return f"warning: {error}; until then the run takes no commands ('megazh ctl')"
        return ""

    def take(self) -> Iterator[tuple[str, Request]]:
        """Take the requests that are there, oldest first, with their names; those that are none are refused here."""
        try:
            names = os.listdir(self._requests)
        except OSError:
            return
        for name in sorted(each for each in names if _NAME.fullmatch(each) and each not in self._passed)[:_MOST]:
            path, request, fault = self._requests / name, None, ""
            try:
                request = read_private(path, Request)
            except MegazhError as error:
                fault = str(error)
            try:
                path.unlink()
            except FileNotFoundError:  # its client has withdrawn it
                continue
            except OSError:
                self._passed.add(name)
                continue
            if request is None:
                self.answer(name, Answer(outcome=Outcome.REFUSED, text=fault))
            else:
                yield name, request

    def answer(self, name: str, answer: Answer) -> None:
        """Answer the request of this name. A disk that takes nothing loses the answer, and does no harm to the run."""
        with contextlib.suppress(OSError):
            write_private(self._answers / name, answer)
            now = (self._answers / name).stat().st_mtime  # by the clock of the disk, which may be another one
            for old in os.scandir(self._answers):
                if old.stat(follow_symlinks=False).st_mtime < now - _KEPT_SECONDS:
                    os.unlink(old.path)


def ask(
    run: RunFolder,
    request: Request,
    accepted: Callable[[Answer], None] = lambda answer: None,
    seconds: float = 60.0,
) -> Answer:
    """Send a request to a run, and wait for what comes of it.

    Args:
        run: the run.
        request: the request.
        accepted: called when the run has taken the request and will answer again.
        seconds: how long to wait for a first answer. The last one takes as long as the run needs, a step at least.

    Raises:
        UsageError: the run does not run, or has refused the request, which may be too large; one line says why.
        BusyError: no answer came in time; the request is withdrawn.
        WorkerError: the run has ended before the request was carried out, perhaps without an answer, or cannot write
            one; or the request cannot be written.
        DataError: the answer is none.
    """
    if (size := len(_encoded(request))) > _LARGEST:
        raise UsageError(f"{run.path}: the request has {size:,} bytes, and a run reads up to {_LARGEST:,}: shorten it")
    if holder(run.lock) is None:
        raise UsageError(f"{run.path}: is not running: start it first ('megazh ctl {run.path} status' shows its end)")
    requests, answers = _folders(run)
    name = f"{time.time_ns():019d}-{uuid.uuid4().hex}.json"
    deadline = time.monotonic() + seconds
    try:
        check_private(run.control)
        write_private(requests / name, request)
    except WriteError as error:
        raise WriteError(f"{error} (only the user who started the run can control it)") from None
    was_accepted = False
    try:
        while True:
            running = holder(run.lock) is not None  # before the look at the answer: a run answers, then it ends
            answer = read_private(answers / name, Answer, _LARGEST_ANSWER) if (answers / name).exists() else None
            if answer is not None and answer.outcome is Outcome.ACCEPTED and not was_accepted:
                was_accepted = True
                accepted(answer)
            if answer is not None and answer.outcome is not Outcome.ACCEPTED:
                break
            if not running:
                raise WorkerError(
                    f"{run.path}: has ended without an answer ('megazh ctl {run.path} status' shows more)"
                )
            if not was_accepted and time.monotonic() > deadline:
                if _withdrawn(requests / name):
                    raise BusyError(
                        f"{run.path}: no answer within {seconds:g} s: it is starting, or hangs ('megazh ctl {run.path} "
                        "status' shows which); the request is withdrawn: try again later"
                    )
                raise WorkerError(
                    f"{run.path}: has taken the request, and gives no answer within {seconds:g} s: is its disk full?"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        for path in (requests / name, answers / name):
            with contextlib.suppress(OSError):
                path.unlink()
    if answer.outcome is Outcome.ENDED:
        raise WorkerError(f"{run.path}: {answer.text}")
    if answer.outcome is Outcome.REFUSED:
        raise UsageError(f"{run.path}: {answer.text}")
    return answer


def read_private(path: Path, model: type[ConfigType], largest: int = _LARGEST) -> ConfigType:
    """Read a JSON file of RUN/control, of up to `largest` bytes.

    Raises:
        DataError: it is another user's, a link, larger, or has other keys.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > largest:
                raise ValueError("no small file of this user")
            values: Any = json.loads(file.read(largest))
        if not isinstance(values, dict):
            raise ValueError("no object")
        return from_mapping(values, model, path.name)
    except (OSError, ValueError, RecursionError, UsageError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def write_private(path: Path, value: Config) -> None:
    """Write a JSON file of RUN/control. Raises WriteError."""
    write_atomic(path, _encoded(value), durable=False, mode=0o600)


def _encoded(value: Config) -> bytes:
    return value.model_dump_json().encode() + b"\n"


def check_private(folder: Path) -> None:
    """Refuse a folder for requests that others could write to. Raises UsageError."""
    try:
        found = os.lstat(folder)
    except OSError as error:
        reason = f"{error.strerror}: this run takes no commands"
        raise UsageError(f"{folder}: {reason}; start it again, as the user who controls it") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder}: is no folder that belongs to this user alone; remove it, and start the run again")


def _folders(run: RunFolder) -> tuple[Path, Path]:
    return run.control / "requests", run.control / "answers"


def _withdrawn(path: Path) -> bool:
    """Remove a request that the run has not taken; returns whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
