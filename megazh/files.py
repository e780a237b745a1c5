"""Atomic writes of files and folders, files that are hashed while they are written, locks, and remembered hashes."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from megazh.caches import cache_dir, warn_not_kept
from megazh.errors import BusyError, DataError, WorkerError, WriteError
from megazh.progress import Progress
from megazh.writing import free_bytes, write_all, write_error, writing

_BLOCK = 1 << 18  # stays in the processor's cache between reading and hashing
_LARGE = 1 << 31
_ATTEMPTS = 100  # to make a lock file in a folder that other processes make and remove
_LOCK_TRIES, _LOCK_TRY_SECONDS = 20, 0.02
_LONGEST_NAME = 500  # of a lock's holder
_locks: set[TextIO] = set()  # lock files that this process holds


def _close_locks() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


# A forked process shares the files of its parent: it must not hold a lock beyond its parent's death.
os.register_at_fork(after_in_child=_close_locks)


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Make what other descriptors have written to a file survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, durable: bool = True, mode: int = 0o644) -> None:
    """Write a file so that `path` holds either its old content or all of `data`: temporary name, fsync, rename.

    Args:
        path: the file; its folder is made if need be.
        data: its new content.
        durable: whether to flush to disk before the rename; without, a power cut (but no kill) may leave an empty file.
        mode: its permissions.

    Raises:
        WriteError: it cannot be written; the old content stays.
    """
    with writing(path, len(data)):
        _write_atomic(path, data, durable, mode)


def _write_atomic(path: Path, data: bytes, durable: bool, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, mode)
        os.rename(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if durable:
        fsync_directory(path.parent)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a folder that appears under its name once the block has filled it: temporary name, fsync, rename.

    The block gets the temporary folder, and flushes its files itself. A folder of that name is replaced.

    Raises:
        BusyError: another process makes the same folder.
        WriteError: the folder cannot be made; the old one stays.
    """
    target = Path(os.path.realpath(target))  # a link to a folder stays
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, f"{target}: another command writes it"):
        try:
            with _new_folder(target) as temporary:
                yield temporary
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name}.unfinished")
    replaced = target.with_name(f".{target.name}.replaced")
    with writing(target):
        if replaced.exists() and not target.exists():  # the last call ended between the two renames below
            replaced.rename(target)
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(target):
            fsync_directory(temporary)
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
            fsync_directory(target.parent)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


class NewFile:
    """A file that is written once, from its beginning to its end, and removed where that fails.

    Args:
        path: the file.
        named: path to name in errors, where the file gets another name in the end.

    Raises:
        WriteError: it cannot be made or, from `write` and `close`, be written.
    """

    def __init__(self, path: Path, named: Path | None = None) -> None:
        self.path = path
        self.size = 0
        """Bytes written so far."""
        self._named = named or path
        with writing(self._named):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses empty arrays
        self.size += len(view)
        try:
            write_all(self._file, view)
        except OSError as error:
            raise self._failed(error) from error

    def close(self, durable: bool = True) -> None:
        """Close the file; `durable`: flush it to disk before."""
        try:
            if durable:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error

    def discard(self) -> None:
        """Close and remove the file."""
        with contextlib.suppress(OSError):  # such as a network file system that reports a failed write late
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _failed(self, error: OSError) -> WriteError:
        """Remove the file; the error names the room that there was for it."""
        room = free_bytes(self.path)
        if room is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
                room += os.fstat(self._file.fileno()).st_size
        self.discard()
        return write_error(self._named, error, self.size, room, least=True)


