"""Atomic writes, locks, and remembered hashes."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from textdata import ROOT, finish, kill_group, start

from megazh import files
from megazh.errors import BusyError, DataError, WriteError
from megazh.files import check_sha256, known_sha256, locked, new_folder, remember_sha256, sha256_file, write_atomic
from megazh.files import holder as holder_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "rename", "chmod"])
def test_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "out" / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new" * 1000)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([byte]) * 300_000 for byte in b"ab"]
    write_atomic(path, contents[0])
    for pause in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for content in contents:
                        write_atomic(path, content)
            finally:
                os._exit(1)
        threading.Event().wait(0.002 + 0.003 * pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert path.read_bytes() in contents


HOLD = """
    import sys, time
    from pathlib import Path
    from megazh.files import locked
    with locked(Path(sys.argv[1]), busy="busy"):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    process = start(sys.executable, "-c", textwrap.dedent(HOLD), lock)
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_is_refused_while_held_and_free_after_a_kill(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "lock"
    process = holder(lock)
    try:
        with pytest.raises(BusyError, match=rf"^in use \(held by process {process.pid} on "), locked(lock, "in use"):
            pass
    finally:
        kill_group(process)
        process.stdout.close()
        process.stderr.close()
    with locked(lock, "in use"):
        assert f"process {os.getpid()} " in lock.read_text()


def test_a_folder_in_which_nothing_can_be_made_is_an_error() -> None:
    with pytest.raises(WriteError, match=r"^/proc/lock: cannot be written"), locked(Path("/proc/lock"), "in use"):
        pass


def test_second_process_is_refused_with_exit_4_message(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, "in use"):
        code, out, err = finish(start(sys.executable, "-c", textwrap.dedent(HOLD), lock))
    assert (code, out) == (1, "")
    assert "BusyError: busy (held by process" in err


def test_forked_process_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """Workers are forked while the build is locked: one that outlives a killed build must not block the next."""
    code = """
        import os, sys
        from pathlib import Path
        from megazh.files import locked
        with locked(Path(sys.argv[1])):
            child = os.fork()
            if not child:
                print("forked", flush=True)
                sys.stdin.read()
            os._exit(0)
    """
    process = start(sys.executable, "-c", textwrap.dedent(code), tmp_path / "lock", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "forked\n"
    process.wait(10)
    with locked(tmp_path / "lock", busy="busy"):
        pass
    kill_group(process)


def test_lock_without_message_waits(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    entered = threading.Event()

    def wait_for_it() -> None:
        with locked(lock):
            entered.set()

    with locked(lock):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()


def test_lock_follows_a_replaced_file(tmp_path: Path) -> None:
    """A process that waited on a lock file which its holder has removed must lock the new file."""
    lock = tmp_path / "lock"
    entered = threading.Event()
    leave = threading.Event()

    def wait_for_it() -> None:
        with locked(lock):
            entered.set()
            leave.wait(5)

    with locked(lock):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert not entered.wait(0.2)
        lock.unlink()
    assert entered.wait(5)
    with pytest.raises(BusyError), locked(lock, "in use"):
        pass
    leave.set()
    thread.join()


def test_lock_survives_the_removal_of_its_folder(tmp_path: Path) -> None:
    """A build that ends removes its folder, while another build waits for the lock in it."""
    lock = tmp_path / "folder" / "lock"
    failure: list[BaseException] = []

    def wait_for_it() -> None:
        try:
            with locked(lock):
                pass
        except BaseException as error:
            failure.append(error)

    with locked(lock):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        threading.Event().wait(0.2)
        lock.parent.rename(tmp_path / "gone")
    thread.join(5)
    assert not failure


def test_hash_is_read_once_then_remembered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000_000)
    sizes: list[int] = []
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert known_sha256(path, sizes.append) == expected
    assert sum(sizes) == 10_000_000
    assert known_sha256(path, sizes.append) == expected
    assert sum(sizes) == 10_000_000


def test_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    with pytest.raises(
        DataError, match=rf"^{path}: wrong content: expected sha256 0000.*found [0-9a-f]+…; restore or remake the file$"
    ):
        check_sha256(path, "0" * 64)


@pytest.mark.parametrize("how", ["longer", "replaced", "in place, later", "in place, time set back"])
def test_changed_file_is_noticed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old!")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**10))
    status = path.stat()
    check_sha256(path, hashlib.sha256(b"old!").hexdigest())
    if how == "longer":
        path.write_bytes(b"newer")
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"new!")
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(path)
    else:
        with open(path, "r+b") as file:
            file.write(b"new!")
        if how == "in place, time set back":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError):
        check_sha256(path, hashlib.sha256(b"old!").hexdigest())


def test_file_changed_while_it_is_hashed_is_not_remembered_under_its_new_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 9_000_000)

    def change(_: int) -> None:
        with open(path, "r+b") as file:
            file.write(b"b")

    known_sha256(path, change)
    assert known_sha256(path) == sha256_file(path)


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"\xff", b'{"sha256": 5}'])
def test_damaged_note_is_not_believed(tmp_path: Path, cache: Path, note: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    remember_sha256(path, "0" * 64)
    (only,) = (cache / "sha256").iterdir()
    only.write_bytes(note)
    assert known_sha256(path) == hashlib.sha256(b"text").hexdigest()


def test_unwritable_cache_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"")
    monkeypatch.setattr(files, "cache_dir", lambda: blocked / "below")
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert known_sha256(path) == hashlib.sha256(b"text").hexdigest()


def test_root_is_the_project() -> None:
    assert (ROOT / "megazh" / "files.py").samefile(files.__file__)


def test_a_new_folder_has_one_writer(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as folder:
        (folder / "weights").write_text("first")
        with pytest.raises(BusyError, match=r"model: another command writes it"), new_folder(target):
            pass
    assert (target / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "nowhere" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    with new_folder(target) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_an_interrupted_call_left_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".model.unfinished" / "half").mkdir(parents=True)
    (tmp_path / ".model.replaced" / "old").mkdir(parents=True)
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "model") as folder:
        (folder / "nowhere" / "a").write_text("")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"], "it is there again"
    with new_folder(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_holder_of_a_lock_is_named_and_nobody_else(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert holder_of(lock) is None
    with locked(lock, "in use"):
        assert holder_of(lock) == f"process {os.getpid()} on {socket.gethostname()}"
    assert holder_of(lock) is None


def test_a_look_at_a_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    """Others look all the time; whoever takes the lock meanwhile gets it."""
    lock, ended = tmp_path / "lock", threading.Event()

    def look() -> None:
        while not ended.is_set():
            holder_of(lock)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with locked(lock, "in use"):
                pass
    finally:
        ended.set()
        for thread in threads:
            thread.join()
