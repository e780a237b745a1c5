"""Data sets read as conversations, one after another, with counts of what was kept, trimmed and rejected."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megazh.conversation.conversation import Conversation
from megazh.conversation.faults import Fault, RowError
from megazh.conversation.forms import conversation_of
from megazh.conversation.registry import DataSet
from megazh.conversation.rejects import Rejects
from megazh.conversation.rows import find_rows, read_rows
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Listing, Source
from megazh.errors import Collector, DataError, UsageError
from megazh.progress import Progress


@dataclass(frozen=True)
class Sample:
    """A conversation, and the row that it comes from."""

    conversation: Conversation
    set: str
    """Name of its data set."""
    file: str
    """Name of its file within the set."""
    row: int
    """Number of the line, of the element of a JSON array, or of the row of a table, from 1."""


@dataclass
class Count:
    """What became of the rows of a data set."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason."""
    trimmed: Counter[str] = field(default_factory=Counter)
    """What was left out of rows that were kept."""
    first: str = ""
    """File, line and detail of the first rejected row."""

    def describe(self) -> str:
        """One line, such as `9 conversations; 1 row rejected: 1 no answer`."""
        parts = [f"{self.kept:,} conversations"]
        for what, counts in (("rows rejected", self.rejected), ("parts left out", self.trimmed)):
            if counts:
                parts.append(
                    f"{counts.total():,} {what}: "
                    + ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
                )
        if self.first:
            parts.append(f"the first: {self.first}{self.remedy}")
        return "; ".join(parts)

    @property
    def remedy(self) -> str:
        """What to do about the rejected rows, to follow their reasons; empty where nothing is known to help."""
        if self.kept or Fault.MISSING_KEY.value not in self.rejected:
            return ""
        return "; name the columns of these rows in a registry (columns: {prompt: ..., response: ...})"


class DataSets:
    """Data sets whose files have been found.

    Args:
        sets: the sets, as `megazh.conversation.registry.sets_of` gives them.
        format: format of all files; by default, each file's suffix decides.
        encoding: encoding of JSON and JSONL, as `megazh.corpus.encodings.normal_encoding` gives it.

    Raises:
        UsageError: a set leads to no file, or to one that cannot hold rows.
        DataError: a file cannot be read, or is not what its suffix says.
    """

    def __init__(self, sets: Sequence[DataSet], format: Format | None = None, encoding: str | None = None) -> None:
        self.sets = tuple(sets)
        self._listings: list[Listing] = []
        self._options = ReadOptions(encoding=encoding)
        errors = Collector()
        for each in self.sets:
            with errors.collecting():
                listing, self._options = _found(each, format, encoding)
                self._listings.append(listing)
        errors.raise_all()
        self.counts = {each.name: Count() for each in self.sets}
        """What became of the rows of each set, so far in the present or latest `read`."""

    @property
    def size(self) -> int:
        """Size of all files in bytes, for a progress bar."""
        return sum(source.size for listing in self._listings for source in listing.sources)

    @property
    def sources(self) -> list[Source]:
        """The files of all sets, in the order in which they are read."""
        return [source for listing in self._listings for source in listing.sources]

    def notes(self) -> list[str]:
        """Lines for the person at the terminal: which files are left out or empty."""
        return [line for listing in self._listings for line in listing.notes()]

    def read(self, rejects: Rejects | None = None, progress: Progress | None = None) -> Iterator[Sample]:
        """The conversations of all sets: sets in their order, files by path, rows as they come; the same every time.

        Nothing larger than a row (a few hundred rows of a table) is held in memory, also of a JSON array.

        Args:
            rejects: takes the rows that are refused; by default they are only counted.
            progress: counts the bytes of the files.

        Raises:
            DataError: files are damaged; the message names the places. Raised after the last sample: all whole rows
                before the damage, and all other files, were read.
        """
        damaged = Collector()
        for each in self.sets:
            self.counts[each.name] = Count()
        for data_set, listing in zip(self.sets, self._listings, strict=True):
            for source in listing.sources:
                try:
                    yield from self._read_file(data_set, source, rejects, progress)
                except DataError as error:
                    damaged.add(error)
        damaged.raise_all()

    def _read_file(
        self, data_set: DataSet, source: Source, rejects: Rejects | None, progress: Progress | None
    ) -> Iterator[Sample]:
        count, before = self.counts[data_set.name], 0
        rows = read_rows(source, self._options)
        while count.kept != data_set.limit and (row := next(rows, None)):
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                reading = conversation_of(row.value, data_set.layout)
            except RowError as error:
                count.rejected[error.fault.value] += 1
                count.first = count.first or f"{source.name} line {row.line:,}: {error.detail}"
                if rejects:
                    rejects.add(f"{data_set.name}: {source.name}", row.line, error)
            else:
                count.kept += 1
                count.trimmed.update(trim.value for trim in reading.trims)
                yield Sample(reading.conversation, data_set.name, source.name, row.line)
            if progress:
                progress.advance(row.position - before)
                before = row.position
        if progress:
            progress.advance(source.size - before)


def _found(data_set: DataSet, format: Format | None, encoding: str | None) -> tuple[Listing, ReadOptions]:
    try:
        return find_rows(data_set.inputs, format, encoding)
    except (UsageError, DataError) as error:
        if not data_set.origin:
            raise
        raise type(error)(f"{data_set.origin}: {error}") from None