class HashedFile(NewFile):
    """A new file whose SHA-256 is computed while it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._digest.update(data)
        super().write(data)

    @property
    def sha256(self) -> str:
        """The SHA-256, as hex, of what was written so far."""
        return self._digest.hexdigest()


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Compute the SHA-256 of a file as hex; `on_bytes` is called with the size of each block read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if on_bytes:
                on_bytes(size)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if need be); the kernel drops it when this process dies.

    Args:
        path: the lock file; it names the holder.
        busy: error message if another process holds the lock; None waits until it is free.

    Raises:
        BusyError: the lock is held and `busy` is given.
        WriteError: the lock file cannot be made.
        WorkerError: its file system has no locks.
    """
    for attempt in itertools.count(1):
        new = not path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # the holder before us may have removed the folder, too
            file = open(path, "a+")  # noqa: SIM115 (closed below: the lock lives as long as the file)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                continue  # removed between mkdir and open; again and again only where nothing can be made, as in /proc
            if new:
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
            raise write_error(path, error) from error
        try:
            _lock(file, wait=busy is None)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise BusyError(f"{busy} (held by {holder})") from None
        except OSError as error:
            file.close()
            raise WorkerError(
                f"{path}: cannot be locked: {error.strerror}; choose a place whose file system has locks (flock), or "
                "have it mounted with them"
            ) from error
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()  # the holder before us removed the file while we waited: lock the new one
    _locks.add(file)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and only its holder's name is lost
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{_this_process()}\n".encode())
        yield
    finally:
        _locks.discard(file)
        file.close()


def _this_process() -> str:
    """This process, for those whom it locks out."""
    job = os.environ.get("SLURM_JOB_ID", "")
    in_job = f", Slurm job {job}" if job.isascii() and job.isdigit() else ""
    return f"process {os.getpid()} on {socket.gethostname()}{in_job}"


def _lock(file: TextIO, wait: bool) -> None:
    """Lock a file. Without `wait`, raises BlockingIOError where another process keeps it locked.

    That is tried a few times: `holder` locks the file for some microseconds.
    """
    for left in reversed(range(1 if wait else _LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_LOCK_TRY_SECONDS)


def holder(path: Path) -> str | None:
    """Who holds the lock on the file `path` (see `locked`), such as `process 17 on node1`; None if nobody does."""
    try:
        file = open(path)  # noqa: SIM115 (closed below)
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(_LONGEST_NAME).strip() or "another process"
        except OSError:  # a file system without locks, on which nobody can hold one
            return None
    return None


def check_sha256(path: Path, expected: str) -> None:
    """Check that the content of `path` has the SHA-256 `expected`.

    The hash is remembered in the cache folder by path, inode, size and times of the file, so that the next process
    does not read it again; `remember_sha256` does the same for a file whose writer knows its hash.

    Raises:
        DataError: the content differs.
    """
    found = known_sha256(path)
    if found != expected:
        raise DataError(
            f"{path}: wrong content: expected sha256 {expected[:16]}…, found {found[:16]}…; restore or remake the file"
        )


def known_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as hex, remembered (see `check_sha256`) if the file has not changed since.

    Hashing a large file shows progress, unless `on_bytes` is given.
    """
    found = _remembered(path)
    if found is not None:
        return found
    before = _signature(path)
    if on_bytes is None and before["size"] > _LARGE:
        with Progress(f"hashing {path.name}", before["size"]) as progress:
            found = sha256_file(path, progress.advance)
    else:
        found = sha256_file(path, on_bytes)
    if _signature(path) == before:  # otherwise it changed while it was hashed
        remember_sha256(path, found)
    return found


def remember_sha256(path: Path, digest: str) -> None:
    """Remember the SHA-256 of a file in its present state; where nothing can be kept, warn once."""
    try:
        note = json.dumps({**_signature(path), "sha256": digest}).encode()
    except OSError:  # another process has removed it meanwhile
        return
    try:
        write_atomic(_note_path(path), note, durable=False)  # a damaged note is ignored
    except OSError as error:
        warn_not_kept(cache_dir(), error)


def _remembered(path: Path) -> str | None:
    try:
        note = json.loads(_note_path(path).read_bytes())
        digest = note.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return digest if note == _signature(path) else None


def _note_path(path: Path) -> Path:
    return cache_dir() / "sha256" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"


def _signature(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }
