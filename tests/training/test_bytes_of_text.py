"""Bytes of the text that validation scores, counted from an index of every kind of tokenizer, against the true ones."""

from pathlib import Path

import numpy as np
import pytest
import tokenizer_kinds as kinds
from textdata import json_lines, texts

from megazh.index.build import Request, build_index
from megazh.index.metadata import load_tokenizer_of
from megazh.index.mixture import Mixture, ValidationSamples
from megazh.index.pools import InlinePool
from megazh.tokenizer.tokenizer import RankKind, Tokenizer
from megazh.training.held_out import count_bytes

EXACT = ("byte-level BPE", "BPE with bytes", "SentencePiece BPE with bytes", "SentencePiece Unigram with bytes")
DOCUMENTS = texts(1200, 6, most=40)


def opened(folder: Path, tokenizer: Path, documents: list[str]) -> tuple[ValidationSamples, Tokenizer, list[str]]:
    """The held-out samples of 48 tokens of an index of `documents`, its tokenizer, and the text held out."""
    (folder / "a.jsonl").write_bytes(json_lines(documents))
    ranks = RankKind.QWEN if tokenizer.suffix == ".tiktoken" else None
    made = Request([str(folder / "a.jsonl")], folder / "x", tokenizer, max_lost=1.0, ranks=ranks)
    build_index(made, InlinePool(), lambda line: None)
    (folder / "mix.yaml").write_text(
        "validation: {fraction: 0.2, salt: v1}\ncorpora: [{name: x, prefix: x, weight: 1}]\n", encoding="utf-8"
    )
    mixture = Mixture(folder / "mix.yaml", 48)
    (corpus,) = mixture.corpora
    return (
        mixture.validation,
        load_tokenizer_of(corpus.prefix, corpus.metadata),
        [documents[number] for number in corpus.validation],
    )


@pytest.mark.parametrize("name", kinds.KINDS)
def test_bytes_are_those_of_the_text_that_is_scored(name: str, tmp_path: Path) -> None:
    """All tokens of held-out documents but the first of each are labels; many documents are cut between samples."""
    words = [" ".join(text.split()) for text in texts(200)]  # all that a vocabulary of words knows
    documents = words * 3 if name == "WordLevel" else DOCUMENTS
    samples, tokenizer, held_out = opened(tmp_path, kinds.KINDS[name](tmp_path), documents)
    assert len(held_out) > 90
    true = 0
    for text in held_out:
        true += len(text.encode()) - len(tokenizer.token_bytes(tokenizer.encode(text)[0]).removeprefix(b" "))
    if tokenizer.keeps_bytes:  # bytes after NFC
        true += sum(len(tokenizer.normalize(text).encode()) - len(text.encode()) for text in held_out)
    (found,) = count_bytes(samples, range(len(samples)), tokenizer)
    assert found == pytest.approx(true, rel=0.001 if name in EXACT else 0.02)


def test_the_bytes_of_a_byte_level_bpe_are_those_of_its_tokens(tmp_path: Path) -> None:
    samples, tokenizer, _ = opened(tmp_path, kinds.byte_level(tmp_path), DOCUMENTS)
    labels = np.concatenate([samples.sample(number).labels for number in range(len(samples))])
    expected = sum(len(tokenizer.token_bytes(int(token))) for token in labels[labels >= 0])
    assert count_bytes(samples, range(len(samples)), tokenizer)[0] == expected


def test_normalised_text_counts_with_its_own_bytes(tmp_path: Path) -> None:
    """Fullwidth signs have three bytes of text each, which NFKC makes one byte of a token."""
    documents = [f"（{text[:40]}），。！１２３" for text in DOCUMENTS]
    model = kinds.train_sentencepiece(tmp_path, documents, normalization_rule_name="nmt_nfkc", vocab_size=600)
    samples, tokenizer, held_out = opened(tmp_path, model, documents)
    pieces = sum(len(tokenizer.normalize(text).encode()) for text in held_out)
    true = sum(len(text.encode()) for text in held_out)
    assert pieces < 0.85 * true
    assert count_bytes(samples, range(len(samples)), tokenizer)[0] == pytest.approx(true, rel=0.04)


def test_added_words_count_with_their_bytes(tmp_path: Path) -> None:
    documents = [f"甲{text}量子力学" * 3 for text in texts(300, 7, most=6)]

    def add(settings: dict) -> None:
        settings["added_tokens"].append(kinds.added(1500, "量子力学", special=False))

    samples, tokenizer, held_out = opened(tmp_path, kinds.byte_level(tmp_path, add), documents)
    firsts = sum(len(tokenizer.token_bytes(tokenizer.encode(text)[0])) for text in held_out)
    true = sum(len(tokenizer.normalize(text).encode()) for text in held_out) - firsts
    assert count_bytes(samples, range(len(samples)), tokenizer)[0] == true
