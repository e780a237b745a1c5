"""Load a tokenizer from any of the formats that can be read."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from megazh.errors import UsageError
from megazh.tokenizer import qwen
from megazh.tokenizer.base import Tokenizer
from megazh.tokenizer.encoders import TokenizerFormat
from megazh.tokenizer.hugging_face import JsonTokenizer
from megazh.tokenizer.recognise import find_tokenizer, is_rank_file, read_settings, read_tokenizer_file
from megazh.tokenizer.sentencepiece_model import SentencePieceTokenizer


class RankKind(StrEnum):
    """Regex, normalization and control tokens of a rank file, which itself holds none of them."""

    QWEN = "qwen"
    """NFC, Qwen's regex, and `<|endoftext|> <|im_start|> <|im_end|>` after the last rank."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer and how to load it; can be pickled and sent to workers, unlike a tokenizer."""

    path: Path
    eod: str
    front_tokens: bool
    kind: TokenizerFormat

    def load(self) -> Tokenizer:
        """Load the tokenizer; raises as `load_tokenizer`."""
        return load_tokenizer(self.path, self.eod, self.front_tokens, rank_kind(self.kind))


def load_tokenizer(
    path: Path | str, eod: str | None = None, front_tokens: bool = False, ranks: RankKind | None = None
) -> Tokenizer:
    """Load a tokenizer: a `tokenizer.json` or its folder, Qwen's `qwen.tiktoken`, or a SentencePiece `.model`.

    Args:
        path: the file, or the folder that holds it.
        eod: end-of-document token; by default `<|endoftext|>`, the `eos_token` of tokenizer_config.json, or another
            common one (for a SentencePiece model: its own end piece).
        front_tokens: put `<pad> <bos> <eos> <unk>` (ids 0 to 3) before the pieces of a SentencePiece model.
        ranks: what a rank file that is not Qwen's own belongs to; None accepts only Qwen's.

    Raises:
        UsageError: there is no such file, its format is unknown, it has no end-of-document token (`eod`), or that token
            is one that ordinary text gives.
        DataError: the file is damaged, something else, or contradicts itself about ids.
    """
    path = find_tokenizer(Path(path))
    data = read_tokenizer_file(path)
    rank_file = path.suffix == ".tiktoken" or (path.suffix == ".model" and is_rank_file(data))
    if front_tokens and (path.suffix != ".model" or rank_file):
        raise UsageError(f"--front-tokens is for SentencePiece models, not for {path.name}")
    if ranks is not None and not rank_file:
        raise UsageError(f"--tokenizer-kind {ranks.value} is for rank files (tiktoken's format), not for {path.name}")
    if rank_file:
        if ranks is None:
            qwen.check_qwens(path)
        return JsonTokenizer(
            path, TokenizerFormat.QWEN_RANKS, read_settings(path, qwen.tokenizer_json(path).encode()), eod
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, data, eod, front_tokens)
    return JsonTokenizer(path, TokenizerFormat.HUGGING_FACE, read_settings(path, data), eod)


def rank_kind(format: TokenizerFormat | str) -> RankKind | None:
    """What `load_tokenizer` needs to know to load a tokenizer of a file format again."""
    return RankKind.QWEN if format == TokenizerFormat.QWEN_RANKS else None


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Token dtype on disk by Megatron-LM's rule (`DType.optimal_dtype`): uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)
