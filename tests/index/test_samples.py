"""Samples: tokens, labels, positions and segments, compared with a simple implementation."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexes import write_index

from megazh.index.packing import Packing
from megazh.index.reader import IndexedDataset
from megazh.index.samples import CorpusSamples, Sample, SampleShape, pack_documents

PADDING = 0


def _gather(samples: CorpusSamples, row: int) -> Sample:
    shape = samples.shape
    tokens, labels = np.full((2, 1, shape.seq_len), -7, np.int32)
    document_map = np.full((1, shape.document_map_size), -7, np.int32)
    samples.gather(np.array([row]), np.array([0]), tokens, labels, document_map)
    return Sample(tokens[0], labels[0], document_map[0, : shape.seq_len], document_map[0, shape.seq_len : -2])


def _reference(samples: CorpusSamples, documents: list[list[int]], row: int) -> tuple[list[int], ...]:
    table, shape = samples.table, samples.shape
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for piece in range(table.first_piece[row], table.first_piece[row + 1]):
        document = documents[table.document[piece]]
        for at in range(table.offset[piece], table.offset[piece] + table.length[piece]):
            tokens.append(document[at])
            labels.append(document[at + 1] if at + 1 < len(document) else -100)
            positions.append(int(at if shape.running_positions else at - table.offset[piece]))
        bounds.append(len(tokens))
    padding = shape.seq_len - len(tokens)
    tokens += [PADDING] * padding
    labels += [-100] * padding
    positions += range(padding)
    bounds += [shape.seq_len] * (shape.max_docs + 1 - len(bounds))
    return tokens, labels, positions, bounds


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(2, 999), min_size=0, max_size=50), min_size=1, max_size=30),
    seq_len=st.integers(2, 32),
    max_docs=st.integers(2, 8),
    packing=st.sampled_from(list(Packing)),
    running=st.booleans(),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_samples_equal_the_simple_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    documents: list[list[int]],
    seq_len: int,
    max_docs: int,
    packing: Packing,
    running: bool,
    dtype: type,
) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    documents = [[*document, 1] for document in documents]
    (tmp_path / "i.idx").unlink(missing_ok=True)
    index = IndexedDataset(write_index(tmp_path / "i", documents, dtype=dtype))
    shape = SampleShape(seq_len, packing, max_docs, running)
    table = pack_documents(index, np.arange(len(index)), shape, "seed", keep_tail=True)
    samples = CorpusSamples(index, shape, PADDING, table)
    assert table.length.sum() == sum(map(len, documents))
    for row in range(len(samples)):
        found = _gather(samples, row)
        assert all(array.dtype == np.int32 for array in found)
        assert tuple(array.tolist() for array in found) == _reference(samples, documents, row)
        assert int((found.labels != -100).sum()) == table.valid_labels[row]


def test_the_label_of_a_cut_is_the_token_in_the_next_sample(tmp_path: Path) -> None:
    """A document of 10 tokens in samples of 4: the last label of a sample is the first token of the next one."""
    document = [*range(10, 19), 1]
    index = IndexedDataset(write_index(tmp_path / "i", [document]))
    shape = SampleShape(4, Packing.CONCAT, 4)
    samples = CorpusSamples(index, shape, PADDING, pack_documents(index, np.arange(1), shape, 0, keep_tail=True))
    assert _gather(samples, 0).labels.tolist() == [11, 12, 13, 14]
    assert _gather(samples, 1).labels.tolist() == [15, 16, 17, 18]
    last = _gather(samples, 2)
    assert last.tokens.tolist() == [18, 1, 0, 0]
    assert last.labels.tolist() == [1, -100, -100, -100], "the end token is a target, and has none"
    assert last.position_ids.tolist() == [0, 1, 0, 1]
    assert last.cu_seqlens.tolist() == [0, 2, 4, 4, 4]


def test_a_damaged_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    index = IndexedDataset(write_index(tmp_path / "i", [[5, 6, 7, 1]] * 50))
    shape = SampleShape(16, Packing.BEST_FIT, 8)

    def build() -> list[int]:
        return pack_documents(index, np.arange(50), shape, 3, keep_tail=False).document.tolist()

    expected = build()
    files = sorted((tmp_path / "cache" / "samples").glob("*/*.npy"))
    assert len(files) == 6
    for file in files:
        for damage in (b"", file.read_bytes()[:100], b"\x80\x04pickle"):
            file.write_bytes(damage)
            assert build() == expected
        file.unlink()
        assert build() == expected
    assert build() == expected
