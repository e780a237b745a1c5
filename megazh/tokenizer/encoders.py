"""Encoders: from documents to token ids. All text is ordinary: a literal `<|endoftext|>` gives no control token.

Each tokenizer has a reference encoder, whose ids are right by definition, and may have a faster one. Callers of the
fast encoder compare its ids with those of the reference (`megazh.index.build` does, on `PROBES` and on samples).
"""

import functools
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError
from megazh.tokenizer import qwen
from megazh.tokenizer.control import plain_copy, plain_model

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]

_LONG_S = "\u017f"


class Encoder(Protocol):
    """Turns documents into token ids."""

    name: str
    """Name of the library, for messages and logs."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Ids `(tokens,)` uint32 and offsets `(documents + 1,)` int64: document i is ids[offsets[i]:offsets[i+1]]."""
        ...


def _flatten(documents: Sequence[Sequence[int]]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids in documents], out=offsets[1:])
    flat = np.fromiter((token for ids in documents for token in ids), np.uint32, count=int(offsets[-1]))
    return flat, offsets


class FastokensEncoder:
    """fastokens, the fastest encoder for a byte-level BPE `tokenizer.json`; runs in one thread.

    Where a regex ignores case ("'s" in Qwen's), version 0.3.5 does not match U+017F (long s) as an s: texts that hold
    one go to the reference encoder.

    Args:
        tokenizer_json: contents of the `tokenizer.json`.
        reference: makes the reference encoder; called at most once, when the first such text comes.

    Raises:
        ImportError: fastokens is not installed.
    """

    def __init__(self, tokenizer_json: str, reference: Callable[[], Encoder]) -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read at the first encoding; megazh runs one process per core
        import fastokens

        self.name = "fastokens"
        self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._reference = functools.cache(reference)

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        odd = [at for at, text in enumerate(texts) if _LONG_S in text]
        if odd:
            documents = encode_each(self, ["" if _LONG_S in text else text for text in texts])
            for at, ids in zip(odd, encode_each(self._reference(), [texts[at] for at in odd]), strict=True):
                documents[at] = ids
            return _flatten(documents)
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


class HuggingFaceEncoder:
    """Hugging Face `tokenizers`: the reference encoder of a `tokenizer.json`, whose contents are the argument."""

    def __init__(self, tokenizer_json: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        self.name = "tokenizers"
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flatten([encoding.ids for encoding in encodings])


class TiktokenEncoder:
    """tiktoken's `encode_ordinary` on the NFC form of a text: the reference encoder of Qwen's rank file."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self.name = "tiktoken"
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=qwen.QWEN_REGEX, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        normal = (unicodedata.normalize("NFC", text) for text in texts)
        return _flatten([self._encoding.encode_ordinary(text) for text in normal])


class SentencePieceEncoder:
    """SentencePiece's own library, the reference encoder of a `.model`; `shift` is added to every id.

    gigatoken 0.10.0 is faster on these models, but turns a literal `</s>` in a text into the control token.
    """

    def __init__(self, processor: Any, shift: int) -> None:
        self.name = "sentencepiece"
        self._processor = processor
        self._shift = shift

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        flat, offsets = _flatten([self._processor.encode(text) for text in texts])
        return flat + np.uint32(self._shift), offsets


class TokenizerFormat(StrEnum):
    """File format of a tokenizer."""

    HUGGING_FACE = "tokenizer.json"
    QWEN_RANKS = "qwen.tiktoken"
    SENTENCEPIECE = "sentencepiece"


@dataclass(frozen=True)
class EncoderSource:
    """Makes the encoders of a tokenizer; can be pickled and sent to workers, unlike encoders.

    Attributes:
        kind: file format of `path`.
        path: the tokenizer file.
        shift: number added to every id of a SentencePiece model.
        hidden: control tokens that the libraries would take from text, to be hidden from them (see
            `megazh.tokenizer.control`); None where they read the file as it is.
    """

    kind: TokenizerFormat
    path: Path
    shift: int = 0
    hidden: tuple[str, ...] | None = None

    def file_text(self) -> str:
        """Contents of the `tokenizer.json` at `path`, or of the one that the rank file is converted to."""
        return (
            qwen.tokenizer_json(self.path)
            if self.kind is TokenizerFormat.QWEN_RANKS
            else self.path.read_text(encoding="utf-8")
        )

    def tokenizer_json(self) -> str:
        """Contents of the `tokenizer.json` that the encoders get."""
        text = self.file_text()
        return (
            text if self.hidden is None else json.dumps(plain_copy(json.loads(text), self.hidden), ensure_ascii=False)
        )

    def reference(self) -> Encoder:
        """Make the reference encoder, whose ids are right by definition.

        Raises:
            DataError: the file is damaged, or the library cannot read it.
        """
        if self.kind is TokenizerFormat.QWEN_RANKS:
            return TiktokenEncoder(qwen.read_ranks(self.path))
        if self.kind is TokenizerFormat.HUGGING_FACE:
            try:
                return HuggingFaceEncoder(self.tokenizer_json())
            except Exception as error:  # the library raises bare Exception
                raise DataError(f"{self.path}: cannot be read as a tokenizer.json: {error}") from None
        import sentencepiece

        data = self.path.read_bytes()
        if self.hidden is not None:
            data = plain_model(data, self.hidden)
        return SentencePieceEncoder(sentencepiece.SentencePieceProcessor(model_proto=data), self.shift)

    def fast(self) -> Encoder | None:
        """Make an encoder that should give the same ids faster; None if there is none for this file format.

        Raises:
            ImportError: fastokens is not installed.
            Exception: whatever fastokens raises for a tokenizer that it cannot read; a panic is a BaseException.
        """
        if self.kind is TokenizerFormat.SENTENCEPIECE:
            return None
        return FastokensEncoder(self.tokenizer_json(), self.reference)


PROBES = (
    "",
    " ",
    "中文分词,English words, 混排 mixed。",
    "　全角空格　与\t制表符\r\n换行\n\n\n空行  ",
    "<|endoftext|> <|im_start|>user\n<|im_end|></s><s><unk><pad>",
    "it's we'll I'D 'Re don't",
    "1234567890 3.14159 ２０２６年 ½ Ⅷ",
    "e\u0301 \u212b \ufb01 \u1100\u1161\u11a8 ﾊﾞ が",
    "𠀀𠮷𪚥 👩‍👩‍👧‍👦 🇨🇳 ☃️",
    "שלום مرحبا हिन्दी ไทย",
    "\x00\x01\x7f\u200b\u2028\ufeff\ufffd",
    "def f(x):\n\treturn {'a': [1, 2]}  # 注释\n",
    "哈" * 300 + "!" * 300 + " " * 300,
)
"""Unusual strings on which a fast encoder is compared with the reference before it is used."""


def encode_each(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, one list per text."""
    ids, offsets = encoder.encode_batch(texts)
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]
