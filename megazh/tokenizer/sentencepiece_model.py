"""A SentencePiece `.model`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megazh.errors import DataError, UsageError
from megazh.tokenizer.base import SPACE, Tokenizer, shown
from megazh.tokenizer.control import KNOWN, looks_like_control, read_model
from megazh.tokenizer.encoders import EncoderSource, TokenizerFormat
from megazh.tokenizer.hugging_face import digest

FRONT_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Tokens that `--front-tokens` puts before the pieces of a SentencePiece model, as ids 0 to 3."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; its contents are `data`."""

    kind = TokenizerFormat.SENTENCEPIECE
    keeps_bytes = False  # even with a piece for each byte, normalization may drop line breaks

    def __init__(self, path: Path, data: bytes, eod: str | None, front_tokens: bool) -> None:
        import sentencepiece

        self.path, self.front_tokens = path, front_tokens
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {str(error).splitlines()[0]}") from None
        pieces = read_model(data).pieces
        self._shift = len(FRONT_TOKENS) if front_tokens else 0
        self.vocab_size = self.tokens = len(pieces) + self._shift
        self.pad_id = 0 if front_tokens else (self._processor.pad_id() if self._processor.pad_id() >= 0 else None)
        self.unk_id = self._processor.unk_id() + self._shift
        self.eod_id = self._end_id(eod)
        self.eod = self.piece(self.eod_id)
        types = {piece.piece: piece.type for piece in pieces}
        words = [
            piece.piece for piece in pieces if piece.type == piece.USER_DEFINED and looks_like_control(piece.piece)
        ]
        ordinary = [piece.piece for piece in pieces if piece.type == piece.NORMAL and piece.piece in KNOWN]
        hidden = {*words, *ordinary}
        control = (
            number for number, piece in enumerate(pieces) if piece.type == piece.CONTROL or piece.piece in hidden
        )
        self.control_ids = frozenset((*range(self._shift), *(number + self._shift for number in control)))
        if self.eod_id not in self.control_ids:
            raise UsageError(
                f"{path}: {self.eod!r} is {_kind_of_piece(types.get(self.eod))}, which text gives as well, so it "
                "cannot end documents; give --eod a control piece, or --front-tokens"
            )
        self.encoders = EncoderSource(self.kind, path, self._shift, tuple(sorted(hidden)) or None)
        self.fingerprint = digest(
            {"sha256": hashlib.sha256(data).hexdigest(), "shift": self._shift, "eod_id": self.eod_id}
        )
        if words:
            some = ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
            self.notices = [
                f"note: {path}: user-defined pieces that are written like control tokens are encoded as ordinary text "
                f"where documents hold them: {some}"
            ]

    def _end_id(self, eod: str | None) -> int:
        if eod is not None:
            if self.front_tokens and eod in FRONT_TOKENS:
                return FRONT_TOKENS.index(eod)
            found = self._processor.piece_to_id(eod)
            if self._processor.id_to_piece(found) != eod:
                raise UsageError(f"{self.path}: has no piece {eod!r} (--eod)")
            return found + self._shift
        if self.front_tokens:
            return FRONT_TOKENS.index("<eos>")
        if self._processor.eos_id() < 0:
            raise UsageError(f"{self.path}: has no end-of-document piece; give --eod PIECE, or --front-tokens")
        return self._processor.eos_id()

    def check(self) -> None:
        """Nothing to compare: all ids come from the library."""

    def probes(self) -> list[str]:
        return []  # there is no second encoder

    def decode(self, ids: Sequence[int]) -> str:
        parts, run = [], []
        for token_id in (int(token_id) for token_id in ids):
            piece = token_id - self._shift
            if piece >= 0 and not self._processor.is_control(piece):
                run.append(piece)
                continue
            parts += [self._processor.decode(run), self.piece(token_id)]
            run = []
        return "".join([*parts, self._processor.decode(run)])

    def normalize(self, text: str) -> str:
        return self._processor.normalize(text).replace(SPACE, " ")

    def piece(self, token_id: int) -> str:
        piece = int(token_id) - self._shift
        if piece < 0:
            return FRONT_TOKENS[int(token_id)]
        if piece >= self._processor.get_piece_size():
            return f"<no token {token_id}>"
        return shown(self._processor.id_to_piece(piece).encode())

    def token_bytes(self, token_id: int) -> bytes:
        token_id = int(token_id)
        piece = token_id - self._shift
        if not 0 <= piece < self._processor.get_piece_size() or token_id in self.control_ids or token_id == self.unk_id:
            return b""
        written = self._processor.id_to_piece(piece)
        if self._processor.is_byte(piece):  # written <0xE4>
            return bytes([int(written[1:-1], 16)])
        return written.replace(SPACE, " ").encode()


def _kind_of_piece(type: int | None) -> str:
    """What a piece of SentencePiece's number `type` is, with an article."""
    return {1: "an ordinary piece", 2: "the unknown piece", 4: "a user-defined piece", 6: "the piece of a byte"}.get(
        type or 0, "not a control piece"
    )
