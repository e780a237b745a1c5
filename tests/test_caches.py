"""Caches go where they can: every command works, with the same results, for users without a home of their own."""

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import drop_root
from textdata import ROOT, finish, start

from megazh import caches
from megazh.caches import cache_dir, own_folder, provide_caches, warn_not_kept
from megazh.writing import write_error

OWN = f"megazh-{os.geteuid()}"
VARIABLES = ("MEGAZH_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR", *caches._FOREIGN)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable names a folder, but TMPDIR; a user whom the system does not know."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MEGAZH_WARNED", "")
    caches._first_usable.cache_clear()
    return tmp_path


def blocked(folder: Path) -> Path:
    """A path at which not even root can make a folder."""
    (folder / "file").touch()
    return folder / "file" / "below"


def test_the_first_place_that_can_be_written(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    assert cache_dir() == bare / OWN
    monkeypatch.setenv("HOME", str(bare / "home"))
    assert cache_dir() == bare / OWN, "a home that is missing is not made"
    (bare / "home").mkdir()
    caches._first_usable.cache_clear()
    assert cache_dir() == bare / "home" / ".cache" / "megazh"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "xdg"))
    assert cache_dir() == bare / "xdg" / "megazh"
    monkeypatch.setenv("MEGAZH_CACHE", str(bare / "named"))
    assert cache_dir() == bare / "named"
    monkeypatch.setenv("MEGAZH_CACHE", str(blocked(bare)))
    assert cache_dir() == bare / "xdg" / "megazh"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == bare / "home" / ".cache" / "megazh"
    monkeypatch.setenv("HOME", str(blocked(bare)))
    assert cache_dir() == bare / OWN


def test_a_full_disk_is_passed_over(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "stuffed"))
    real = os.statvfs

    def statvfs(path: Path) -> Any:
        found = real(path)
        return os.statvfs_result([*found[:4], 5, *found[5:]]) if "stuffed" in str(path) else found

    monkeypatch.setattr(caches.os, "statvfs", statvfs)
    assert cache_dir() == bare / OWN


def test_the_folder_among_those_of_others_is_this_users_alone(bare: Path) -> None:
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_a_folder_that_another_may_have_put_there_is_not_used(bare: Path, trap: str) -> None:
    (bare / "elsewhere").mkdir()
    if trap == "a link":
        (bare / OWN).symlink_to(bare / "elsewhere")
    elif trap == "a file":
        (bare / OWN).touch()
    else:
        (bare / OWN).mkdir()
        (bare / OWN).chmod(0o777)
    assert cache_dir() != bare / OWN
    assert not any((bare / "elsewhere").iterdir())


def test_compiled_code_is_not_read_from_a_folder_to_which_others_can_write(
    monkeypatch: pytest.MonkeyPatch, bare: Path
) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(bare / "shared"))
    found = own_folder("numba")
    assert found is not None
    assert found.parent == bare / "shared"
    found.chmod(0o777)
    assert own_folder("numba") is None


def test_without_any_place_one_warning(
    monkeypatch: pytest.MonkeyPatch, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caches, "_candidates", lambda: iter([blocked(bare)]))
    folder = cache_dir()
    assert own_folder("numba") is None
    provide_caches()
    for _ in range(2):
        with pytest.raises(OSError, match="Not a directory") as failed:
            (folder / "below").mkdir(parents=True)
        warn_not_kept(folder, write_error(folder / "below", failed.value))
    assert capsys.readouterr().err == (
        "warning: caches: no folder for them can be written (MEGAZH_CACHE names one); nothing is kept there: results "
        "are the same, starts take longer\n"
    )


def test_libraries_get_folders_where_the_home_cannot_be_written(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", "/of/the/user")
    monkeypatch.setenv("HOME", str(bare))
    provide_caches()
    assert "TRITON_CACHE_DIR" not in os.environ, "a home that works is left alone"
    monkeypatch.setenv("HOME", "/nonexistent")
    provide_caches()
    found = {name: os.environ.pop(name) for name in caches._FOREIGN}
    assert found.pop("MPLCONFIGDIR") == "/of/the/user"
    assert all(Path(folder).is_dir() and Path(folder).parent == bare / OWN for folder in found.values()), found


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which nothing can be written, as in a repository of another user."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "megazh", root / "megazh", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o500)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("temporary", [True, False])
def test_a_command_that_compiles_works_in_a_read_only_place_without_a_home(
    read_only: Path, stories: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, temporary: bool
) -> None:
    """`temporary`: whether there is a folder for temporary files; else nothing can be written anywhere."""
    cold = "from megazh import caches; caches._candidates = lambda: iter([]); from megazh.cli import main; main()"
    cache = tmp_path_factory.getbasetemp()
    words = ["-m", "megazh"] if temporary else ["-c", cold]
    arguments = ["mixture", "show", stories, "--seq-len", "64"]
    env = {"HOME": str(read_only), "PYTHONPATH": str(read_only), "TMPDIR": str(tmp_path)}
    process = start(sys.executable, "-P", *words, *arguments, env=env, preexec_fn=drop_root)
    code, out, err = finish(process)
    assert code == 0, err
    expected = finish(start(sys.executable, "-m", "megazh", *arguments, env={"MEGAZH_CACHE": str(cache)}))
    assert out == expected[1]
    if temporary:
        assert err == ""
        assert list((tmp_path / OWN).glob("numba-*/**/*.nbc")), "the next start need not compile"
    else:
        assert err.count("\n") == 1
        assert err.startswith("warning: caches: no folder")
        assert not list(tmp_path.iterdir())
    assert not list(read_only.rglob("*.nb?"))
