"""Loss by position against a loop over tokens, and the long documents of an index and of text."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import alone, decoder, logits, small
from textdata import json_lines
from tokenizer_kinds import index_with

from megazh.errors import DataError, UsageError
from megazh.evaluation import position_loss
from megazh.evaluation.long_documents import long_documents
from megazh.evaluation.position_loss import position_losses
from megazh.index.metadata import load_tokenizer_of
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import load_tokenizer

BOUNDS = (8, 16, 40)


def made(count: int, length: int = 44) -> list[Any]:
    return list(np.random.default_rng(4).integers(0, 97, (count, length)).astype(np.uint16))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equals_a_loop_over_tokens(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    monkeypatch.setattr(position_loss, "_CHUNK", 7)
    model, documents = decoder(small(rope_scaling={"type": "linear", "factor": 2.0})).eval(), made(5)
    losses: dict[int, list[float]] = {end: [] for end in BOUNDS}
    with torch.no_grad():
        for document in documents:
            found = logits(model, torch.from_numpy(document.astype(np.int64))[None], *alone(len(document)))[0]
            for position in range(1, 40):
                end = min(end for end in BOUNDS if position < end)
                losses[end].append(-float(found[position - 1].double().log_softmax(0)[document[position]]))
    ranges = position_losses(model, documents, BOUNDS, batch_size)
    assert [(each.begin, each.end, each.tokens) for each in ranges] == [(0, 8, 35), (8, 16, 40), (16, 40, 120)]
    for each in ranges:
        assert each.loss == pytest.approx(float(np.mean(losses[each.end])), rel=1e-5)


def test_a_uniform_model_has_the_same_loss_everywhere() -> None:
    model = decoder(small()).eval()
    with torch.no_grad():
        model.norm.weight.zero_()
    for each in position_losses(model, made(2), BOUNDS):
        assert each.loss == pytest.approx(math.log(97), rel=1e-6)


def test_a_model_that_repeats_a_token_has_a_low_loss_where_it_repeats() -> None:
    """Without blocks, an identity embedding predicts each token again."""
    model = decoder(small(vocab_size=32, num_hidden_layers=1)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.zero_()
        model.embedding.weight.zero_()[:32, :32] = torch.eye(32)
        model.norm.weight.fill_(5.0)
    document = np.concatenate((np.arange(8), np.full(32, 3)))
    first, _, last = position_losses(model, [document], BOUNDS)
    assert first.loss > 5
    assert last.loss < 0.01


def test_weights_that_are_not_finite() -> None:
    model = decoder(small()).eval()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="positions 0 to 8: the loss is not finite"):
        position_losses(model, made(1), BOUNDS)


def test_documents_of_an_index(tmp_path: Path) -> None:
    prefix = index_with(tmp_path, "byte-level BPE")
    index = IndexedDataset(prefix)
    assert index.metadata is not None
    tokenizer = load_tokenizer_of(prefix, index.metadata)
    lengths = np.diff(index.starts)
    length = int(np.sort(lengths)[-4])
    found = long_documents(str(prefix), tokenizer, length, None, "text")
    assert (len(found.ids), found.read) == ((lengths >= length).sum(), len(index))
    first = int(np.flatnonzero(lengths >= length)[0])
    assert np.array_equal(found.ids[0], index[first][:length])
    one = long_documents(str(prefix), tokenizer, length, 1, "text")
    assert (len(one.ids), one.read) == (1, first + 1)
    with pytest.raises(
        UsageError, match=r"none of 20 documents has 9,999 tokens; give longer ones, or smaller --bounds"
    ):
        long_documents(str(prefix), tokenizer, 9999, None, "text")
    other = index_with(tmp_path, "SentencePiece BPE")
    with pytest.raises(UsageError, match="made with another tokenizer than the model's; give the text instead"):
        long_documents(str(other), tokenizer, 2, None, "text")
    Path(f"{prefix}.json").unlink()
    with pytest.raises(UsageError, match="its tokenizer is not known; 'megazh index adopt"):
        long_documents(str(prefix), tokenizer, 2, None, "text")


def test_documents_of_text(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_json)
    texts = ["短。", "从前有一座山，山里有一座庙。" * 5, "春天来了。" * 20, "庙里有一个老和尚。" * 9]
    path = tmp_path / "books.jsonl"
    path.write_bytes(json_lines(texts, "body"))
    found = long_documents(str(path), tokenizer, 20, None, "body")
    assert [ids.tolist() for ids in found.ids] == [tokenizer.encode(text)[:20] for text in texts[1:]]
    assert found.read == 4
    few = long_documents(str(path), tokenizer, 20, 2, "body")
    assert (len(few.ids), few.read) == (2, 3)
    with pytest.raises(UsageError):
        long_documents(str(tmp_path / "none.jsonl"), tokenizer, 20, None, "text")
