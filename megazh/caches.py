"""Where derived files go that may be deleted at any time: to the first folder that this user can write to."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from megazh.errors import WriteError
from megazh.writing import warn_once

_NOWHERE = Path("/dev/null/megazh")
"""A folder that cannot exist: reading there finds nothing, and writing fails with an OSError."""
_LEAST_BYTES = 16 << 20  # a disk with less room is taken for full

# Compilers and plotters that megazh calls keep caches of their own below the home folder: each with the variable that
# moves it. Without a home, Triton and torch fail, and Matplotlib complains.
_FOREIGN = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "MPLCONFIGDIR": "matplotlib",
}


def cache_dir() -> Path:
    """The folder of derived files, made if need be.

    The first of these that can be written and is not full: `MEGAZH_CACHE`, `XDG_CACHE_HOME/megazh`,
    `~/.cache/megazh`, and a folder `megazh-UID` of this user alone in the folder of temporary files. Where there is
    none, a folder that cannot exist: whoever keeps something there has to do without.
    """
    return _first_usable(tuple(_candidates()))


def own_folder(name: str) -> Path | None:
    """A folder below `cache_dir` to which nobody but this user can write, made if need be; None if there is none.

    For files that are executed when they are read back.
    """
    folder = cache_dir() / f"{name}-{os.geteuid()}"
    return folder if _made_own(folder) else None


def provide_caches() -> None:
    """Point the caches of libraries below `cache_dir` where the home folder cannot be written to.

    Sets variables of this process's environment, except those that the user has set.
    """
    home = _home()
    if home is not None and _has_room(home):
        return
    for variable, name in _FOREIGN.items():
        if variable not in os.environ and (folder := own_folder(name)) is not None:
            os.environ[variable] = str(folder)


def warn_not_kept(path: Path, error: Exception) -> None:
    """Warn, once, that `path` could not be put into the cache."""
    if path.is_relative_to(_NOWHERE):
        error = WriteError("caches: no folder for them can be written (MEGAZH_CACHE names one)")
    warn_once(path, error, "nothing is kept there: results are the same, starts take longer")


def _candidates() -> Iterator[Path]:
    if named := os.environ.get("MEGAZH_CACHE"):
        yield Path(named).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg.startswith("/"):  # the XDG specification: relative paths are ignored
        yield Path(xdg) / "megazh"
    home = _home()
    if home is not None:
        yield home / ".cache" / "megazh"
    for temporary in (os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        if temporary.startswith("/"):
            yield Path(temporary) / f"megazh-{os.geteuid()}"


def _home() -> Path | None:
    """The user's home folder; None where there is none. It is never made: root could, at /nonexistent."""
    with contextlib.suppress(RuntimeError):
        home = Path.home()  # HOME, else the table of users
        return home if home.is_absolute() and home != Path("/") and home.is_dir() else None
    return None


@functools.cache
def _first_usable(candidates: tuple[Path, ...]) -> Path:
    for folder in candidates:
        if folder.name == f"megazh-{os.geteuid()}":  # its parent is open to all users
            if _made_own(folder) and _usable(folder):
                return folder
        elif _usable(folder):
            return folder
    return _NOWHERE


def _usable(folder: Path) -> bool:
    """Whether `folder` is there, or can be made, and can be written to and is not full."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return _has_room(folder)
    return False


def _has_room(folder: Path) -> bool:
    """Whether files can be made in a folder, and its disk is not full."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        full = disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < _LEAST_BYTES
        no_inode = disk.f_files > 0 and disk.f_favail == 0
        return os.access(folder, os.W_OK | os.X_OK) and not full and not no_inode
    return False


def _made_own(folder: Path) -> bool:
    """Whether `folder`, made if need be, is a real folder of this user to which nobody else can write."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    own = status.st_uid == os.geteuid() and status.st_mode & 0o022 == 0
    return own and folder.is_dir() and not folder.is_symlink() and os.access(folder, os.W_OK | os.X_OK)
