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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from megazh.corpus.formats import remedy_for
from megazh.errors import DataError, UsageError

_SPECIAL = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_MOST_NAMED = 12  # entries of the line that tells what is left out
Identity = tuple[int, int]
"""Device and inode of a file: equal for all names of one real file."""


class LeftOut:
    """What was found and is not read, counted by suffix, name or kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._remedies: dict[str, list[str]] = {}

    def add(self, label: str, name: str, suffix: str = "") -> None:
        """Count a file.

        Args:
            label: what files of its kind have in common, such as `*.pdf`.
            name: its own name, which stands for the label if it is the only one.
            suffix: the suffix that makes it unreadable, if that is the reason.
        """
        self._counts[label] += 1
        self._first.setdefault(label, printable(name))
        remedy = remedy_for(suffix)
        if remedy and suffix not in self._remedies.setdefault(remedy, []):
            self._remedies[remedy].append(suffix)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def describe(self, most: int = _MOST_NAMED) -> str:
        """One line such as `12 *.pdf, 3 *.docx, README.md (to read them: save .docx, .pdf as .txt)`.

        Args:
            most: number of entries; the files of all others are only counted.
        """
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        parts = [self._first[label] if count == 1 else f"{count:,} {label}" for label, count in ordered[:most]]
        if rest := sum(count for _, count in ordered[most:]):
            parts.append(f"{rest:,} more")
        remedies = [
            f"{words[0]} {', '.join(sorted(suffixes))}{' '.join(['', *words[1:]])}"
            for remedy, suffixes in sorted(self._remedies.items())
            for words in [remedy.split(" ", 1)]
        ]
        return ", ".join(parts) + (f" (to read them: {'; '.join(remedies)})" if remedies else "")


def printable(name: str) -> str:
    """`name` with bytes that are not UTF-8 (as in a GBK file name) written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
    """By input: the paths that it stands for. One with a folder that was looked at under another name is not here."""

    def without_any(self, used: Iterable[Candidate]) -> str | None:
        """The first input that leads to none of the candidates `used`; None if there is no such input."""
        names = sorted(name for candidate in used for name in candidate.names)

        def leads_to_one(start: str) -> bool:
            return any(
                at < len(names) and (names[at] == start or names[at].startswith(f"{start}/"))
                for at in (bisect.bisect_left(names, start), bisect.bisect_left(names, f"{start}/"))
            )

        return next((given for given, starts in self.starts.items() if not any(map(leads_to_one, starts))), None)


def list_files(inputs: Sequence[str], left_out: LeftOut, ignored: Path | None = None) -> Files:
    """All files of the inputs, each real file once; what is left out for its kind is counted in `left_out`.

    Args:
        ignored: a folder that is passed over without a word.

    Raises:
        UsageError: an input does not exist, or matches nothing.
        DataError: a folder or file cannot be looked at, or a link leads nowhere.
    """
    if not inputs:
        raise UsageError("no input given; name files, folders or globs with --input")
    search = _Search(left_out, ignored)
    for given in inputs:
        search.start(given)
    return search.run()


@dataclass(frozen=True, order=True)
class _Path:
    path: str
    is_named: bool = False


class _Search:
    """Looks at real files and folders first, then at those behind links, then at those behind links in these ..."""

    def __init__(self, left_out: LeftOut, ignored: Path | None) -> None:
        self._left_out = left_out
        self._ignored = ignored.resolve() if ignored else None
        self._links: list[_Path] = []  # looked at in the next round
        self._now: list[_Path] = []
        self._files: list[tuple[_Path, Identity]] = []  # of this round
        self._folders: set[Identity] = set()
        self._found: dict[Identity, Candidate] = {}
        self._starts: dict[str, list[str]] = {}
        self._known: set[str] = set()

    def start(self, given: str) -> None:
        """Take an input of the user's."""
        if os.path.lexists(given):
            named = not os.path.isdir(given)
            found = [_Path(os.path.abspath(given), named)]
        else:
            if not glob.has_magic(given):
                raise UsageError(f"--input {given}: no such file or folder{_reason(given)}")
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
        starts = {
            given: paths for given, paths in self._starts.items() if not any(path in self._known for path in paths)
        }
        return Files(list(self._found.values()), starts)

    def _look(self, each: _Path) -> None:
        """Take a file, or all files of a folder."""
        status = _status(each.path)
        if stat.S_ISDIR(status.st_mode):
            self._walk(each.path, status)
        else:
            self._take(each, status)

    def _take(self, each: _Path, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            self._files.append((each, (status.st_dev, status.st_ino)))
            return
        kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), "special file")
        if each.is_named:
            raise UsageError(f"--input {each.path}: is a {kind}, not a file; write its contents to a file first")
        self._left_out.add(f"{kind}s", f"{os.path.basename(each.path)} ({kind})")

    def _walk(self, folder: str, status: os.stat_result) -> None:
        pending = [(folder, status)]
        while pending:
            folder, status = pending.pop()
            identity = status.st_dev, status.st_ino
            if identity in self._folders:
                self._known.add(folder)
                continue  # read already, under another name; also ends cycles
            self._folders.add(identity)
            if self._ignored and Path(folder).resolve() == self._ignored:
                continue
            entries = _entries(folder)
            kind = _own_folder(folder, {entry.name for entry in entries})
            if kind:
                self._left_out.add(f"{kind}s", f"{os.path.basename(folder)}/ ({kind})")
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
                "or remove it"
            ) from None
        raise _unreadable(path, error) from None


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
    if folder.endswith((".build", ".build.done")) and ("plan.json" in names or "lock" in names):
        return "unfinished index"
    return ""


def _reason(given: str) -> str:
    """Why a path cannot be seen, if it is not simply missing."""
    try:
        os.stat(given)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f" ({error.strerror})"
    return ""


def expand(pattern: str) -> Iterator[str]:
    """Absolute paths that match a glob, as `glob.glob` with `**` gives them, but ends where links lead in a circle.

    A name that begins with a dot matches only a pattern that begins with one.

    Raises:
        DataError: a folder cannot be read.
    """
    parts = PurePath(os.path.abspath(pattern)).parts
    plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    top = os.path.join(*parts[:plain])
    if os.path.isdir(top):
        yield from sorted(set(_below(top, parts[plain:], set())))


def _below(folder: str, parts: Sequence[str], seen: set[tuple[Identity, int]]) -> Iterator[str]:
    status = _status(folder)
    here = (status.st_dev, status.st_ino), len(parts)
    if here in seen:
        return
    seen.add(here)
    part, rest = parts[0], parts[1:]
    if part == "**":
        if rest:
            yield from _below(folder, rest, seen)
        for entry in _visible(_entries(folder)):
            if _is_folder(entry):
                yield from _below(entry.path, parts, seen)
            if not rest:
                yield entry.path
        return
    if not glob.has_magic(part):
        matches: Iterable[str] = [part] if os.path.lexists(os.path.join(folder, part)) else []
    else:
        entries = _entries(folder)
        names = [entry.name for entry in (entries if part.startswith(".") else _visible(entries))]
        matches = [name for name in names if fnmatch.fnmatchcase(name, part)]
    for name in matches:
        path = os.path.join(folder, name)
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _below(path, rest, seen)


def _visible(entries: Sequence[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    return [entry for entry in entries if not entry.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
