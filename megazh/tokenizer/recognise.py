"""What a file that was given as a tokenizer is: one of the formats that can be read, or a file that can be named."""

import json
import re
from pathlib import Path
from typing import Any

from megazh.errors import DataError, UsageError

SUFFIXES = (".json", ".tiktoken", ".model")
"""How the names of tokenizer files end."""
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)")
_HEAD = 4096  # bytes that are looked at
_LFS = b"version https://git-lfs.github.com/spec/"

_FOREIGN = (
    (b"PK\x03\x04", "is a zip archive (or a PyTorch checkpoint): unpack it, and give the tokenizer in it"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: unpack it first"),
    (b"\xfd7zXZ\x00", "is xz-compressed: unpack it first"),
    (b"BZh", "is bzip2-compressed: unpack it first"),
    (b"GGUF", "is a GGUF model: give the tokenizer.json of the model that it was made from"),
    (b"PAR1", "is a Parquet file, not a tokenizer"),
    (b"ARROW1", "is an Arrow file, not a tokenizer"),
    (b"%PDF", "is a PDF, not a tokenizer"),
    (b"\x80\x02", "is a Python pickle, which is never read: give a tokenizer.json"),
    (b"\x80\x03", "is a Python pickle, which is never read: give a tokenizer.json"),
    (b"\x80\x04", "is a Python pickle, which is never read: give a tokenizer.json"),
    (b"\x80\x05", "is a Python pickle, which is never read: give a tokenizer.json"),
    (b"\xff\xfe", "is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text: save it as UTF-8"),
    (b"\xef\xbb\xbf", r"begins with a byte order mark (BOM); remove it: sed -i '1s/^\xEF\xBB\xBF//' FILE"),
)
"""First bytes of files that are no tokenizer, and what such a file is."""


def find_tokenizer(path: Path) -> Path:
    """Path of the tokenizer at `path`: the file itself, or the tokenizer in a folder.

    Raises:
        UsageError: there is no such file, or the folder holds no tokenizer; the message says what the folder holds.
    """
    if path.is_dir():
        try:
            names = sorted(file.name for file in path.iterdir() if file.is_file())
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
        wanted = ["tokenizer.json", *(name for name in names if name.endswith((".tiktoken", ".model")))]
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise UsageError(f"{path}: holds no tokenizer.json, *.tiktoken or *.model{_what_else(names)}")
        return path / found
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"--tokenizer {path}: {what}")
    return path


def _what_else(names: list[str]) -> str:
    """What to do about a folder without a tokenizer, by the files that are there."""
    if {"vocab.json", "merges.txt"} <= set(names):
        return (
            "; vocab.json and merges.txt are a slow tokenizer: write its tokenizer.json with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if "vocab.txt" in names:
        return (
            "; vocab.txt is a slow tokenizer: write its tokenizer.json with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if "tokenizer_config.json" in names:
        return "; tokenizer_config.json only describes a tokenizer: download tokenizer.json as well"
    return f"; it holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "; it is empty"


def read_tokenizer_file(path: Path) -> bytes:
    """Content of a tokenizer file.

    Raises:
        UsageError: the name ends in none of `SUFFIXES`.
        DataError: the file cannot be read, is empty, or is known to be something else, which the message names.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            what = _foreign(head)
            if what is not None:
                raise DataError(f"{path}: {what}")
            if path.suffix not in SUFFIXES:
                raise UsageError(f"{path}: unknown tokenizer format; expected tokenizer.json, *.tiktoken or *.model")
            return head + file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _foreign(head: bytes) -> str | None:
    """What a file that is no tokenizer is, by its first bytes; None if it may be a tokenizer."""
    if not head:
        return "is empty"
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the tokenizer itself: fetch it with `git lfs pull`, or download the file"
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return what
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "is a safetensors file (weights), not a tokenizer: give the tokenizer.json beside it"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "is a web page, not the file that it links to: download the file itself (on Hugging Face: /resolve/)"
    return None


def is_rank_file(data: bytes) -> bool:
    """Whether `data` is a rank file (tiktoken's format), by its first line."""
    return _RANK_LINE.match(data) is not None


def read_settings(path: Path, data: bytes) -> dict[str, Any]:
    """Contents of a `tokenizer.json`.

    Raises:
        DataError: it is no tokenizer.json; another JSON file of a model is named.
    """
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a Hugging Face tokenizer.json: truncated or damaged: {error}") from None
    if isinstance(settings, dict) and isinstance(settings.get("model"), dict):
        return settings
    if isinstance(settings, dict) and ("tokenizer_class" in settings or "added_tokens_decoder" in settings):
        what = "is a tokenizer_config.json, which has no vocabulary"
    elif isinstance(settings, dict) and ("model_type" in settings or "architectures" in settings):
        what = "is the config.json of a model"
    elif isinstance(settings, dict) and settings and all(isinstance(value, int) for value in settings.values()):
        what = "is a vocab.json (words and ids), one half of a slow tokenizer"
    else:
        what = "not a Hugging Face tokenizer.json"
    raise DataError(f"{path}: {what}: expected a tokenizer.json with 'model' and its 'vocab'")
