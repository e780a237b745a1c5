"""Texts, files and processes shared by the tests of corpus, tokenizer and index."""

import atexit
import base64
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megazh.corpus import pieces, reader
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import cut, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import find_sources
from megazh.index.writer import IndexWriter
from megazh.tokenizer.encoders import FastokensEncoder, HuggingFaceEncoder
from megazh.tokenizer.qwen import byte_alphabet
from megazh.tokenizer.train import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QWEN_RANKS = SHARED / "data" / "tokenizers" / "qwen.tiktoken"
CHATGLM_MODEL = SHARED / "data" / "tokenizers" / "chatglm3_tokenizer.model"

_SCRATCH = tempfile.mkdtemp(prefix="megazh-tests-")
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
os.environ.setdefault("MEGAZH_CACHE", os.path.join(_SCRATCH, "cache"))

_TEXT = (
    "今天 天气 不错 我们 去 公园 散步 模型 训练 分词 器 的 了 在 是 和 語言 國家 漢字 古文 之乎者也 𠮷野家 "
    "the quick brown fox jumps over lazy dog model training token data e\u0301tude naïve Straße "
    "def return import 1234 3.14 2026 👩‍👩‍👧 🇨🇳 שלום مرحبا हिन्दी 한국어 ｶﾞ ① ½ \u00a0 \u200b"
)
_WORDS = _TEXT.split(" ")
_ENDS = ("。", ", ", "\n", "\n\n", "\r\n", "!", "?", "  ", "\t", "<|endoftext|>", "…", "、")


def texts(count: int, seed: int = 0, most: int = 60) -> list[str]:
    """`count` non-empty texts of mixed scripts and fewer than `most` words each, the same for the same seed."""
    draw = random.Random(seed)
    return [
        "".join(draw.choice(_WORDS) + (draw.choice(_ENDS) if draw.random() < 0.3 else "") for _ in range(words))
        for words in (draw.randrange(1, most) for _ in range(count))
    ]


def json_lines(documents: Sequence[str], key: str = "text") -> bytes:
    """JSON Lines: one object per document."""
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in documents)


def gz(data: bytes, members: int = 1) -> bytes:
    """`data` compressed with gzip, in `members` members."""
    return b"".join(gzip.compress(part, 1, mtime=0) for part in _split(data, members))


def zst(data: bytes, frames: int = 1) -> bytes:
    """`data` compressed with zstd, in `frames` frames."""
    found = b""
    for part in _split(data, frames):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        found += sink.getvalue().to_pybytes()
    return found


def _split(data: bytes, parts: int) -> list[bytes]:
    step = -(-len(data) // parts) or 1
    return [data[at : at + step] for at in range(0, len(data), step)] or [b""]


def write_parquet(path: Path, documents: Sequence[str | None], rows: int = 100) -> Path:
    """Write a Parquet file with one column, `text`, and `rows` rows per row group."""
    pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size=rows)
    return path


def write_arrow(path: Path, documents: Sequence[str | None], stream: bool = False, rows: int = 100) -> Path:
    """Write an Arrow IPC file (or stream) with one column, `text`, and `rows` rows per record batch."""
    schema = pa.schema([("text", pa.string())])
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, schema) as writer:
        for at in range(0, len(documents), rows):
            writer.write_batch(pa.record_batch([pa.array(documents[at : at + rows], pa.string())], schema))
    return path


@functools.cache
def tokenizer_path() -> Path:
    """Path of a byte-level BPE with 1,500 ids, as `megazh tokenizer train` makes it; trained once per process."""
    source = Path(_SCRATCH, "train.jsonl")
    draw = random.Random(7)
    rare = ["".join(chr(0x4E00 + draw.randrange(300)) for _ in range(draw.randrange(2, 5))) for _ in range(1500)]
    source.write_bytes(json_lines([f"{text}{draw.choice(rare)}{draw.choice(rare)}" for text in texts(3000, 99)]))
    path = Path(_SCRATCH, "tokenizer.json")
    train_tokenizer(find_sources([str(source)]), ReadOptions(), path, 1500)
    return path


def json_encoders(tokenizer_json: str) -> tuple[FastokensEncoder, HuggingFaceEncoder]:
    """(fast encoder, reference encoder) of a `tokenizer.json`; the argument is its contents."""
    reference = HuggingFaceEncoder(tokenizer_json)
    return FastokensEncoder(tokenizer_json, lambda: reference), reference


