"""Encoders: from documents to token ids, as ordinary text (a literal `<|endoftext|>` gives no control token).

Each tokenizer has a reference encoder, whose ids are the truth, and may have a fast one. Whoever uses the fast
one checks it against the reference (`differences`).
"""

import functools
import itertools
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

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]


_LONG_S = "\u017f"


class Encoder(Protocol):
    """Turns documents into token ids."""

    name: str

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """All ids (tokens,) uint32 and offsets (documents + 1,) int64: document i is ids[offsets[i]:offsets[i+1]]."""
        ...


def _flatten(documents: Sequence[Sequence[int]]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids in documents], out=offsets[1:])
    flat = np.fromiter((token for ids in documents for token in ids), np.uint32, count=int(offsets[-1]))
    return flat, offsets


class FastokensEncoder:
    """fastokens, the fastest encoder for a byte-level BPE `tokenizer.json`; one thread.

    Version 0.3.5 does not take U+017F (a long s) for an s where a regex ignores case ("'s" in Qwen's): texts that
    hold one go to the reference encoder.
    """

    def __init__(self, tokenizer_json: str, reference: Callable[[], Encoder]) -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read when the library first encodes; workers are processes
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
    """`tokenizers`: the reference for a `tokenizer.json`."""

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
    """tiktoken's `encode_ordinary` of the NFC text: the reference for Qwen's ranks."""

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
    """SentencePiece's own library; `shift` is added to every id.

    gigatoken 0.10.0 reads these models faster, but turns a literal `</s>` in a text into the control token.
    """

    def __init__(self, processor: Any, shift: int) -> None:
        self.name = "sentencepiece"
        self._processor = processor
        self._shift = shift

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        flat, offsets = _flatten([self._processor.encode(text) for text in texts])
        return flat + np.uint32(self._shift), offsets


class Kind(StrEnum):
    """What file a tokenizer comes from."""

    HUGGING_FACE = "tokenizer.json"
    QWEN_RANKS = "qwen.tiktoken"
    SENTENCEPIECE = "sentencepiece"


@dataclass(frozen=True)
class EncoderSource:
    """What it takes to make a tokenizer's encoders, in this process or in a worker.

    Attributes:
        kind: what file `path` is.
        shift: added to every id of a SentencePiece model.
    """

    kind: Kind
    path: Path
    shift: int = 0

    def tokenizer_json(self) -> str:
        """The text of the `tokenizer.json` that this is, or is turned into."""
        return qwen.tokenizer_json(self.path) if self.kind is Kind.QWEN_RANKS else self.path.read_text(encoding="utf-8")

    def reference(self) -> Encoder:
        """The encoder whose ids are the truth.

        Raises:
            DataError: its library cannot read the tokenizer.
        """
        if self.kind is Kind.QWEN_RANKS:
            return TiktokenEncoder(qwen.read_ranks(self.path))
        if self.kind is Kind.HUGGING_FACE:
            try:
                return HuggingFaceEncoder(self.tokenizer_json())
            except Exception as error:  # the library raises bare Exception
                raise DataError(f"{self.path}: not a tokenizer.json that can be read: {error}") from None
        import sentencepiece

        return SentencePieceEncoder(sentencepiece.SentencePieceProcessor(model_file=str(self.path)), self.shift)

    def fast(self) -> Encoder | None:
        """An encoder that ought to give the same ids faster; None where there is none for this kind.

        Raises whatever the library raises when it is missing or cannot read the tokenizer.
        """
        if self.kind is Kind.SENTENCEPIECE:
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
"""Odd strings on which a fast encoder is tried before it is used."""


def encode_each(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text."""
    ids, offsets = encoder.encode_batch(texts)
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]
