"""A sample of the text in some sources: a given amount, spread evenly over all of it, the same each time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import Piece, cut, open_parquet, piece_size, piece_sources, read_block
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Source
from megazh.corpus.streams import is_stream, open_stream
from megazh.progress import Progress

_MEASURED = 8 << 20  # bytes of a compressed file that are decompressed to estimate its uncompressed size
_READ = 8  # of files that can be read in parts, so many times the sample is read
_PIECES = 1024  # into which a source is cut, as far as they are between 64 KiB and 16 MiB
_LONGEST_PART = 1 << 12  # characters; a longer document is kept in parts


@dataclass
class Sample:
    """What was read for a sample; complete once its texts have been consumed."""

    input_bytes: int
    """Size of all sources; where a sample is taken, uncompressed, which is estimated for compressed files."""
    everything: bool
    """Whether the sample is all there is."""
    text_bytes: int = 0
    """Text in the sample, in UTF-8 bytes."""


def sample_texts(
    sources: Sequence[Source], options: ReadOptions, size: int | None
) -> tuple[Sample, Iterator[list[str]]]:
    """Lists of texts from all `sources`, about `size` bytes of input in all.

    Each source gives the same share of its bytes, from everywhere in it: pieces at even distances are read (compressed
    files have to be decompressed as a whole), and documents at even distances of these are kept; of a document above
    4,096 characters, parts.

    Args:
        sources: files of text.
        options: how documents in `sources` are found.
        size: bytes of input, uncompressed. None, or more than there is, gives all documents, none of them in parts.

    Returns:
        The counts, and the texts; reading them shows progress.

    Raises:
        DataError: a source is damaged, while the texts are read or compressed files are measured.
    """
    sizes = [source.size for source in sources] if size is None else _raw_sizes(sources, options)
    everything = size is None or size >= sum(sizes)
    sample = Sample(sum(sizes), everything)

    def counted() -> Iterator[list[str]]:
        with Progress("reading", sum(source.size for source in sources)) as progress:
            chosen = (
                _all(sources, options, progress)
                if size is None or everything
                else _chosen(sources, sizes, options, size / sum(sizes), progress)
            )
            for texts in chosen:
                sample.text_bytes += sum(len(text.encode()) for text in texts)
                yield texts

    return sample, counted()


def _raw_sizes(sources: Sequence[Source], options: ReadOptions) -> list[int]:
    found = []
    with Progress("measuring", sum(source.size for source in sources)) as progress:
        for source in sources:
            found.append(_raw_size(source, options))
            progress.advance(source.size)
    return found


def _raw_size(source: Source, options: ReadOptions) -> int:
    """Size of a source, uncompressed; of one that has to be read as a whole, it is estimated from the beginning."""
    if source.format is Format.PARQUET:
        with open_parquet(source.path) as parquet:
            return sum(parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups))
    if not is_stream(source, options):
        return source.size
    stream = open_stream(source, options)
    found = 0
    while found < _MEASURED:
        block = read_block(stream)
        if not block:
            return found
        found += len(block)
    return found * source.size // max(stream.tell(), 1)


def _all(sources: Sequence[Source], options: ReadOptions, progress: Progress) -> Iterator[list[str]]:
    for piece in cut(sources, options, piece_size(sources)):
        for batch in read_piece(piece_sources(sources, piece, options), piece, options):
            yield batch.texts
        progress.advance(piece.weight)


def _chosen(
    sources: Sequence[Source], sizes: Sequence[int], options: ReadOptions, share: float, progress: Progress
) -> Iterator[list[str]]:
    def unit(number: int) -> int:
        """Files that are one document each are cut into pieces together; all others by themselves."""
        whole = sources[number].format is Format.TEXT and options.text_documents is TextDocuments.FILE
        return -1 if whole else number

    thinning = _Thinning()
    for _, numbers in itertools.groupby(range(len(sources)), unit):
        members = list(numbers)
        files = sources[members[0] : members[-1] + 1]
        raw = max(sum(sizes[number] for number in members), 1)
        for piece, kept in _pieces(files, raw, options, share):
            if kept:
                for batch in read_piece(piece_sources(files, piece, options), piece, options):
                    if texts := thinning.keep(batch.texts, kept):
                        yield texts
            progress.advance(piece.weight)


def _pieces(files: Sequence[Source], raw: int, options: ReadOptions, share: float) -> Iterator[tuple[Piece, float]]:
    """All pieces of `files`, each with the share of it to keep: 0 for those between the ones that are read."""
    size = min(max(raw // _PIECES, 1 << 16), 16 << 20)
    reads = max(round(_READ * share * raw / size), 1)  # at the middles of so many equal parts of the files
    disk = max(sum(source.size for source in files), 1)
    position = 0.0
    for piece in cut(files, options, size):
        weight = len(piece.data) if piece.data is not None else piece.weight * raw / disk
        end = position + weight
        hits = round(end * reads / raw) - round(position * reads / raw)
        position = end
        yield piece, min(hits * share * raw / (reads * weight), 1.0) if hits else 0.0


class _Thinning:
    """Keeps a share of a stream of documents, at even distances; counts what it owes in bytes of text."""

    def __init__(self) -> None:
        self._owed = 0.0

    def keep(self, texts: Sequence[str], share: float) -> list[str]:
        """Those of the documents, or parts of long ones, that are kept."""
        kept = []
        for text in texts:
            for at in range(0, len(text), _LONGEST_PART):
                part = text[at : at + _LONGEST_PART]
                size = len(part.encode())
                self._owed += share * size
                if self._owed > 0:
                    kept.append(part)
                    self._owed -= size
        return kept