def ranks_of(tokenizer_json: Path) -> dict[bytes, int]:
    """Ranks that a rank file of this byte-level BPE would hold: without control tokens, renumbered from 0."""
    settings = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    control = {token["content"] for token in settings["added_tokens"]}
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    merged = [
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in settings["model"]["merges"]
    ]
    single = [token for token in settings["model"]["vocab"] if len(token) == 1 and token not in control]
    ordered = dict.fromkeys([*sorted(single, key=byte_of.__getitem__), *merged])
    return {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(ordered)}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    """Write a rank file in tiktoken's format."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered))
    return path


def start_megazh(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start `python -m megazh ARGUMENTS` in a process group of its own."""
    return start(sys.executable, "-m", "megazh", *arguments, **options)


def start(*command: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, from the project's folder."""
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL the process group of a process that `start` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str, str]:
    """Wait for a process that `start` started, then kill its group; returns (exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill_group(process)
    return process.returncode, out, err


def megazh(*arguments: object, timeout: float = 60, **options: object) -> tuple[int, str, str]:
    """Run `python -m megazh ARGUMENTS`; returns (exit code, stdout, stderr)."""
    return finish(start_megazh(*arguments, **options), timeout)


@contextlib.contextmanager
def running(*arguments: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m megazh ARGUMENTS` in the background; its process group is killed on exit."""
    process = start_megazh(*arguments, **options)
    try:
        yield process
    finally:
        kill_group(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def index_bytes(prefix: Path, *, optional: Sequence[str] = (".rejected.jsonl",)) -> dict[str, bytes]:
    """Bytes of the files of an index, by suffix."""
    suffixes = [".bin", ".idx", ".docs", ".json", *(end for end in optional if Path(f"{prefix}{end}").exists())]
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in suffixes}


def is_one_line_error(stderr: str, *parts: object) -> bool:
    """Whether stderr is one line `error: ...` that contains all `parts`."""
    lines = stderr.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ") and all(str(part) in lines[0] for part in parts)


def small_index(prefix: Path, documents: int = 40, seed: int = 5, dtype: type = np.uint16) -> list[np.ndarray]:
    """Write an index without PREFIX.json, as Megatron-LM would; returns the tokens of its documents."""
    draw = np.random.default_rng(seed)
    found = [draw.integers(0, 60_000, draw.integers(1, 30)).astype(dtype) for _ in range(documents)]
    writer = IndexWriter(prefix.with_name(f"{prefix.name}.work"), dtype)
    lengths = np.array([len(tokens) for tokens in found], np.int32)
    writer.append(np.concatenate(found), lengths, np.arange(documents, dtype=np.uint64))
    writer.commit(prefix, writer.finish(), {})
    return found


@dataclasses.dataclass
class Read:
    """Result of reading sources."""

    texts: list[str] = dataclasses.field(default_factory=list)
    rejected: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    """(file name, line number, reason) of each rejected line."""
    empty: int = 0
    """Number of empty documents."""
    pieces: int = 0


def read_files(inputs: Sequence[Path], options: ReadOptions, size: int, format: Format | None = None) -> Read:
    """Read files as a build does: cut them into pieces of about `size` bytes, and read piece by piece."""
    sources = find_sources([str(path) for path in inputs], format, options)
    found = Read()
    line_of: dict[int, int] = {}
    for piece in cut(sources, options, size):
        found.pieces += 1
        files = piece_sources(sources, piece, options)
        whole_files = files[0].format is Format.TEXT and options.text_documents is TextDocuments.FILE
        lines = 0
        for batch in read_piece(files, piece, options):
            found.texts += batch.texts
            found.empty += batch.empty
            for bad in batch.rejected:
                file = files[lines + bad.line - 1] if whole_files else files[0]
                line = 1 if whole_files else line_of.get(piece.source, 0) + lines + bad.line
                found.rejected.append((file.name, line, bad.reason.value))
            lines += batch.lines
        line_of[piece.source] = line_of.get(piece.source, 0) + lines
    return found


def use_small_blocks(patch: pytest.MonkeyPatch, size: int, block: int = 64) -> None:
    """Lower the byte limits in `megazh.corpus`, so that short files reach all of them."""
    patch.setattr(pieces, "_BLOCK", block)
    patch.setattr(pieces, "_SEARCH", block)
    patch.setattr(pieces, "_OVERLAP", 16)
    patch.setattr(pieces.read_block, "__defaults__", (block,))
    patch.setattr(reader, "_PIECE_BYTES", size)
    patch.setattr(reader, "_BATCH_BYTES", 50)
    patch.setattr(reader, "_BATCH_ROWS", 3)
