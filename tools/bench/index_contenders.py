"""The contenders of `index.py`, each in its own process, which runs for the whole benchmark.

`serve` is that process. It loads its tokenizer, answers that it is ready, and then reads jobs from stdin, one line of
JSON each. It prepares a job (not measured), starts the clock on `go`, and answers with a line of seconds, tokens,
hashes and peak memory.
"""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool as MultiprocessingPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from index_memory import cpu_seconds, family, forget_peak, peak

from megazh.index.format import HEADER, Header, read_header
from megazh.tokenizer import Tokenizer, load_tokenizer, qwen
from megazh.tokenizer.encoders import Encoder, TokenizerFormat
from megazh.tokenizer.tokenizer import dtype_for

_CALL_BYTES = 1_000_000  # text per call of the bare encoder
_CHUNK = 32  # documents per message of Megatron-LM's old tool

Tokens = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""(tokens,) all tokens, and (documents,) number of tokens of each document; end tokens are included in both."""


class LeftOut(Exception):
    """The contender cannot take part, for the given reason."""


@dataclass(frozen=True)
class Place:
    """Resources of a contender: a tokenizer, a number of cores, and its own folder."""

    tokenizer: Tokenizer
    cores: int
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_for(self.tokenizer.vocab_size)

    def tokenizer_json(self) -> str:
        """The text of the tokenizer.json, converted from Qwen's ranks if necessary."""
        if self.tokenizer.kind is TokenizerFormat.QWEN_RANKS:
            return qwen.tokenizer_json(self.tokenizer.path)
        if self.tokenizer.kind is TokenizerFormat.HUGGING_FACE:
            return self.tokenizer.path.read_text(encoding="utf-8")
        raise LeftOut(f"`tokenizers` cannot read a {self.tokenizer.kind.value} model")

    def hugging_face(self) -> Any:
        """A `tokenizers.Tokenizer` that takes all text as ordinary text, as megazh does."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer.from_str(self.tokenizer_json())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer


class Contender(ABC):
    """A tool that turns JSONL files into tokens."""

    name: str
    """Name of the encoder."""

    @abstractmethod
    def __init__(self, place: Place) -> None: ...

    @abstractmethod
    def prepare(self, files: Sequence[Path]) -> None:
        """The part of a job that is not measured."""

    @abstractmethod
    def work(self) -> None:
        """The measured part."""

    @abstractmethod
    def tokens(self) -> Tokens:
        """Result of `work`."""

    def warm(self) -> bool:
        """Whether everything is loaded, asked after some work was done."""
        return True


class Megazh(Contender):
    """megazh: a whole build without the loading of tokenizers, which stay loaded, as with all other contenders."""

    def __init__(self, place: Place) -> None:
        from megazh.index import build
        from megazh.index.pools import InlinePool, Pool, ProcessPool

        self._place, self._build = place, build
        self._pool: Pool = InlinePool() if place.cores == 1 else ProcessPool(place.cores)
        tokenizer = place.tokenizer
        reference = tokenizer.encoders.reference()
        build.load_tokenizer = lambda *_: tokenizer
        type(tokenizer.encoders).reference = lambda _: reference  # type: ignore[method-assign,assignment]
        self.name = "megazh"

    def prepare(self, files: Sequence[Path]) -> None:
        self._files = [str(file) for file in files]

    def work(self) -> None:
        request = self._build.Request(self._files, self._place.output, self._place.tokenizer.path)
        summary = self._build.build_index(request, self._pool, lambda line: print(line, file=sys.stderr))
        self.name = summary.encoder

    def warm(self) -> bool:
        """Workers start one by one and load with their first task: until then, their memory differs."""
        workers = sorted(map(peak, family(os.getpid())[1:]))[-self._place.cores :]
        return self._place.cores == 1 or (len(workers) == self._place.cores and workers[0] > 0.7 * workers[-1])

    def tokens(self) -> Tokens:
        return _read_index(self._place)


class BareEncoder(Contender):
    """megazh's encoder alone, on documents in memory."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._encoder = self._make()
        self.name = self._encoder.name

    def _make(self) -> Encoder:
        encoders = self._place.tokenizer.encoders
        try:
            return encoders.fast() or encoders.reference()
        except Exception as error:  # a tokenizer that the fast encoder cannot read: megazh then uses the reference, too
            print(f"the fast encoder cannot be used: {error}", file=sys.stderr)
            return encoders.reference()

    def prepare(self, files: Sequence[Path]) -> None:
        self._calls: list[list[str]] = [[]]
        size = 0
        for line in _lines(files):
            if size >= _CALL_BYTES:
                self._calls.append([])
                size = 0
            self._calls[-1].append(orjson.loads(line)["text"])  # a str without cached UTF-8
            size += len(line)

    def work(self) -> None:
        self._results = [self._encoder.encode_batch(texts) for texts in self._calls]

    def tokens(self) -> Tokens:
        tokens = [_with_ends(ids, offsets, self._place) for ids, offsets in self._results]
        lengths = [np.diff(offsets) + 1 for _, offsets in self._results]
        return np.concatenate(tokens), np.concatenate(lengths)


