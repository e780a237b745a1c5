"""Write an index as a stream: memory use does not grow with the corpus, and the index appears whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError
from megazh.files import HashedFile, fsync_directory, remember_sha256
from megazh.index.format import CODES, Header
from megazh.index.mask import MaskWriter
from megazh.index.metadata import FileInfo, Files, length_histogram
from megazh.writing import writing

_STEP = 1 << 20  # documents per step when the .idx file is written


class IndexWriter:
    """Collects documents in `folder` and moves the finished files to a prefix.

    Call `append` any number of times, `finish` once, then `commit` once. Until `commit`, nothing outside
    `folder` changes. `folder` must be on the same file system as the prefix.

    Args:
        folder: working folder of the unfinished files; created if missing.
        dtype: dtype of the tokens, one that MMIDIDX has a code for.
        masked: whether the index gets a mask; see `megazh.index.mask`.
    """

    def __init__(self, folder: Path, dtype: np.dtype | type[np.generic], masked: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise DataError(
                f"tokens of dtype {self.dtype} cannot be stored; expected one of {', '.join(map(str, CODES))}"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: list[HashedFile] = []
        self._bin, self._docs = self._new("index.bin"), self._new("index.docs")
        self._lengths = self._new("index.lengths")
        self._mask = MaskWriter(self._new("index.mask")) if masked else None
        self.documents = 0
        self.tokens = 0
        self.histogram: dict[int, int] = {}
        """Number of documents by length, as in `metadata.length_histogram`."""

    def _new(self, name: str) -> HashedFile:
        try:
            file = HashedFile(self._folder / name)
        except BaseException:
            self.abandon()
            raise
        self._files.append(file)
        return file

    def append(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        hashes: npt.NDArray[np.uint64],
        trained: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add documents.

        Args:
            tokens: (tokens,) the documents' tokens, one document after the other, in the writer's dtype.
            lengths: (documents,) number of tokens of each document.
            hashes: (documents,) uint64 content hash of each document.
            trained: (tokens,) whether the loss covers each token; for an index with a mask, and only then.

        Raises:
            DataError: the dtype is another one, or the array lengths do not fit together.
            WriteError: the disk is full or gone.
        """
        if tokens.dtype != self.dtype:
            raise DataError(f"expected tokens of dtype {self.dtype}, found {tokens.dtype}")
        if int(lengths.sum()) != len(tokens) or len(lengths) != len(hashes):
            raise DataError(
                f"{len(lengths)} lengths with a sum of {int(lengths.sum())}, {len(hashes)} hashes and {len(tokens)} "
                "tokens do not fit together"
            )
        if (trained is None) != (self._mask is None) or (trained is not None and len(trained) != len(tokens)):
            raise DataError(f"a mask of {'no' if trained is None else len(trained)} tokens for {len(tokens)} tokens")
        self._bin.write(np.ascontiguousarray(tokens, self.dtype.newbyteorder("<")).data)
        self._lengths.write(np.ascontiguousarray(lengths, "<i4").data)
        self._docs.write(np.ascontiguousarray(hashes, "<u8").data)
        if self._mask is not None and trained is not None:
            self._mask.append(trained)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        for edge, count in length_histogram(lengths).items() if len(lengths) else ():
            self.histogram[edge] = self.histogram.get(edge, 0) + count

    def finish(self) -> Files:
        """Complete the files and flush them to disk; returns their sizes and hashes.

        Raises:
            DataError: no document was added.
            WriteError: the disk is full or gone.
        """
        try:
            return self._finish()
        except BaseException:
            self.abandon()
            raise

    def _finish(self) -> Files:
        if not self.documents:
            raise DataError(
                "no document to index: the input is empty, or all of it was rejected; look at --input and --text-key"
            )
        idx = self._new("index.idx")
        idx.write(Header(self.dtype, self.documents, self.documents + 1).pack())
        lengths = np.memmap(self._lengths.path, "<i4", "r")
        for at in range(0, self.documents, _STEP):
            idx.write(lengths[at : at + _STEP].tobytes())
        start = 0
        for at in range(0, self.documents, _STEP):
            ends = start + np.cumsum(lengths[at : at + _STEP], dtype=np.int64)
            idx.write(((ends - lengths[at : at + _STEP]) * self.dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1])
        for at in range(0, self.documents + 1, _STEP):
            idx.write(np.arange(at, min(at + _STEP, self.documents + 1), dtype="<i8").tobytes())
        del lengths
        self._lengths.discard()  # a scratch file
        mask = None if self._mask is None else self._mask.finish()
        return Files(bin=_closed(self._bin), idx=_closed(idx), docs=_closed(self._docs), mask=mask)

    def commit(self, prefix: Path, files: Files, beside: dict[str, Path], absent: Sequence[str] = ()) -> None:
        """Move the finished files to `prefix`. They become an index with the last rename, that of the `.idx`.

        The `.idx` of an older index at `prefix` is deleted first: another process that opens the prefix in between
        finds no index, never files of two. A mask of an older index is deleted if this one has none.

        Args:
            prefix: path of the index without suffix.
            files: result of `finish`.
            beside: further finished files of the index, by the suffix that they get; flushed to disk here.
            absent: suffixes of files to delete: an older index may have them, this one does not.

        Raises:
            WriteError: the disk fails, or the files of an older index may not be replaced.
        """
        with writing(prefix):
            self._commit(prefix, beside, absent)
        for suffix, info in files.by_suffix().items():
            remember_sha256(Path(f"{prefix}{suffix}"), info.sha256)

    def _commit(self, prefix: Path, beside: dict[str, Path], absent: Sequence[str]) -> None:
        for path in beside.values():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        target = Path(f"{prefix}.idx")
        if target.exists():
            target.unlink()
            fsync_directory(prefix.parent)
        for suffix in absent if self._mask is not None else (*absent, ".mask"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        for suffix, path in beside.items():
            os.rename(path, f"{prefix}{suffix}")
        os.rename(self._bin.path, f"{prefix}.bin")
        os.rename(self._docs.path, f"{prefix}.docs")
        if self._mask is not None:
            os.rename(self._mask.path, f"{prefix}.mask")
        fsync_directory(prefix.parent)
        os.rename(self._folder / "index.idx", target)
        fsync_directory(prefix.parent)

    def abandon(self) -> None:
        """Close and remove the unfinished files, so that their space is free again."""
        for file in self._files:
            file.discard()


def _closed(file: HashedFile) -> FileInfo:
    file.close()
    return FileInfo(bytes=file.size, sha256=file.sha256)
