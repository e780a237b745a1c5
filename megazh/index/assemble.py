"""Join the finished pieces of a build in order, and keep account of rejected records."""

import contextlib
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import Piece, piece_sources
from megazh.corpus.records import Reason
from megazh.corpus.sources import Source
from megazh.errors import DataError, WorkerError, WriteError
from megazh.files import NewFile
from megazh.index.metadata import Coverage, Files
from megazh.index.piece import FinishedPiece, piece_path, read_piece_file
from megazh.index.writer import IndexWriter

_EARLY_RECORDS = 1000  # from here on, a build stops as soon as most records are bad
_EARLY_CHARACTERS = 100_000  # from here on, a build stops as soon as most characters have no token


class Assembly:
    """Takes pieces in any order and writes them in the order of the calls of `expect`.

    Args:
        folder: folder of the build, with the piece files and the unfinished index.
        dtype: dtype of the tokens.
        sources: all sources of the build.
        options: options with which the sources are read.
        max_bad: largest share of records that may be rejected.
        max_lost: largest share of characters that no token may stand for.
        eod_id: end-of-document id.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        sources: Sequence[Source],
        options: ReadOptions,
        max_bad: float,
        max_lost: float,
        eod_id: int,
    ) -> None:
        self._folder, self._dtype, self._sources, self._options = folder, dtype, sources, options
        self._max_bad, self._max_lost, self._eod_id = max_bad, max_lost, eod_id
        self._order: deque[Piece] = deque()
        self._done: dict[str, tuple[str, FinishedPiece | None]] = {}
        self._lines: dict[int, int] = {}  # lines of each source in the pieces written so far
        self.writer = IndexWriter(folder, dtype)
        self.rejected_path = folder / "rejected.jsonl"
        self._rejected_file = NewFile(self.rejected_path)
        self.records = 0
        """Number of lines or rows: documents, empty and bad ones."""
        self.empty = 0
        self.text_bytes = 0
        self.rejected = 0
        self.reasons: dict[str, int] = {}
        self.coverage = Coverage(characters=0, lost_characters=0, unknown_tokens=0, token_bytes=None)
        self.lost_example = ""
        """Beginning of the first document with a character that no token stands for, and what became of it."""
        self._ends = 0  # end-of-document ids in the pieces written so far

    def expect(self, piece: Piece) -> None:
        """Put `piece` behind all pieces that were expected before it."""
        self._order.append(piece)

    def add(self, key: str, encoder: str, finished: FinishedPiece | None = None) -> None:
        """Take the piece `key`, which `encoder` has finished. Without `finished`, its file is read in its turn.

        Raises:
            DataError: most of the first records are bad, or most of the first characters have no token.
            WorkerError: the piece's file is gone or damaged.
        """
        self._done[key] = (encoder, finished)
        while self._order and self._order[0].key in self._done:
            self._append(self._order.popleft())

    def _append(self, piece: Piece) -> None:
        encoder, finished = self._done.pop(piece.key)
        path = piece_path(self._folder, piece.key, encoder)
        finished = finished or read_piece_file(path, self._dtype, check=False)
        if finished is None:
            raise WorkerError(f"{path}: the file of a finished piece is gone or damaged; run the command again")
        self.writer.append(finished.tokens, finished.lengths, finished.hashes)
        footer = finished.footer
        self.records += footer["documents"] + footer["empty"] + len(footer["rejected"])
        self.empty += footer["empty"]
        self.text_bytes += footer["text_bytes"]
        self._ends += int(np.count_nonzero(finished.tokens == self._eod_id))
        self._add_coverage(footer["coverage"])
        self._record_rejected(piece, footer)
        if self.records >= _EARLY_RECORDS:
            self._check_bad(max(0.5, self._max_bad))
        if self.coverage.characters >= _EARLY_CHARACTERS:
            self._check_lost(max(0.5, self._max_lost))

    def _add_coverage(self, counts: dict[str, Any]) -> None:
        before = self.coverage
        size = counts["token_bytes"]
        self.coverage = Coverage(
            characters=before.characters + counts["characters"],
            lost_characters=before.lost_characters + counts["lost"],
            unknown_tokens=before.unknown_tokens + counts["unknown"],
            token_bytes=None if size is None else (before.token_bytes or 0) + size,
        )
        self.lost_example = self.lost_example or counts["example"]

    def _check_lost(self, limit: float) -> None:
        found = self.coverage
        if found.share > limit:
            raise DataError(
                f"the tokenizer has no token for {found.lost_characters:,} of {found.characters:,} characters "
                f"({found.share:.2%}, more than --max-lost {self._max_lost:.2%}; {found.unknown_tokens:,} unknown; "
                f"dropped line breaks count as well): {self.lost_example}; use a tokenizer that encodes every byte "
                "('megazh tokenizer train' makes one), or accept it with a higher --max-lost"
            )

    def _record_rejected(self, piece: Piece, footer: dict[str, Any]) -> None:
        files = piece_sources(self._sources, piece, self._options)
        before = self._lines.get(piece.source, 0)
        self._lines[piece.source] = before + footer["lines"]
        for line, reason, detail in footer["rejected"]:
            # In a piece of several whole files, each file counts as one line.
            file, number = (files[0], before + line) if len(files) == 1 else (files[line - 1], 1)
            entry = {"file": file.name, "line": number, "reason": reason, "detail": detail}
            self._rejected_file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self.rejected += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def _check_bad(self, limit: float) -> None:
        if not self.records or self.rejected / self.records <= limit:
            return
        with open(self.rejected_path, encoding="utf-8") as file:
            first = json.loads(file.readline())
        encoding = " (text that is not UTF-8 needs --encoding)" if Reason.INVALID_UTF8 in self.reasons else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        raise DataError(
            f"{self.rejected} of {self.records} records are bad ({self.rejected / self.records:.3%}, more than "
            f"--max-bad {self._max_bad:.3%}): {reasons}; first: {first['file']} line {first['line']}: "
            f"{first['detail']}; all in {self.rejected_path}; repair them, or raise --max-bad{encoding}"
        )

    def finish(self) -> Files:
        """Complete the index's files.

        Raises:
            DataError: too many records were bad, too many characters have no token, or there is no document.
        """
        assert not self._order, "a piece is missing"
        self._check_bad(self._max_bad)
        self._check_lost(self._max_lost)
        if self._ends != self.writer.documents:
            raise DataError(
                f"{self._ends:,} end-of-document ids ({self._eod_id}) in {self.writer.documents:,} documents: the text "
                "of a document gives that id; choose another end with --eod, and run again with --restart"
            )
        self._rejected_file.close(durable=False)  # flushed to disk when it is moved to its place
        return self.writer.finish()

    def abandon(self) -> None:
        """Close the files without completing them; what was written of the index is removed."""
        with contextlib.suppress(WriteError):
            self._rejected_file.close(durable=False)
        self.writer.abandon()