class Gigatoken(Contender):
    """gigatoken as Megatron-LM's newer tool uses it: whole files in one call, then one write."""

    def __init__(self, place: Place) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(place.cores)
        import gigatoken
        from gigatoken.gigatoken_rs import BPETokenizer, JsonlFileSource, load_hf_json

        self._place, self._source, self.name = place, JsonlFileSource, "gigatoken"
        tokenizer = place.tokenizer
        try:
            if tokenizer.kind is TokenizerFormat.QWEN_RANKS:
                self._tokenizer: Any = BPETokenizer.from_tiktoken(tokenizer.path, "qwen2")
            elif tokenizer.kind is TokenizerFormat.SENTENCEPIECE:
                self._tokenizer = gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)
            else:
                self._tokenizer = load_hf_json(place.tokenizer_json())
        except Exception as error:
            raise LeftOut(f"gigatoken cannot read this tokenizer: {error}") from None

    def prepare(self, files: Sequence[Path]) -> None:
        self._files: list[str | Path | os.PathLike[str]] = list(files)

    def work(self) -> None:
        source = self._source(self._files, "text")
        encoded = self._tokenizer.encode_files(source, parallel=self._place.cores > 1)
        lists = encoded.layout.to_ListOffsetArray64(True)  # an awkward array: flat ids and offsets
        offsets = np.asarray(lists.offsets.data)
        ids = np.asarray(lists.content.data)[: int(offsets[-1])]
        if shift := self._place.tokenizer.encoders.shift:
            ids = ids + np.uint32(shift)
        _with_ends(ids, offsets, self._place).tofile(f"{self._place.output}.bin")
        _write_idx(self._place, np.diff(offsets) + 1)

    def tokens(self) -> Tokens:
        return _read_index(self._place)


class DatasetsMap(Contender):
    """Hugging Face `datasets.map` in batches of 1000; the files are read before the clock starts."""

    def __init__(self, place: Place) -> None:
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(place.folder / "hf")}
        self._tokenizer = place.hugging_face()
        import datasets

        datasets.disable_caching()
        datasets.disable_progress_bars()
        self._place, self._datasets, self.name = place, datasets, "tokenizers"

    def prepare(self, files: Sequence[Path]) -> None:
        cache = str(self._place.folder / "cache")
        self._data = self._datasets.Dataset.from_json([str(file) for file in files], cache_dir=cache)

    def work(self) -> None:
        tokenizer = self._tokenizer

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            found = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
            return {"input_ids": [encoding.ids for encoding in found]}

        self._mapped = self._data.map(
            encode,
            batched=True,
            batch_size=1000,
            num_proc=None if self._place.cores == 1 else self._place.cores,
            remove_columns=self._data.column_names,
        )

    def tokens(self) -> Tokens:
        rows = self._mapped["input_ids"]
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.uint32)
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return _with_ends(ids, offsets, self._place), np.diff(offsets) + 1


