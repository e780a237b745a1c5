"""`Tokenizer`, what all formats of tokenizer files have in common."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from megazh.tokenizer.encoders import Encoder, EncoderSource, TokenizerFormat, encode_each

SPACE = "\u2581"
"""Character that SentencePiece, and tokenizers derived from it, write for a space."""


class Tokenizer:
    """A tokenizer, read from one file.

    Attributes:
        path: the file.
        kind: file format of `path`.
        vocab_size: largest id plus one.
        tokens: number of ids that have a token; less than `vocab_size` if the ids have holes.
        eod: end-of-document token, as the vocabulary writes it.
        eod_id: id of `eod`.
        pad_id: id of the padding token, or None if there is none.
        unk_id: id of the unknown token, or None if there is none.
        control_ids: ids that text never gives, `eod_id` and `pad_id` among them; not `unk_id`.
        keeps_bytes: whether the ids of a text hold all its bytes, up to Unicode's NFC: byte-level BPE with all bytes.
        fingerprint: SHA-256 of everything that decides which ids a text gets and what they mean. A rank file and the
            `tokenizer.json` equivalent to it have the same fingerprint.
        encoders: makes the reference and the fast encoder.
        front_tokens: whether `<pad> <bos> <eos> <unk>` come before the pieces of a SentencePiece model.
        notices: lines for the person who builds an index: what is encoded in another way than the file says.
    """

    path: Path
    kind: TokenizerFormat
    vocab_size: int
    tokens: int
    eod: str
    eod_id: int
    pad_id: int | None
    unk_id: int | None
    control_ids: frozenset[int]
    keeps_bytes: bool
    fingerprint: str
    encoders: EncoderSource
    front_tokens: bool = False
    notices: Sequence[str] = ()

    def check(self) -> None:
        """Check the file's ids against those of the library that encodes and decodes with it; takes up to a second.

        Raises:
            DataError: the library cannot read the file, or has other ids than the file.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens are written out."""
        raise NotImplementedError

    def normalize(self, text: str) -> str:
        """`text` after the tokenizer's own normalization, such as NFC; that is what its ids stand for."""
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        """Readable form of one token; bytes that are not UTF-8 are written as `\\xNN`."""
        raise NotImplementedError

    def control_id(self, token: str) -> int | None:
        """Id of a control token by its text; None where there is no such token."""
        return next((each for each in sorted(self.control_ids) if self.piece(each) == token), None)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for in a text; b"" for control tokens, the unknown token and ids without a token.

        Blanks that a library drops between words and puts back when it decodes (WordPiece) are not among them.
        """
        raise NotImplementedError

    def probes(self) -> list[str]:
        """Texts that hold the tokenizer's own control tokens and added words, on which its encoders are compared."""
        raise NotImplementedError

    @cached_property
    def _reference(self) -> Encoder:
        return self.encoders.reference()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by the reference encoder: ordinary text, no control tokens added."""
        return encode_each(self._reference, [text])[0]


def shown(raw: bytes) -> str:
    """`raw` as readable text: what is no UTF-8 as `\\xNN`, control characters as Python writes them."""
    text = raw.decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)
