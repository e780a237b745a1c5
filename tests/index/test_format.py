"""MMIDIDX to the byte: megazh reads the files of megatron-core, and writes the same bytes."""

import itertools
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megazh.errors import DataError
from megazh.index.format import CODES, DTYPES, Header
from megazh.index.reader import IndexedDataset
from megazh.index.writer import IndexWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([np.uint16, np.int32])
sequence = st.lists(st.integers(0, 65_499), max_size=20)
documents = st.lists(st.lists(sequence, min_size=1, max_size=4), min_size=1, max_size=12)


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def write_as_megatron(
    prefix: Path, docs: list[list[list[int]]], dtype: type, modes: list[list[int]] | None = None, whole: bool = False
) -> None:
    import torch

    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes is not None)
    for number, doc in enumerate(docs):
        if whole:
            builder.add_document(
                torch.tensor(flat(doc), dtype=torch.int64), [len(seq) for seq in doc], modes and modes[number]
            )
            continue
        for at, seq in enumerate(doc):
            builder.add_item(torch.tensor(seq, dtype=torch.int64), modes[number][at] if modes else 0)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_as_we_do(folder: Path, prefix: Path, docs: list[list[int]], dtype: type, batches: int = 1) -> None:
    writer = IndexWriter(folder, dtype)
    step = -(-len(docs) // batches)
    for at in range(0, len(docs), step):
        part = docs[at : at + step]
        tokens = np.array([token for doc in part for token in doc], dtype)
        writer.append(tokens, np.array([len(doc) for doc in part], np.int32), np.arange(len(part), dtype=np.uint64))
    writer.commit(prefix, writer.finish(), {})


@RELAXED
@given(docs=documents, dtype=dtypes, whole=st.booleans())
def test_what_megatron_writes_we_read(tmp_path: Path, docs: list[list[list[int]]], dtype: type, whole: bool) -> None:
    prefix = tmp_path / "a"
    write_as_megatron(prefix, docs, dtype, whole=whole)
    index = IndexedDataset(prefix)
    assert index.dtype == dtype
    assert [index[number].tolist() for number in range(len(index))] == [flat(doc) for doc in docs]
    assert index.sequence_lengths.tolist() == [len(seq) for doc in docs for seq in doc]
    assert index.document_indices.tolist() == np.cumsum([0, *map(len, docs)]).tolist()
    assert index.sequence_modes is None
    assert index.metadata is None
    assert index[-1].tolist() == flat(docs[-1])
    with pytest.raises(IndexError):
        index[len(docs)]
    with pytest.raises(IndexError):
        index[-len(docs) - 1]


@RELAXED
@given(docs=documents, dtype=dtypes, data=st.data())
def test_multimodal_modes_are_read(
    tmp_path: Path, docs: list[list[list[int]]], dtype: type, data: st.DataObject
) -> None:
    modes = [[data.draw(st.integers(-128, 127)) for _ in doc] for doc in docs]
    prefix = tmp_path / "a"
    write_as_megatron(prefix, docs, dtype, modes)
    index = IndexedDataset(prefix)
    assert index.sequence_modes is not None
    assert index.sequence_modes.tolist() == flat(modes)
    assert [doc.tolist() for doc in index] == [flat(doc) for doc in docs]


@RELAXED
@given(docs=st.lists(sequence, min_size=1, max_size=30), dtype=dtypes, batches=st.integers(1, 4))
def test_what_we_write_is_what_megatron_writes_and_reads(
    tmp_path: Path, docs: list[list[int]], dtype: type, batches: int
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_as_we_do(tmp_path / "work", ours, docs, dtype, batches)
    write_as_megatron(theirs, [[doc] for doc in docs], dtype)
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
    if any(docs):
        dataset = megatron.IndexedDataset(str(ours))
        assert [dataset[number].tolist() for number in range(len(dataset))] == docs
        assert dataset.document_indices.tolist() == list(range(len(docs) + 1))
    assert [doc.tolist() for doc in IndexedDataset(ours)] == docs


def test_codes_are_megatrons() -> None:
    for code, dtype in DTYPES.items():
        assert megatron.DType.dtype_from_code(code) == dtype.type
        assert CODES[dtype] == code
    assert set(DTYPES) == {1, 2, 3, 4, 5, 8}


@pytest.mark.parametrize("vocabulary", [1, 65_499, 65_500, 151_936])
def test_dtype_rule_is_megatrons(vocabulary: int) -> None:
    from megazh.tokenizer.tokenizer import dtype_for

    assert dtype_for(vocabulary).type is megatron.DType.optimal_dtype(vocabulary)


def test_header_to_the_byte() -> None:
    packed = Header(np.dtype(np.uint16), 3, 4).pack()
    assert packed == b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + b"\x08" + struct.pack("<QQ", 3, 4)
    assert len(packed) == 34
    assert Header(np.dtype(np.uint16), 8930, 8931).end == 178_642


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.uint64])
def test_dtypes_that_hold_no_tokens_are_refused(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(DataError, match="cannot be stored"):
        IndexWriter(tmp_path, dtype)