class MegatronOld(Contender):
    """The method of Megatron-LM's older tool: one document per call, pickled lists from a process pool, one writer."""

    def __init__(self, place: Place) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._place, self.name = place, "tokenizers"
        tokenizer = place.hugging_face()
        self._pool: MultiprocessingPool = multiprocessing.get_context("fork").Pool(
            place.cores, _set_tokenizer, (tokenizer, place.tokenizer.eod_id)
        )

    def prepare(self, files: Sequence[Path]) -> None:
        self._files = list(files)

    def work(self) -> None:
        lengths = []
        with open(f"{self._place.output}.bin", "wb") as file:
            for ids, _ in self._pool.imap(_encode_line, _lines(self._files), _CHUNK):
                file.write(np.array(ids, self._place.dtype).tobytes())
                lengths.append(len(ids))
        _write_idx(self._place, np.array(lengths))

    def tokens(self) -> Tokens:
        return _read_index(self._place)


_tokenizer: tuple[Any, int]
"""Tokenizer and end-of-document id of a worker process of `MegatronOld`."""


def _set_tokenizer(tokenizer: Any, eod_id: int) -> None:
    global _tokenizer
    _tokenizer = tokenizer, eod_id


def _encode_line(line: bytes) -> tuple[list[int], int]:
    tokenizer, eod_id = _tokenizer
    ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, eod_id], len(line)


CONTENDERS: dict[str, type[Contender]] = {
    "megazh": Megazh,
    "encoder": BareEncoder,
    "gigatoken": Gigatoken,
    "datasets.map": DatasetsMap,
    "megatron-old": MegatronOld,
}
PACKAGES = {"gigatoken": "gigatoken", "datasets.map": "datasets"}
"""Package that a contender needs."""


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as file:
            yield from file


def _with_ends(ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], place: Place) -> npt.NDArray[Any]:
    """(tokens,) ids with the end token after each document, in the dtype of the index."""
    documents = len(offsets) - 1
    ends = offsets[1:] + np.arange(documents)
    tokens = np.empty(len(ids) + documents, place.dtype)
    is_text = np.ones(len(tokens), np.bool_)
    is_text[ends] = False
    tokens[is_text] = ids
    tokens[ends] = place.tokenizer.eod_id
    return tokens


def _write_idx(place: Place, lengths: npt.NDArray[np.integer]) -> None:
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1] * place.dtype.itemsize, out=pointers[1:])
    with open(f"{place.output}.idx", "wb") as file:
        file.write(Header(place.dtype, len(lengths), len(lengths) + 1).pack())
        for array in (lengths.astype("<i4"), pointers, np.arange(len(lengths) + 1, dtype="<i8")):
            file.write(array.data)


def _read_index(place: Place) -> Tokens:
    path = Path(f"{place.output}.idx")
    header = read_header(path, path.stat().st_size)
    lengths = np.fromfile(path, "<i4", header.sequences, offset=HEADER.size).astype(np.int64)
    return np.fromfile(f"{place.output}.bin", header.dtype), lengths


def _ended_workers() -> int:
    """Peak memory in bytes of the largest worker that has ended (`datasets` ends its workers after each call)."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _cpu_seconds() -> float:
    """CPU time of this process, its workers, and its workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(map(cpu_seconds, family(os.getpid()))) + ended.ru_utime + ended.ru_stime


def serve(name: str, cores: Sequence[int], tokenizer: Path, folder: Path) -> None:
    """Run as contender `name` on these cores until stdin ends; stdout is only for answers."""
    os.sched_setaffinity(0, cores)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to stderr

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        place = Place(load_tokenizer(tokenizer), len(cores), folder)
        contender = CONTENDERS[name](place)
    except LeftOut as error:
        answer(left_out=str(error))
        return
    answer(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        contender.prepare([Path(file) for file in job["files"]])
        gc.collect()
        for pid in family(os.getpid()):
            forget_peak(pid)
        answer(prepared=True)
        sys.stdin.readline()
        cpu_before = _cpu_seconds()
        begin = time.perf_counter()
        contender.work()
        seconds = time.perf_counter() - begin
        cpu = _cpu_seconds() - cpu_before
        memory = sum(map(peak, family(os.getpid()))) + len(cores) * _ended_workers()
        tokens, lengths = contender.tokens()
        head = int(lengths[: job["head_documents"]].sum())
        answer(
            seconds=seconds,
            cpu_seconds=cpu,
            tokens=len(tokens),
            warm=contender.warm(),
            peak_rss=memory,
            encoder=contender.name,
            sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
            head_sha256=hashlib.sha256(tokens[:head].tobytes()).hexdigest(),
        )
