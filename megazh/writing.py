"""What a person at the terminal needs to know when a write fails: which path, what size, what space, what to do."""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

from megazh.errors import UsageError, WriteError

AGAIN = "run the same command again"
_WARNED = "MEGAZH_WARNED"
"""Variable with what `warn_once` has warned of; processes that this one starts inherit it, and stay silent."""


@contextlib.contextmanager
def writing(path: Path | str, needed: int | None = None, kept: str = "") -> Iterator[None]:
    """Turn an OSError of the block, which writes `path` and reads nothing, into a WriteError; see `write_error`."""
    free = free_bytes(path)
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error, needed, free, kept) from error


def write_error(
    path: Path | str,
    error: OSError,
    needed: int | None = None,
    free: int | None = None,
    kept: str = "",
    least: bool = False,
    by: str = "",
) -> WriteError:
    """The error, in one line, of a write that has failed.

    Args:
        path: what was to be written, as the user knows it: the destination, not a temporary file.
        error: what the system reported.
        needed: bytes that were to be written, where known.
        free: bytes that were free before. Default: those that are free now.
        kept: what is not lost, such as "earlier checkpoints are whole".
        least: whether `needed` is what was needed up to the failure, and more would have come.
        by: who has failed, such as "rank 1 on node2".
    """
    free = free_bytes(path) if free is None else free
    needs = [] if needed is None else [f"{'at least ' if least else ''}{size_text(needed)} needed"]
    facts, remedy = _facts_and_remedy(path, error.errno, needs, free)
    shown = f" ({', '.join(facts)})" if facts else ""
    reason = f"cannot be written{by and ' by ' + by}: {_reason(error)}{shown}"
    return WriteError(f"{path}: {reason}; {kept and kept + ': '}{remedy}")


def check_room(path: Path | str, needed: int, kept: str = "") -> None:
    """Check that the disk of `path` has `needed` bytes free, before anything is written.

    Raises:
        WriteError: it has not.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed, free, kept)


def check_writable(folder: Path | str, remedy: str, what: str = "") -> None:
    """Check that files can be made in `folder`, or the folder itself where it is missing. Nothing is written.

    Args:
        folder: the folder.
        remedy: what to do, such as "give another folder with -r".
        what: the argument that named the folder, to begin the message with.

    Raises:
        UsageError: it is a file, or may not be written.
    """
    there = _existing(folder)
    start = f"{what or folder}: "
    if not there.is_dir():
        raise UsageError(f"{start}cannot be made: {there} is a file; {remedy}")
    if os.access(there, os.W_OK | os.X_OK):
        return
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    reason = "its file system is read-only" if read_only else f"user {_user()} has no permission to write"
    where = "" if there == Path(folder) else f" in {there.absolute()}"
    raise UsageError(f"{start}cannot be written: {reason}{where}; {remedy}")


def write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file, which takes only a part where the disk fills up meanwhile."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) or 0 :]


def free_bytes(path: Path | str) -> int | None:
    """Bytes that this user can still write on the disk of `path`, which need not exist; None if the disk cannot say."""
    with contextlib.suppress(OSError):
        found = os.statvfs(_existing(path))
        if found.f_blocks:  # some network file systems report nothing at all
            return found.f_bavail * found.f_frsize
    return None


def warn_once(path: Path | str, error: Exception, effect: str) -> None:
    """Warn on stderr, in one line, that something could not be written that a run can do without.

    Once per `effect`, also over the processes that this process starts afterwards.

    Args:
        path: what could not be written.
        error: why.
        effect: what follows from it, such as "the next start computes it again".
    """
    warned = os.environ.get(_WARNED, "").split("|")
    if effect in warned:
        return
    os.environ[_WARNED] = "|".join([*filter(None, warned), effect])
    reason = str(error)
    if isinstance(error, OSError) and not isinstance(error, WriteError):
        reason = f"{path}: cannot be written: {_reason(error)}"
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {reason.split('; ')[0]}; {effect}", file=sys.stderr, flush=True)


def size_text(size: int) -> str:
    """Format a number of bytes: 412 bytes, 30.1 kB, 8.7 GB."""
    if size < 1000:
        return f"{size} bytes"
    units = ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
    scale, unit = next((pair for pair in units if size < 1000 * pair[0]), units[-1])
    return f"{size / scale:.1f} {unit}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


def _facts_and_remedy(
    path: Path | str, number: int | None, needs: list[str], free: int | None
) -> tuple[list[str], str]:
    """What to add in brackets, and what to do."""
    room = [] if free is None else [f"{size_text(free)} free"]
    if number == errno.ENOSPC:
        if _no_inode(path):
            return ["its file system holds as many files as it can"], f"delete files there, then {AGAIN}"
        return [*needs, *room], f"make room on its disk, then {AGAIN}"
    if number == errno.EDQUOT:
        full = "your quota is used up; 'quota -s' shows it"
        return [*needs, full], f"delete files of yours there or have the quota raised, then {AGAIN}"
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = "its file system has a smaller limit"
        if limit != resource.RLIM_INFINITY:
            allowed = f"'ulimit -f' allows {size_text(limit)}"
        return [*needs, allowed], f"raise the limit, then {AGAIN}"
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return [f"'ulimit -n' allows {limit}"], f"raise the limit, then {AGAIN}"
    if number == errno.ENFILE:
        return ["of all programs of this machine together"], f"end other programs, then {AGAIN}"
    if number == errno.EROFS:
        return [], "choose another place, or mount it writable"
    if number in (errno.EACCES, errno.EPERM):
        return [f"as user {_user()}"], "choose another place, or change its permissions"
    if number in (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN):
        return needs, f"its disk or network file system fails (see dmesg): repair it, then {AGAIN}"
    return [], "choose another place"


def _no_inode(path: Path | str) -> bool:
    with contextlib.suppress(OSError):
        found = os.statvfs(_existing(path))
        return bool(found.f_files) and not found.f_favail and found.f_bavail > 0
    return False


def _existing(path: Path | str) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = Path(path)
    while True:
        try:
            os.stat(path)
            return path
        except PermissionError:
            return path if path == path.parent else _existing(path.parent)
        except OSError:
            if path == path.parent:
                return path
            path = path.parent


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
