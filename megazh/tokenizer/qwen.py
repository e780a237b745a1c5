"""Conversion of Qwen's rank file, `qwen.tiktoken`, to an equivalent `tokenizer.json`.

A rank file (tiktoken's format) has one line per token, `base64 rank`, but neither the regex nor the normalization nor
the control tokens. These are taken from Qwen's own tokenization code and from the `tokenizer.json` of Qwen1.5.
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from megazh.caches import cache_dir, warn_not_kept
from megazh.errors import DataError
from megazh.files import locked, write_atomic

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
_RANKS = 151_643
_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
"""SHA-256 of Qwen's rank file as Qwen publishes it: one line `base64 rank` per token, in the order of ranks."""
_OTHER_MODELS = {
    50_256: "r50k_base (GPT-2)",
    50_280: "p50k_base",
    100_256: "cl100k_base (GPT-4)",
    128_000: "Llama 3",
    163_584: "Kimi K2",
    199_998: "o200k_base (GPT-4o)",
}
"""Models by their number of ranks, for messages."""
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)


def byte_alphabet() -> dict[int, str]:
    """Printable character that byte-level BPE writes for each byte (GPT-2's table, used by `tokenizer.json`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the rank of each token, by the token's bytes.

    Raises:
        DataError: the file is not a rank file, its ranks are not 0, 1, 2, ..., or some byte has no token.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: expected 'base64 rank', found {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: expected ranks 0 to {len(ranks) - 1}, each once: truncated or not a rank file")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path}: has no token for byte {missing[0]:#04x}, so it cannot encode every text")
    return ranks


def check_qwens(path: Path) -> None:
    """Check that the rank file at `path` is Qwen's own, since regex and control tokens are not in the file.

    Raises:
        DataError: it is cut off, changed, another model's, or no rank file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() == _SHA256:
        return
    lines = sum(1 for line in data.splitlines() if line.strip())
    other = _OTHER_MODELS.get(lines)
    if other is not None:
        raise DataError(
            f"{path}: a rank file with as many ranks ({lines:,}) as {other}; it holds neither the regex nor the "
            "control tokens, and only Qwen's are known: use that model's tokenizer.json"
        )
    ranks = read_ranks(path)
    written = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=_rank))
    if hashlib.sha256(written).hexdigest() == _SHA256:
        return  # other line ends
    what = "as many as Qwen's, but with other content" if len(ranks) == _RANKS else f"Qwen's has {_RANKS:,}: cut off?"
    raise DataError(
        f"{path}: a rank file with {len(ranks):,} ranks ({what}); it holds neither the regex nor the control tokens "
        "that belong to them: download it again, use a tokenizer.json, or, if Qwen's regex and control tokens are "
        "right for it, add --tokenizer-kind qwen"
    )


def _rank(item: tuple[bytes, int]) -> int:
    return item[1]


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that BPE merges into `token` in its last step; None if merges do not give `token`."""
    rank = ranks[token]
    none = len(ranks)
    splits = [
        at for at in range(1, len(token)) if ranks.get(token[:at], none) < rank and ranks.get(token[at:], none) < rank
    ]
    if len(splits) == 1:
        return token[: splits[0]], token[splits[0] :]
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda at: ranks.get(parts[at] + parts[at + 1], none))
        if ranks.get(parts[best] + parts[best + 1], none) >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def fast_tokenizer(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Contents of a `tokenizer.json` that encodes as Qwen does: NFC, Qwen's regex, byte-level BPE with these ranks.

    Raises:
        ValueError: a token is not the merge of two others, so no list of merges is equivalent to the ranks.
    """
    alphabet = byte_alphabet()

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pair = split_token(token, ranks)
        if pair is None:
            raise ValueError(f"token {ranks[token]} ({token!r}) is not the merge of two others, so BPE cannot make it")
        merges.append([written(pair[0]), written(pair[1])])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, content in enumerate(CONTROL_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN_REGEX}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {written(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def tokenizer_json(path: Path) -> str:
    """Contents of the `tokenizer.json` equivalent to the rank file `path`; made once (3 s for Qwen's), then cached.

    Raises:
        DataError: the rank file is damaged, or BPE merges cannot make one of its tokens.
    """
    made_from = hashlib.sha256(path.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    cached = cache_dir() / "tokenizers" / f"{made_from}.json"
    try:
        return _read_checked(cached)
    except (OSError, ValueError):
        pass
    try:
        text = json.dumps(fast_tokenizer(read_ranks(path)), ensure_ascii=False)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        with locked(cached.with_suffix(".lock")):
            write_atomic(cached, hashlib.sha256(text.encode()).hexdigest().encode() + b"\n" + text.encode())
    except OSError as error:  # the next call converts again
        warn_not_kept(cache_dir(), error)
    return text


def _read_checked(cached: Path) -> str:
    digest, _, text = cached.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("damaged cache file")
    return text.decode()
