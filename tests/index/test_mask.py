"""The mask of trained tokens: labels and their counts, beside a simple implementation; masks that do not fit."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexes import EOD, random_documents, random_masks, write_index

from megazh.errors import DataError, UsageError
from megazh.files import HashedFile
from megazh.index.check import inspect_index, verify_index
from megazh.index.mask import MaskWriter, count_trained, read_mask, unpack
from megazh.index.merge import merge_indexes
from megazh.index.mixture import Mixture
from megazh.index.packing import Packing
from megazh.index.reader import IndexedDataset
from megazh.index.samples import CorpusSamples, SampleShape, pack_documents

SEQ = 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))


def masked(prefix: Path, seed: int = 1, count: int = 40) -> Path:
    documents = random_documents(seed, count)
    return write_index(prefix, documents, masks=random_masks(seed, documents))


def replace_mask(prefix: Path, mask: bytes, tell: bool = False) -> None:
    """Write another mask and, with `tell`, its hash into the description."""
    path = Path(f"{prefix}.mask")
    path.write_bytes(mask)
    if tell:
        description = Path(f"{prefix}.json")
        values = json.loads(description.read_bytes())
        values["files"]["mask"] = {"bytes": len(mask), "sha256": hashlib.sha256(mask).hexdigest()}
        description.write_text(json.dumps(values))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seq_len=st.integers(2, 32), packing=st.sampled_from(list(Packing)))
def test_labels_are_the_trained_successors(tmp_path: Path, data: st.DataObject, seq_len: int, packing: Packing) -> None:
    ids = st.lists(st.integers(EOD + 1, 999), min_size=0, max_size=50)
    documents = [[*document, EOD] for document in data.draw(st.lists(ids, min_size=1, max_size=30))]
    masks = [data.draw(st.lists(st.booleans(), min_size=len(each), max_size=len(each))) for each in documents]
    (tmp_path / "i.idx").unlink(missing_ok=True)
    index = IndexedDataset(write_index(tmp_path / "i", documents, masks=masks))
    shape = SampleShape(seq_len, packing, 8)
    numbers = np.arange(len(index))
    table = pack_documents(index, numbers, shape, "seed", keep_tail=True)
    samples = CorpusSamples(index, shape, 0, table)
    rows = np.arange(len(samples))
    tokens, labels = np.full((2, len(samples), seq_len), -7, np.int32)
    document_map = np.empty((len(samples), shape.document_map_size), np.int32)
    samples.gather(rows, rows, tokens, labels, document_map)

    assert table.first_piece[-1] == len(table.document)
    for row in rows:
        expected: list[int] = []
        for piece in range(table.first_piece[row], table.first_piece[row + 1]):
            document, mask = documents[table.document[piece]], masks[table.document[piece]]
            for at in range(table.offset[piece] + 1, table.offset[piece] + table.length[piece] + 1):
                expected.append(document[at] if at < len(document) and mask[at] else -100)
        assert labels[row].tolist() == expected + [-100] * (seq_len - len(expected))
        assert table.valid_labels[row] == (labels[row] != -100).sum() > 0
    # Nothing trained got lost with the samples that were left out.
    trained = sum(sum(mask[1:]) for mask in masks)
    assert table.valid_labels.sum() == trained
    unmasked = pack_documents(
        IndexedDataset(write_index(tmp_path / "u", documents)), numbers, shape, "seed", keep_tail=True
    )
    assert len(unmasked) == len(table) + table.untrained[0]
    (tmp_path / "u.idx").unlink()


def test_counts_come_from_the_mask_and_from_the_cache(tmp_path: Path) -> None:
    masked(tmp_path / "a")
    first, again = (Mixture(tmp_path / "a", SEQ) for _ in range(2))
    assert first.table(0).untrained[0] == again.table(0).untrained[0]
    assert first.table(0).valid_labels.tolist() == again.table(0).valid_labels.tolist()
    numbers = range(100)
    assert again.count_labels(numbers) == int((again.batch(numbers).labels != -100).sum())


def test_another_mask_makes_other_samples_and_another_fingerprint(tmp_path: Path) -> None:
    documents = random_documents(1, 40)
    found = []
    for name, masks in (("a", random_masks(1, documents)), ("b", random_masks(2, documents)), ("c", None)):
        write_index(tmp_path / name, documents, masks=masks)
        (tmp_path / "m.yaml").write_text(f"corpora:\n  - {{name: x, prefix: {name}, weight: 1}}\n")
        mixture = Mixture(tmp_path / "m.yaml", SEQ)
        found.append((mixture.fingerprint.get("corpora.x.mask"), mixture.table(0).valid_labels.sum()))
    assert len(set(found)) == 3
    assert found[2][0] is None
    assert "mask" not in json.loads((tmp_path / "c.json").read_bytes())["files"]


def test_bits_are_little_endian_and_written_in_any_pieces(tmp_path: Path) -> None:
    bits = np.random.default_rng(1).random(1003) < 0.3
    writer = MaskWriter(HashedFile(tmp_path / "x"))
    for at, end in ((0, 3), (3, 3), (3, 20), (20, 1003)):
        writer.append(bits[at:end])
    info = writer.finish()
    stored = np.fromfile(tmp_path / "x", np.uint8)
    assert info.bytes == len(stored) == 126
    assert all(bool(stored[token // 8] >> (token % 8) & 1) == bits[token] for token in range(1003))
    assert count_trained(stored) == writer.trained == bits.sum()
    assert unpack(stored, 13, 999).tolist() == bits[13:999].tolist()
    assert unpack(stored, 16, 16).tolist() == []


@pytest.mark.parametrize("fault", ["missing", "truncated", "other", "damaged"])
def test_a_mask_that_does_not_belong_there_is_refused(tmp_path: Path, fault: str) -> None:
    prefix = masked(tmp_path / "a")
    good = Path(f"{prefix}.mask").read_bytes()
    if fault == "missing":
        Path(f"{prefix}.mask").unlink()
    elif fault == "truncated":
        replace_mask(prefix, good[:-1])
    elif fault == "other":
        documents = random_documents(1, 40)
        write_index(tmp_path / "b", documents, masks=random_masks(9, documents))
        shutil.copyfile(tmp_path / "b.mask", tmp_path / "a.mask")
    else:
        replace_mask(prefix, bytes([good[0] ^ 2]) + good[1:])
    expected = {"missing": "missing; it says", "truncated": "truncated, or of another index"}
    with pytest.raises(DataError, match=expected.get(fault, "mask of another index")) as error:
        IndexedDataset(prefix)
    assert str(error.value).startswith(f"{prefix}.mask: ")
    assert "\n" not in str(error.value)


def test_a_mask_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    documents = random_documents(1, 40)
    write_index(tmp_path / "a", documents, masks=[[False] * len(document) for document in documents])
    with pytest.raises(UsageError, match=r"a\.mask trains no token"):
        Mixture(tmp_path / "a", SEQ)


def test_verify_checks_the_mask_and_allows_end_tokens_inside(tmp_path: Path) -> None:
    documents = [[5, 6, EOD, 7, 8, EOD], [9, EOD]]
    masks = [[False, True, True, False, True, True], [False, True]]
    prefix = write_index(tmp_path / "a", documents, masks=masks)
    assert read_mask(prefix, IndexedDataset(prefix).metadata).tolist() == [0b10110110]
    assert "8 tokens, 5 of them trained (62.5%)" in verify_index(str(prefix))
    replace_mask(prefix, bytes([0b10110111]), tell=True)
    with pytest.raises(DataError, match="document 0: its first token is trained"):
        verify_index(str(prefix))
    prefix = write_index(tmp_path / "b", [[5, EOD, EOD]], masks=[[False, True, False]])
    with pytest.raises(DataError, match="document 0: expected one end-of-document id 1 at its end, found two"):
        verify_index(str(prefix))
    replace_mask(prefix, bytes([0b1010]), tell=True)
    with pytest.raises(DataError, match="trains tokens beyond the last of 3"):
        verify_index(str(prefix))
    assert any(line == "mask         2 of them trained (66.7%)" for line in inspect_index(str(prefix)))


def test_merged_masks_stay_with_their_tokens(tmp_path: Path) -> None:
    documents = [random_documents(seed, 5) for seed in (1, 2)]
    masks = [random_masks(seed, each) for seed, each in zip((1, 2), documents, strict=True)]
    for name, each, mask in zip("ab", documents, masks, strict=True):
        write_index(tmp_path / name, each, masks=mask)
        Path(tmp_path / f"{name}.tokenizer.json").write_text("{}")
    merge_indexes([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "ab")
    index = IndexedDataset(tmp_path / "ab")
    assert unpack(index.mask, 0, len(index.tokens)).tolist() == [bit for each in masks for mask in each for bit in mask]
    write_index(tmp_path / "c", documents[0])
    with pytest.raises(UsageError, match=r"a: has a mask of trained tokens, .*c has none"):
        merge_indexes([str(tmp_path / "c"), str(tmp_path / "a")], tmp_path / "x")


def test_an_index_without_mask_leaves_no_older_one(tmp_path: Path) -> None:
    prefix = masked(tmp_path / "a")
    assert Path(f"{prefix}.mask").exists()
    write_index(prefix, random_documents(1, 40))
    assert not Path(f"{prefix}.mask").exists()
    assert len(IndexedDataset(prefix).mask) == 0
