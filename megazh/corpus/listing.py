"""From the inputs that a user names (files, folders, globs) to paths of files, each real file once.

What the user names by its own path is read, or is an error. What a folder or a glob brings is looked through: hidden
files and folders, special files and the run folders of this project are left out and counted.
"""

import bisect
import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NoReturn

from megazh.corpus.formats import remedy_for
from megazh.errors import DataError, UsageError

_SPECIAL = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_MOST_NAMED = 16  # entries of the line that tells what is left out
_FEW_NAMES = 3  # names of one kind that are told; of more, only the kind
Identity = tuple[int, int | str, int]
"""Device, inode and time of modification of a file or folder: equal for all names of a real one."""


class LeftOut:
    """What was found and is not read, counted by name, suffix or kind."""

    def __init__(self) -> None:
        self._names: dict[str, Counter[str]] = {}  # by label
        self._by_suffix: set[str] = set()  # labels
        self._remedies: dict[str, set[str]] = {}

    def add(self, label: str, name: str, suffix: str = "") -> None:
        """Count a file.

        Args:
            label: what files of its kind have in common, such as `*.pdf`.
            name: its own name, which is told if there are few of its kind; if a suffix is the reason, if it is alone.
            suffix: the suffix that makes it unreadable, if that is the reason.
        """
        self._names.setdefault(label, Counter())[_on_one_line(name)] += 1
        if suffix:
            self._by_suffix.add(label)
        if remedy := remedy_for(suffix):
            self._remedies.setdefault(remedy, set()).add(suffix)

    def __bool__(self) -> bool:
        return bool(self._names)

    def describe(self, most: int | None = _MOST_NAMED) -> str:
        """One line such as `12 *.pdf, 3 *.docx, README.md (to read them: save .docx, .pdf as .txt)`.

        Args:
            most: number of entries; the files of all others are only counted. None for all entries.
        """
        entries: list[tuple[int, str]] = []
        for label, names in self._names.items():
            if len(names) > (1 if label in self._by_suffix else _FEW_NAMES):
                entries.append((names.total(), label))
            else:
                entries += ((count, name) for name, count in names.items())
        entries.sort(key=lambda entry: (-entry[0], entry[1]))
        parts = [name if count == 1 else f"{count:,} {name}" for count, name in entries[:most]]
        if most is not None and (rest := sum(count for count, _ in entries[most:])):
            parts.append(f"{rest:,} more")
        remedies = []
        for remedy, suffixes in sorted(self._remedies.items()):
            verb, _, how = remedy.partition(" ")
            remedies.append(f"{verb} {', '.join(sorted(suffixes))} {how}".strip())
        return ", ".join(parts) + (f" (to read them: {'; '.join(remedies)})" if remedies else "")


def printable(name: str) -> str:
    """`name` with bytes that are not UTF-8 (as in a GBK file name) written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _on_one_line(name: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in printable(name))


@dataclass
class Candidate:
    """A real file, under all names that lead to it."""

    names: list[str] = field(default_factory=list)
    """Absolute paths; those without a link on the way come first, each group sorted."""
    is_named: bool = False
    """Whether the user named it by its own path."""


@dataclass
class Files:
    """All files that some inputs lead to."""

    candidates: list[Candidate]
    starts: dict[str, list[str]]
    """By input: the paths that it stands for."""
    known: list[str]
    """Folders that had been looked at under another name."""

    def without_any(self, used: Iterable[Candidate]) -> str | None:
        """The first input that leads to none of the candidates `used`; None if there is no such input."""
        names = sorted([*self.known, *(name for candidate in used for name in candidate.names)])

        def leads_to_one(start: str) -> bool:
            return any(
                at < len(names) and (names[at] == start or names[at].startswith(f"{start}/"))
                for at in (bisect.bisect_left(names, start), bisect.bisect_left(names, f"{start}/"))
            )

        return next((given for given, starts in self.starts.items() if not any(map(leads_to_one, starts))), None)


def list_files(
    inputs: Sequence[str], left_out: LeftOut, ignored: Path | None = None, tick: Callable[[], object] = lambda: None
) -> Files:
    """All files of the inputs, each real file once; what is left out for its kind is counted in `left_out`.

    Args:
        ignored: a folder that is passed over without a word.
        tick: called for each folder.

    Raises:
        UsageError: an input does not exist, or matches nothing.
        DataError: a folder or file cannot be looked at, or a link leads nowhere.
    """
    if not inputs:
        raise UsageError("no input given; name files, folders or globs with --input")
    search = _Search(left_out, ignored, tick)
    for given in inputs:
        search.start(given)
    return search.run()


@dataclass(frozen=True, order=True)
class _Path:
    path: str
    is_named: bool = False


class _Search:
    """Looks at real files and folders first, then at those behind links, then at those behind links in these ..."""

    def __init__(self, left_out: LeftOut, ignored: Path | None, tick: Callable[[], object]) -> None:
        self._left_out, self._tick = left_out, tick
        self._ignored = ignored.resolve() if ignored else None
        self._links: list[_Path] = []  # looked at in the next round
        self._now: list[_Path] = []
        self._files: list[tuple[_Path, Identity]] = []  # of this round
        self._folders: set[Identity] = set()
        self._found: dict[Identity, Candidate] = {}
        self._starts: dict[str, list[str]] = {}
        self._known: list[str] = []
        self._special: set[Identity] = set()

    def start(self, given: str) -> None:
        """Take an input of the user's."""
        if os.path.lexists(given):
            named = not os.path.isdir(given)
            found = [_Path(os.path.abspath(given), named)]
        else:
            if not glob.has_magic(given):
                _refuse_missing(given)
            found = [_Path(path) for path in expand(given)]
            if not found:
                raise UsageError(f"--input {given}: no file matches")
        self._starts[given] = [each.path for each in found]
        for each in found:
            (self._links if os.path.islink(each.path) else self._now).append(each)

    def run(self) -> Files:
        while self._now or self._links:
            for each in sorted(self._now):
                self._look(each)
            for each, identity in sorted(self._files):
                candidate = self._found.setdefault(identity, Candidate())
                if each.path not in candidate.names:
                    candidate.names.append(each.path)
                candidate.is_named |= each.is_named
            self._now, self._links, self._files = self._links, [], []
        return Files(list(self._found.values()), self._starts, self._known)

    def _look(self, each: _Path) -> None:
        """Take a file, or all files of a folder."""
        status = _status(each.path)
        if stat.S_ISDIR(status.st_mode):
            self._walk(each.path, status)
        else:
            self._take(each, status)

    def _take(self, each: _Path, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            self._files.append((each, _identity(each.path, status)))
            return
        kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), "special file")
        if each.is_named:
            raise UsageError(f"--input {each.path}: is a {kind}, not a file; write its contents to a file first")
        identity = _identity(each.path, status)
        if identity in self._special:
            return
        self._special.add(identity)
        self._left_out.add(f"{kind}s", f"{os.path.basename(each.path)} ({kind})")

    def _walk(self, folder: str, status: os.stat_result) -> None:
        pending = [(folder, status)]
        while pending:
            folder, status = pending.pop()
            identity = _identity(folder, status)
            if identity in self._folders:
                self._known.append(folder)
                continue  # read already, under another name; also ends cycles
            self._folders.add(identity)
            self._tick()
            if self._ignored and Path(folder).resolve() == self._ignored:
                continue
            entries = _entries(folder)
            kind = _own_folder(folder, {entry.name for entry in entries})
            if kind:
                self._left_out.add(kind, f"{os.path.basename(folder)}/ ({kind})")
                continue
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    self._left_out.add("hidden", entry.name + "/" * entry.is_dir(follow_symlinks=False))
                elif entry.is_symlink():
                    self._links.append(_Path(path))
                else:
                    below = _status(path)
                    if stat.S_ISDIR(below.st_mode):
                        pending.append((path, below))
                    else:
                        self._take(_Path(path), below)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise DataError(
                f"{path}: a link to {os.readlink(path)}, which cannot be followed ({error.strerror}); repair the link, "
                "or leave it out"
            ) from None
        raise _unreadable(path, error) from None


