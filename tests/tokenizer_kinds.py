"""Small tokenizers of every kind that can be loaded, made from the texts of `textdata`."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from byte_fallback import write_byte_fallback_json
from textdata import json_lines, ranks_of, texts, tokenizer_path, write_ranks

from megazh.cli import main

CHARACTERS = sorted(set("".join(texts(200))) - set(" \n\r\t") | set("<|>/[]_"))
"""Characters that the vocabularies without bytes know: those of the texts, and those of control tokens."""
WORDS = ["今天", "天气", "模型", "训练", "token", "data", "the", "endoftext"]


def added(number: int, content: str, special: bool = True, **others: Any) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **plain, "special": special, **others}


def write_json(folder: Path, model: dict[str, Any], control: Sequence[dict[str, Any]], **parts: Any) -> Path:
    """Write a `tokenizer.json`."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path = folder / "tokenizer.json"
    settings = {"version": "1.0", **empty, "added_tokens": list(control), "model": model, **parts}
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return path


def byte_level(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Path:
    """The byte-level BPE of `textdata`, with `change` applied."""
    settings = json.loads(tokenizer_path().read_text(encoding="utf-8"))
    change(settings)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return path


def character_bpe(folder: Path, unknown: bool, characters: Sequence[str] = CHARACTERS) -> Path:
    """BPE over characters, without bytes: what it does not know is unknown, or dropped without a trace."""
    vocab = {token: number for number, token in enumerate(["</s>", "<unk>", "▁", *characters])}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if {*word} <= {*characters} and word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    model = {"type": "BPE", "unk_token": "<unk>" if unknown else None, "vocab": vocab, "merges": merges}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}]
    return write_json(
        folder, model, [added(0, "</s>")], normalizer=space, decoder={"type": "Sequence", "decoders": decoders}
    )


def wordpiece(folder: Path) -> Path:
    """WordPiece as in BERT: blanks dropped, punctuation and Chinese characters apart; `[SEP]` is in its vocabulary."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CHARACTERS, *(f"##{character}" for character in CHARACTERS), *WORDS]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: number for number, token in enumerate(dict.fromkeys(tokens))},
    }
    return write_json(
        folder,
        model,
        [added(0, "[PAD]"), added(1, "[UNK]")],
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": False},
    )


def word_level(folder: Path) -> Path:
    """A vocabulary of whole words, split at blanks, the end token among them."""
    words = sorted({word for text in texts(200) for word in text.split()})
    vocab = {word: number for number, word in enumerate(dict.fromkeys(["</s>", "<unk>", *words]))}
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}
    return write_json(folder, model, [], pre_tokenizer={"type": "WhitespaceSplit"})


def unigram(folder: Path, with_bytes: bool) -> Path:
    """Unigram with `</s>` in its vocabulary, as converted SentencePiece models have it."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]]
    if with_bytes:
        pieces += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
    pieces += [[token, -5.0] for token in dict.fromkeys(["▁", *CHARACTERS])] + [[word, -6.0] for word in WORDS]
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": with_bytes, "vocab": pieces}
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    decoders = [{"type": "ByteFallback"}, meta] if with_bytes else [meta]
    return write_json(
        folder,
        model,
        [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        pre_tokenizer=meta,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def train_sentencepiece(folder: Path, lines: Sequence[str] | None = None, **options: Any) -> Path:
    """Train a SentencePiece model on one line per text."""
    (folder / "text.txt").write_text(
        "\n".join(text.replace("\n", " ") for text in (lines or texts(300))), encoding="utf-8"
    )
    defaults = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "small"), **{**defaults, **options}
    )
    return folder / "small.model"


def small_ranks(folder: Path) -> Path:
    """A rank file with Qwen's regex."""
    return write_ranks(folder / "small.tiktoken", ranks_of(tokenizer_path()))


def fallback_json(folder: Path) -> Path:
    """A `tokenizer.json` as Llama's: BPE with a token for each byte."""
    return write_byte_fallback_json(folder / "tokenizer.json")


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte-level BPE": byte_level,
    "BPE with <unk>": functools.partial(character_bpe, unknown=True),
    "BPE without <unk>": functools.partial(character_bpe, unknown=False),
    "BPE with bytes": fallback_json,
    "WordPiece": wordpiece,
    "WordLevel": word_level,
    "Unigram": functools.partial(unigram, with_bytes=False),
    "Unigram with bytes": functools.partial(unigram, with_bytes=True),
    "SentencePiece BPE": functools.partial(train_sentencepiece, byte_fallback=False),
    "SentencePiece BPE with bytes": train_sentencepiece,
    "SentencePiece Unigram": functools.partial(train_sentencepiece, model_type="unigram", byte_fallback=False),
    "SentencePiece Unigram with bytes": functools.partial(train_sentencepiece, model_type="unigram"),
    "rank file": small_ranks,
}
"""Writes a tokenizer of each kind into a folder, and returns its path."""


def index_with(folder: Path, kind: str) -> Path:
    """An index with a tokenizer of a kind; returns its prefix."""
    (folder / kind).mkdir(parents=True)
    source = folder / f"{kind}.jsonl"
    source.write_bytes(json_lines(texts(20)))
    tokenizer, prefix = KINDS[kind](folder / kind), folder / kind / "corpus"
    words = ["index", "build", "--input", source, "--tokenizer", tokenizer, "--output", prefix, "--workers", 1]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--max-lost", "1"])
    assert not ended.value.code
    return prefix
