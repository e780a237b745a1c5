"""A write that fails: one line that names the path, what was needed, what there was, and what to do."""

import errno
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megazh import writing as module
from megazh.errors import UsageError, WorkerError, WriteError
from megazh.files import HashedFile, NewFile, locked, write_atomic
from megazh.writing import check_room, check_writable, free_bytes, size_text, warn_once, write_error, writing

FULL = Path("/dev/full")


def failure(number: int) -> OSError:
    """An OSError as the system reports it, with the path of a file that was read, not written."""
    return OSError(number, os.strerror(number), "/the/source")


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (errno.ENOSPC, ["No space left on device (30.0 MB needed, 1.2 MB free)", "make room on its disk"]),
        (errno.EDQUOT, ["Disk quota exceeded (30.0 MB needed, your quota is used up", "have the quota raised"]),
        (errno.EFBIG, ["File too large (30.0 MB needed, ", "raise the limit"]),
        (errno.EROFS, ["Read-only file system; ", "choose another place, or mount it writable"]),
        (errno.EACCES, ["Permission denied (as user ", "choose another place, or change its permissions"]),
        (errno.EPERM, ["Operation not permitted (as user ", "choose another place"]),
        (errno.EIO, ["Input/output error (30.0 MB needed)", "dmesg", "repair it"]),
        (errno.ESTALE, ["Stale file handle", "network file system fails"]),
        (errno.EMFILE, ["Too many open files ('ulimit -n' allows ", "raise the limit"]),
        (errno.ENFILE, ["Too many open files in system", "end other programs"]),
        (errno.ENAMETOOLONG, ["File name too long", "choose another place"]),
    ],
)
def test_each_failure_names_path_size_space_and_remedy(number: int, parts: list[str]) -> None:
    message = str(write_error(Path("runs/a/x.bin"), failure(number), 30_000_000, 1_200_000, "earlier files are whole"))
    assert message.startswith("runs/a/x.bin: cannot be written: ")
    assert all(part in message for part in parts), message
    assert "; earlier files are whole: " in message
    assert "/the/source" not in message
    assert "\n" not in message


def test_a_full_disk_that_lacks_file_numbers_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    values = [*found[:7], 0, *found[8:]]
    monkeypatch.setattr(module.os, "statvfs", lambda path: os.statvfs_result(values))
    message = str(write_error(tmp_path / "x", failure(errno.ENOSPC)))
    assert "holds as many files as it can" in message


def test_it_is_an_error_of_the_machine_and_an_oserror_and_crosses_processes() -> None:
    error = write_error("x", failure(errno.ENOSPC), 5, 2)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, WorkerError)
    assert isinstance(again, OSError)
    assert (str(again), again.exit_code) == (str(error), 5)


def test_only_what_the_block_writes_is_named(tmp_path: Path) -> None:
    full = r"^outer: cannot be written: No space left on device \(7 bytes needed"
    with pytest.raises(WriteError, match=full), writing("outer", 7):
        raise failure(errno.ENOSPC)
    with pytest.raises(WriteError, match=r"^inner: "), writing("outer"), writing("inner"):
        raise failure(errno.EIO)
    with pytest.raises(ValueError, match=r"^bug$"), writing("outer"):
        raise ValueError("bug")


def test_a_real_full_device(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(FULL)
    file = NewFile(tmp_path / "file", named=tmp_path / "final")
    with pytest.raises(WriteError, match=rf"^{tmp_path}/final: .*No space left on device \(at least 3 bytes needed"):
        file.write(b"abc")
    assert not (tmp_path / "file").is_symlink(), "what is unfinished is removed"


CHILD = """
import resource, sys
from pathlib import Path
from megazh.files import HashedFile, write_atomic
from megazh.errors import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_atomic(folder / "a", bytes(2000))
except WriteError as error:
    print(error)
file = HashedFile(folder / "b")
file.write(bytes(600))
try:
    file.write(bytes(600))
except WriteError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_leaves_nothing_half_written(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CHILD, tmp_path]
    out = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[1])
    limit = "'ulimit -f' allows 1.0 kB); raise the limit, then run the same command again"
    assert out.stdout.splitlines() == [
        f"{tmp_path}/a: cannot be written: File too large (2.0 kB needed, {limit}",
        f"{tmp_path}/b: cannot be written: File too large (at least 1.2 kB needed, {limit}",
    ]
    assert list(tmp_path.iterdir()) == []


def test_too_many_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(WriteError, match=rf"file: .*\('ulimit -n' allows {lowest}\); raise the limit"):
            write_atomic(tmp_path / "file", b"")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "write", [lambda path: write_atomic(path, b"x"), HashedFile, lambda path: locked(path).__enter__()]
)
def test_a_file_where_a_folder_should_be(tmp_path: Path, write: object) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=rf"^{tmp_path}/file/below/x: cannot be written: Not a directory"):
        write(tmp_path / "file" / "below" / "x")  # type: ignore[operator]


def test_room_is_checked_before(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "there")
    assert free is not None
    check_room(tmp_path / "x", free // 2)
    with pytest.raises(WriteError, match=r"No space left on device \(.* TB needed, .* free\); kept: make room"):
        check_room(tmp_path / "x", free + 10**15, "kept")


def test_a_disk_that_reports_nothing_is_not_taken_for_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.os, "statvfs", lambda path: os.statvfs_result([0] * 10))
    assert free_bytes(tmp_path) is None
    check_room(tmp_path, 10**18)


def test_a_place_that_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "use -r")
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=rf"^{folder}: cannot be made: {tmp_path}/file is a file; use -r$"):
            check_writable(folder, "use -r")
    with pytest.raises(UsageError, match=r"^/proc/self: cannot be written: .*; use -r$"):
        check_writable("/proc/self/new", "use -r", "/proc/self")


def test_what_a_run_can_do_without_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAZH_WARNED", "")
    for path in ("a", "b"):
        warn_once(path, failure(errno.ENOSPC), "nothing is lost")
    warn_once("c", write_error("c", failure(errno.EROFS)), "something else")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: a: cannot be written: No space left on device; nothing is lost",
        "warning: c: cannot be written: Read-only file system; something else",
    ]
    words = [sys.executable, "-c", "from megazh.writing import *; warn_once('d', OSError(28, 'x'), 'something else')"]
    child = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[1])
    assert child.stderr == "", "a process that this one starts does not repeat it"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (30_100_000, "30.1 MB"),
        (8_700_000_000, "8.7 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
