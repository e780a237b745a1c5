"""One class for every tokenizer file: fingerprint, vocabulary size, control tokens, encoders and decoding."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megazh.errors import DataError, UsageError
from megazh.tokenizer import qwen
from megazh.tokenizer.encoders import Encoder, EncoderSource, TokenizerFormat, encode_each

FRONT_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Tokens that `--front-tokens` puts before the pieces of a SentencePiece model, as ids 0 to 3."""

_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "[EOS]", "[SEP]")
_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")

_SPACE = "\u2581"
"""Character that SentencePiece, and tokenizers derived from it, write for a space."""


class Tokenizer:
    """A tokenizer, read from one file.

    Attributes:
        path: the file.
        kind: file format of `path`.
        vocab_size: largest id plus one.
        eod: end-of-document token, as the vocabulary writes it.
        eod_id: id of `eod`.
        pad_id: id of the padding token, or None if there is none.
        fingerprint: SHA-256 of everything that decides which ids a text gets and what they mean. A rank file and the
            `tokenizer.json` equivalent to it have the same fingerprint.
        encoders: makes the reference and the fast encoder.
        front_tokens: whether `<pad> <bos> <eos> <unk>` come before the pieces of a SentencePiece model.
    """

    path: Path
    kind: TokenizerFormat
    vocab_size: int
    eod: str
    eod_id: int
    pad_id: int | None
    fingerprint: str
    encoders: EncoderSource
    front_tokens: bool = False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens are written out."""
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        """Readable form of one token; bytes that are not UTF-8 are written as `\\xNN`."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for in a text; b"" for control tokens and for ids without a token."""
        raise NotImplementedError

    @cached_property
    def _reference(self) -> Encoder:
        return self.encoders.reference()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by the reference encoder: ordinary text, no control tokens added."""
        return encode_each(self._reference, [text])[0]


class _JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, or Qwen's rank file converted to one; `text` is its contents."""

    def __init__(self, path: Path, kind: TokenizerFormat, text: str, eod: str | None) -> None:
        self.path, self.kind = path, kind
        try:
            settings: dict[str, Any] = json.loads(text)
            added = {token["content"]: token["id"] for token in settings.get("added_tokens") or []}
            vocab = settings["model"]["vocab"]
            if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
                vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
            ids: dict[str, int] = {**vocab, **added}
            self.vocab_size = max(ids.values()) + 1
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: not a Hugging Face tokenizer.json") from None
        self._special = set(added.values())
        self.eod = self._end_token(eod, ids, list(added))
        self.eod_id = ids[self.eod]
        self.pad_id = next((added[token] for token in _PAD_TOKENS if token in added), None)
        self.fingerprint = _json_fingerprint(settings, self.eod_id)
        self.encoders = EncoderSource(kind, path)
        self._decoder = json.dumps(settings.get("decoder"), ensure_ascii=False)
        self._byte_level = "ByteLevel" in self._decoder + json.dumps(settings.get("pre_tokenizer"))

    def _end_token(self, eod: str | None, ids: dict[str, int], added: list[str]) -> str:
        if eod is not None:
            if eod not in ids:
                raise UsageError(f"{self.path}: has no token {eod!r} (--eod)")
            return eod
        configured = _configured_end(self.path)
        for token in (_END_TOKENS[0], *([configured] if configured else []), *_END_TOKENS[1:]):
            if token in ids:
                return token
        known = ", ".join(added)
        raise UsageError(
            f"{self.path}: no known end-of-document token; give --eod TOKEN; control tokens: {known or 'none'}"
        )

    @cached_property
    def _reference_tokenizer(self) -> Any:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            return HuggingFaceTokenizer.from_str(self.encoders.tokenizer_json())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path}: cannot be read as a tokenizer.json: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference_tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=False)

    @cached_property
    def _bytes_of(self) -> dict[str, int]:
        return {character: byte for byte, character in qwen.byte_alphabet().items()}

    def piece(self, token_id: int) -> str:
        written = self._reference_tokenizer.id_to_token(int(token_id))
        if written is None:
            return f"<no token {token_id}>"
        if token_id in self._special or any(character not in self._bytes_of for character in written):
            return _shown(written.encode())
        return _shown(bytes(self._bytes_of[character] for character in written))

    def token_bytes(self, token_id: int) -> bytes:
        written = self._reference_tokenizer.id_to_token(int(token_id))
        if written is None or token_id in self._special:
            return b""
        if not self._byte_level:
            if "ByteFallback" in self._decoder and re.fullmatch("<0x[0-9A-F]{2}>", written):
                return bytes([int(written[1:-1], 16)])
            return (written.replace(_SPACE, " ") if _SPACE in self._decoder else written).encode()
        return bytes(self._bytes_of[character] for character in written if character in self._bytes_of)