def _identity(path: str, status: os.stat_result) -> Identity:
    """The time is part of it since some network file systems give one inode number to several files, or none at all."""
    return status.st_dev, status.st_ino or os.path.realpath(path), status.st_mtime_ns


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; make it readable, or name the files to read")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _own_folder(folder: str, names: set[str]) -> str:
    """What a folder of this project's own files is; "" for any other folder."""
    if {"run.json", "config.yaml"} <= names:
        return "run folder"
    if {"prepared.json", "mixture.yaml"} <= names:
        return "prepared data"
    if folder.endswith((".build", ".build.done")) and ("plan.json" in names or "lock" in names):
        return "unfinished index"
    return ""


def _refuse_missing(given: str) -> NoReturn:
    """Raises the error for an input that cannot be seen."""
    try:
        os.stat(given)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise DataError(f"{given}: cannot be read: {error.strerror}") from None
    raise UsageError(f"--input {given}: no such file or folder")


def expand(pattern: str) -> list[str]:
    """Sorted absolute paths that match a glob, as `glob.glob` with `**` gives them; links in a circle end.

    A name that begins with a dot matches only a pattern that begins with one.

    Raises:
        DataError: a folder cannot be read.
    """
    parts = PurePath(os.path.abspath(pattern)).parts
    plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    top = os.path.join(*parts[:plain])
    if not os.path.isdir(top):
        return []
    found: set[str] = set()
    seen: set[tuple[Identity, int]] = set()
    now: list[_Place] = [(top, parts[plain:])]
    while now:  # as in _Search: links are followed after all that needs none
        links: list[_Place] = []
        for folder, rest in now:
            _match(folder, rest, seen, found, links)
        now = sorted(links)
    return sorted(found)


_Place = tuple[str, tuple[str, ...]]  # a folder, and the parts of a pattern that are to match below it


def _match(
    folder: str, parts: tuple[str, ...], seen: set[tuple[Identity, int]], found: set[str], links: list[_Place]
) -> None:
    """Add what matches in a folder to `found`; links to folders that may hold more are added to `links`."""
    status = _status(folder)
    here = _identity(folder, status), len(parts)
    if here in seen:
        return
    seen.add(here)
    part, rest = parts[0], parts[1:]
    if part == "**":
        if rest:
            _match(folder, rest, seen, found, links)
        for entry in _entries(folder):
            if not entry.name.startswith("."):
                _enter(entry.path, parts, seen, found, links)
                if not rest:
                    found.add(entry.path)
        return
    if not glob.has_magic(part):
        matches = [part] if os.path.lexists(os.path.join(folder, part)) else []
    else:
        matches = [
            entry.name
            for entry in _entries(folder)
            if fnmatch.fnmatchcase(entry.name, part) and (part.startswith(".") or not entry.name.startswith("."))
        ]
    for name in matches:
        path = os.path.join(folder, name)
        if rest:
            _enter(path, rest, seen, found, links)
        else:
            found.add(path)


def _enter(
    path: str, parts: tuple[str, ...], seen: set[tuple[Identity, int]], found: set[str], links: list[_Place]
) -> None:
    if os.path.isdir(path):
        if os.path.islink(path):
            links.append((path, parts))
        else:
            _match(path, parts, seen, found, links)
