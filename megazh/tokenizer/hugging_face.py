"""A `tokenizer.json` of Hugging Face's `tokenizers`, or Qwen's rank file converted to one."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megazh.errors import DataError, UsageError
from megazh.tokenizer import qwen
from megazh.tokenizer.base import SPACE, Tokenizer, shown
from megazh.tokenizer.control import (
    END_TOKENS,
    KNOWN,
    PAD_TOKENS,
    drawing_settings,
    is_bpe,
    looks_like_control,
    needs_plain_copy,
)
from megazh.tokenizer.encoders import EncoderSource, TokenizerFormat

_LARGEST_ID = 2**31 - 1  # ids are stored as int32
_PROBED = 300  # added tokens on which encoders are compared
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_KEEPING = ("ByteLevel", "Split", "Digits", "Punctuation", "Sequence")
"""Pre-tokenizers that only cut, if their behavior is not `Removed`."""


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`.

    Args:
        path: the file.
        kind: its format: a `tokenizer.json`, or a rank file that was converted to `settings`.
        settings: contents of the `tokenizer.json`.
        eod: end-of-document token; None takes the file's, see `load_tokenizer`.
    """

    def __init__(self, path: Path, kind: TokenizerFormat, settings: dict[str, Any], eod: str | None) -> None:
        self.path, self.kind = path, kind
        model = settings["model"]
        self._ids, self._added = _ids_of(path, settings)
        self._written = {number: token for token, number in self._ids.items()}
        self.vocab_size = max(self._written) + 1
        self.tokens = len(self._written)
        self.pad_id = next((self._ids[token] for token in PAD_TOKENS if token in self._added), None)
        self.unk_id = _unknown(model, self._ids)
        self._byte_level = "ByteLevel" in json.dumps(
            [settings.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        )
        self.keeps_bytes = self._byte_level and _keeps_bytes(settings)
        self.eod = self._end_token(eod)
        self.eod_id = self._ids[self.eod]
        hidden = self._hidden()
        self.control_ids = frozenset(self._ids[token] for token in hidden) - {self.unk_id}
        self.fingerprint = _fingerprint(settings, self.eod_id)
        plain = needs_plain_copy(settings, hidden)
        self.encoders = EncoderSource(kind, path, hidden=tuple(sorted(hidden)) if plain else None)
        self.notices = self._notices(model)
        self._model = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        self._spaces = SPACE in json.dumps(
            [settings.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False
        )
        self._normalizes = bool(settings.get("normalizer"))

    def _end_token(self, eod: str | None) -> str:
        """The end-of-document token. Raises UsageError if there is none, or if ordinary text gives its id."""
        if eod is None:
            configured = _configured_end(self.path)
            candidates = (END_TOKENS[0], *([configured] if configured else []), *END_TOKENS[1:])
            eod = next((token for token in candidates if token in self._ids), None)
            if eod is None:
                raise UsageError(
                    f"{self.path}: no known end-of-document token; give --eod TOKEN; control tokens: {self._choices()}"
                )
        elif eod not in self._ids:
            raise UsageError(f"{self.path}: has no token {eod!r} (--eod); control tokens: {self._choices()}")
        if self._ids[eod] == self.unk_id and not self.keeps_bytes:
            raise UsageError(
                f"{self.path}: {eod!r} is the unknown token, so every unknown character would end a document; give "
                f"--eod another TOKEN; control tokens: {self._choices()}"
            )
        if not self._added.get(eod) and not looks_like_control(eod):
            what = "an added word" if eod in self._added else "an ordinary piece of the vocabulary"
            raise UsageError(
                f"{self.path}: {eod!r} is {what}, which text gives as well, so it cannot end documents; give --eod a "
                f'control token, or make it one (in added_tokens with "special": true): {self._choices()}'
            )
        return eod

    def _choices(self) -> str:
        return (
            ", ".join(token for token, special in self._added.items() if special or looks_like_control(token)) or "none"
        )

    def _hidden(self) -> set[str]:
        """The control tokens: what text never gives, as text."""
        added = {token for token, special in self._added.items() if special or looks_like_control(token)}
        unknown = {self._written[self.unk_id]} if self.unk_id in self._written else set()
        return (
            added | {self.eod} | (KNOWN & self._ids.keys()) | {token for token in unknown if looks_like_control(token)}
        )

    def _notices(self, model: dict[str, Any]) -> list[str]:
        notices = []
        words = [token for token, special in self._added.items() if not special and looks_like_control(token)]
        if words:
            some = ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
            notices.append(
                f'note: {self.path}: added words that are written like control tokens, though not "special", are '
                f"encoded as ordinary text where documents hold them: {some}"
            )
        if drawing := drawing_settings(model):
            notices.append(
                f"note: {self.path}: its random choice of tokens ({', '.join(drawing)}) is switched off, so that equal "
                "text gives equal ids"
            )
        return notices

    def check(self) -> None:
        if self.kind is TokenizerFormat.QWEN_RANKS:
            return  # all ids come from the ranks
        theirs: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        if theirs != self._ids:
            for token in (*self._ids, *theirs):
                file, library = self._ids.get(token), theirs.get(token)
                if file != library:
                    raise DataError(
                        f"{self.path}: token {token!r} has id {_or_none(file)} in the file, but {_or_none(library)} in "
                        "the library `tokenizers`, which numbers added tokens from the end of the vocabulary on: "
                        "correct the ids in the file"
                    )
        self._check_config()

    def _check_config(self) -> None:
        """Compare ids with those of the tokenizer_config.json beside the file, if there is one."""
        path = self.path.parent / "tokenizer_config.json"
        try:
            listed = json.loads(path.read_bytes())["added_tokens_decoder"].items()
            found = [(int(number), token["content"]) for number, token in listed]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        for number, token in found:
            if token in self._ids and self._ids[token] != number:
                raise DataError(
                    f"{self.path}: token {token!r} has id {self._ids[token]}, but {path.name} beside it says {number}; "
                    "take both files from one download"
                )

    def probes(self) -> list[str]:
        return [f"a {token}b{token.upper()} {token} 中{token}" for token in list(self._added)[:_PROBED]]

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            return HuggingFaceTokenizer.from_str(self.encoders.file_text())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path}: cannot be read as a tokenizer.json: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        if self.kind is TokenizerFormat.QWEN_RANKS:
            return b"".join(self._written_bytes(int(token_id)) for token_id in ids).decode("utf-8", "replace")
        return self._library.decode([int(token_id) for token_id in ids], skip_special_tokens=False)

    def _written_bytes(self, token_id: int) -> bytes:
        """Bytes of a token; a control token is written out."""
        written = self._written.get(token_id, "")
        return written.encode() if written in self._added else self.token_bytes(token_id)

    def normalize(self, text: str) -> str:
        if self.kind is TokenizerFormat.QWEN_RANKS:
            return unicodedata.normalize("NFC", text)
        if not self._normalizes:
            return text
        found = self._library.normalizer.normalize_str(text)
        return found.replace(SPACE, " ") if self._spaces else found

    @cached_property
    def _bytes_of(self) -> dict[str, int]:
        return {character: byte for byte, character in qwen.byte_alphabet().items()}

    def piece(self, token_id: int) -> str:
        written = self._written.get(int(token_id))
        if written is None:
            return f"<no token {token_id}>"
        if written in self._added or any(character not in self._bytes_of for character in written):
            return shown(written.encode())
        return shown(bytes(self._bytes_of[character] for character in written))

    def token_bytes(self, token_id: int) -> bytes:
        token_id = int(token_id)
        written = self._written.get(token_id)
        if written is None or token_id in self.control_ids or token_id == self.unk_id:
            return b""
        if written in self._added:
            return (written.replace(SPACE, " ") if self._spaces else written).encode()
        if self._model.get("byte_fallback") and _BYTE_PIECE.fullmatch(written):
            return bytes([int(written[3:-1], 16)])
        written = written.removeprefix(self._model.get("continuing_subword_prefix") or "")
        suffix = self._model.get("end_of_word_suffix") or ""
        end = b" " if suffix and written.endswith(suffix) else b""
        written = written.removesuffix(suffix)
        if self._byte_level:
            return bytes(self._bytes_of[character] for character in written if character in self._bytes_of) + end
        return (written.replace(SPACE, " ") if self._spaces else written).encode() + end


def _ids_of(path: Path, settings: dict[str, Any]) -> tuple[dict[str, int], dict[str, bool]]:
    """(ids of all tokens, whether each added token is special).

    Raises:
        DataError: it is no tokenizer.json, two tokens share an id, or an id is not from 0 to 2^31 - 1.
    """
    try:
        vocab = settings["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
            pairs = [(piece, number) for number, (piece, _) in enumerate(vocab)]
        else:
            pairs = list(vocab.items())
        listed = [(token["content"], token["id"]) for token in settings.get("added_tokens") or []]
        added = {token["content"]: bool(token.get("special")) for token in settings.get("added_tokens") or []}
        if not pairs and not listed:
            raise ValueError
        wrong = next(((token, number) for token, number in (*pairs, *listed) if not _is_id(token, number)), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a Hugging Face tokenizer.json") from None
    if wrong is not None:
        raise DataError(f"{path}: token {wrong[0]!r}: expected an id from 0 to {_LARGEST_ID}, found {wrong[1]!r}")
    ids: dict[str, int] = {}
    tokens: dict[int, str] = {}
    for token, number in (*pairs, *listed):
        if ids.setdefault(token, number) != number:
            raise DataError(f"{path}: token {token!r} has two ids, {ids[token]} and {number}; remove one of them")
        if tokens.setdefault(number, token) != token:
            raise DataError(
                f"{path}: id {number} has two tokens, {tokens[number]!r} and {token!r}; renumber one of them"
            )
    return ids, added


def _or_none(number: int | None) -> str:
    return "none" if number is None else str(number)


def _is_id(token: Any, number: Any) -> bool:
    return isinstance(token, str) and type(number) is int and 0 <= number <= _LARGEST_ID


def _unknown(model: dict[str, Any], ids: dict[str, int]) -> int | None:
    """Id of the unknown token, or None."""
    if isinstance(model["vocab"], list):
        number = model.get("unk_id")
        return number if type(number) is int else None
    token = model.get("unk_token")
    return ids.get(token) if isinstance(token, str) else None


def _keeps_bytes(settings: dict[str, Any]) -> bool:
    """Whether a byte-level tokenizer has a token for each byte, and no step before drops or changes any (but NFC)."""
    model = settings["model"]
    if not is_bpe(model) or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if not all(character in model["vocab"] for character in qwen.byte_alphabet().values()):
        return False
    return all(
        step.get("type") in ("NFC", "ByteLevel", "Sequence") for step in _steps(settings.get("normalizer"))
    ) and all(
        step.get("type") in _KEEPING and step.get("behavior") != "Removed"
        for step in _steps(settings.get("pre_tokenizer"))
    )


def _steps(part: Any) -> Iterable[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that a sequence of them holds."""
    if isinstance(part, dict):
        yield part
        for inner in (*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())):
            yield from _steps(inner)


def _configured_end(path: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json beside a tokenizer.json, or None."""
    try:
        token = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _fingerprint(settings: dict[str, Any], eod_id: int) -> str:
    """Fingerprint of a tokenizer.json: of what decides ids, so not of padding, truncation, decoder and dropout."""

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value is not None and value is not False and value != ""}

    model = given(settings["model"])
    if model.get("dropout"):
        del model["dropout"]  # switched off
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
    return digest(_without_offsets(parts))


def digest(parts: Any) -> str:
    """SHA-256 of a JSON value, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _without_offsets(value: Any) -> Any:
    """`value` without `trim_offsets`, which changes character offsets but no id."""
    if isinstance(value, dict):
        return {key: _without_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
    if isinstance(value, list):
        return [_without_offsets(inner) for inner in value]
    return value