class _SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    kind = TokenizerFormat.SENTENCEPIECE

    def __init__(self, path: Path, eod: str | None, front_tokens: bool) -> None:
        import sentencepiece

        self.path, self.front_tokens = path, front_tokens
        try:
            data = path.read_bytes()
            if not data:
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {str(error).splitlines()[0]}") from None
        self._shift = len(FRONT_TOKENS) if front_tokens else 0
        self.vocab_size = self._processor.get_piece_size() + self._shift
        self.pad_id = 0 if front_tokens else (self._processor.pad_id() if self._processor.pad_id() >= 0 else None)
        self.eod_id = self._end_id(eod)
        self.eod = self.piece(self.eod_id)
        self.encoders = EncoderSource(self.kind, path, self._shift)
        self.fingerprint = _digest(
            {"sha256": hashlib.sha256(data).hexdigest(), "shift": self._shift, "eod_id": self.eod_id}
        )

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

    def piece(self, token_id: int) -> str:
        piece = int(token_id) - self._shift
        if piece < 0:
            return FRONT_TOKENS[int(token_id)]
        if piece >= self._processor.get_piece_size():
            return f"<no token {token_id}>"
        return _shown(self._processor.id_to_piece(piece).encode())

    def token_bytes(self, token_id: int) -> bytes:
        piece = int(token_id) - self._shift
        if not 0 <= piece < self._processor.get_piece_size() or self._processor.is_control(piece):
            return b""
        written = self._processor.id_to_piece(piece)
        if self._processor.is_byte(piece):  # written <0xE4>
            return bytes([int(written[1:-1], 16)])
        return written.replace(_SPACE, " ").encode()


def load_tokenizer(path: Path | str, eod: str | None = None, front_tokens: bool = False) -> Tokenizer:
    """Load a tokenizer: a `tokenizer.json` or its folder, Qwen's `qwen.tiktoken`, or a SentencePiece `.model`.

    Args:
        path: the file, or the folder that holds it.
        eod: end-of-document token; by default `<|endoftext|>`, the `eos_token` of tokenizer_config.json, or another
            common one (for a SentencePiece model: its own end piece).
        front_tokens: put `<pad> <bos> <eos> <unk>` (ids 0 to 3) before the pieces of a SentencePiece model.

    Raises:
        UsageError: there is no such file, its format is unknown, or it has no end-of-document token (`eod`).
        DataError: the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        names = ["tokenizer.json", *sorted(file.name for file in path.iterdir() if _is_ranks_or_model(file))]
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UsageError(f"{path}: holds no tokenizer.json, *.tiktoken or *.model")
        path = found
    if not path.is_file():
        raise UsageError(f"--tokenizer {path}: no such file")
    if front_tokens and path.suffix != ".model":
        raise UsageError(f"--front-tokens is for SentencePiece models, not for {path.name}")
    if path.suffix == ".model":
        return _SentencePieceTokenizer(path, eod, front_tokens)
    if path.suffix == ".tiktoken":
        return _JsonTokenizer(path, TokenizerFormat.QWEN_RANKS, qwen.tokenizer_json(path), eod)
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        return _JsonTokenizer(path, TokenizerFormat.HUGGING_FACE, text, eod)
    raise UsageError(f"{path}: unknown tokenizer format; expected tokenizer.json, *.tiktoken or *.model")


def _is_ranks_or_model(file: Path) -> bool:
    return file.suffix in (".tiktoken", ".model")


def _configured_end(path: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json beside a tokenizer.json, or None."""
    try:
        token = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _json_fingerprint(settings: dict[str, Any], eod_id: int) -> str:
    """Fingerprint of a tokenizer.json: of what decides ids, so not of padding, truncation and decoder."""

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value is not None and value is not False and value != ""}

    model = given(settings["model"])
    if merges := model.get("merges"):
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    tokens = sorted(settings.get("added_tokens") or [], key=lambda token: token["id"])
    parts = {
        "normalizer": settings.get("normalizer"),
        "pre_tokenizer": settings.get("pre_tokenizer"),
        "model": model,
        "added_tokens": [given(token) for token in tokens],
        "eod_id": eod_id,
    }
    return _digest(_without_offsets(parts))


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _without_offsets(value: Any) -> Any:
    """`value` without `trim_offsets`, which changes character offsets but no id."""
    if isinstance(value, dict):
        return {key: _without_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
    if isinstance(value, list):
        return [_without_offsets(inner) for inner in value]
    return value


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Token dtype on disk by Megatron-LM's rule (`DType.optimal_dtype`): uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)
