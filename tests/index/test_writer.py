"""Writing an index: no file before commit, the old or the new index after a kill, and memory that does not grow."""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from textdata import finish, start

from megazh.errors import DataError, UsageError
from megazh.index.metadata import length_histogram
from megazh.index.reader import IndexedDataset
from megazh.index.writer import IndexWriter


def fill(writer: IndexWriter, value: int, documents: int = 50) -> None:
    tokens = np.full(documents * 20, value, writer.dtype)
    writer.append(tokens, np.full(documents, 20, np.int32), np.full(documents, value, np.uint64))


def test_nothing_is_there_before_commit(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "work", np.uint16)
    fill(writer, 5)
    files = writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    writer.commit(tmp_path / "a", files, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.docs", "a.idx", "work"]
    assert list((tmp_path / "work").iterdir()) == []
    for suffix in ("bin", "idx", "docs"):
        path = tmp_path / f"a.{suffix}"
        assert path.stat().st_size == getattr(files, suffix).bytes


def test_old_index_stays_until_commit(tmp_path: Path) -> None:
    for value in (1, 2):
        writer = IndexWriter(tmp_path / "work", np.uint16)
        fill(writer, value)
        files = writer.finish()
        if value == 2:
            assert IndexedDataset(tmp_path / "a")[0][0] == 1
        writer.commit(tmp_path / "a", files, {})
    assert IndexedDataset(tmp_path / "a")[0][0] == 2


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_tokens_of_another_dtype_are_refused(tmp_path: Path, dtype: type) -> None:
    writer = IndexWriter(tmp_path / "work", np.uint16)
    with pytest.raises(DataError, match="expected tokens of dtype uint16"):
        writer.append(np.zeros(3, dtype), np.array([3], np.int32), np.zeros(1, np.uint64))


@pytest.mark.parametrize(("lengths", "hashes"), [([2], 1), ([3, 1], 2), ([3], 2)])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, lengths: list[int], hashes: int) -> None:
    writer = IndexWriter(tmp_path / "work", np.uint16)
    with pytest.raises(DataError, match="do not fit"):
        writer.append(np.zeros(3, np.uint16), np.array(lengths, np.int32), np.zeros(hashes, np.uint64))


def test_index_without_a_document_is_refused(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "work", np.uint16)
    writer.append(np.empty(0, np.uint16), np.empty(0, np.int32), np.empty(0, np.uint64))
    with pytest.raises(DataError, match="no document to index"):
        writer.finish()
    assert not (tmp_path / "a.idx").exists()


def test_histogram_counts_by_powers_of_two(tmp_path: Path) -> None:
    lengths = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**31 - 1], np.int32)
    assert length_histogram(lengths) == {0: 1, 1: 1, 2: 2, 4: 2, 8: 1, 512: 1, 1024: 1, 2**30: 1}
    writer = IndexWriter(tmp_path / "work", np.uint16)
    for size in (1, 1, 5, 300):
        writer.append(np.zeros(size, np.uint16), np.array([size], np.int32), np.zeros(1, np.uint64))
    assert writer.histogram == {1: 2, 4: 1, 256: 1}
    assert (writer.documents, writer.tokens) == (4, 307)


def rebuild_forever(folder: Path, alive: int) -> None:
    """Build two indexes alternately at the same prefix, each with further files beside it."""
    value = 2
    while True:
        value = 3 - value
        writer = IndexWriter(folder / "work", np.uint16)
        fill(writer, value, 50 + value)
        files = writer.finish()
        beside = folder / "work" / "beside"
        beside.write_text(str(value), encoding="utf-8")
        writer.commit(folder / "a", files, {".beside": beside})
        os.write(alive, b".")


def test_killed_at_any_moment_there_is_old_new_or_none(tmp_path: Path) -> None:
    draw = random.Random(11)
    seen: Counter[int] = Counter()
    for _ in range(70):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                rebuild_forever(tmp_path, write)
            finally:
                os._exit(1)
        os.close(write)
        os.read(read, 1)  # one build is complete
        time.sleep(draw.uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(read)
        try:
            index = IndexedDataset(tmp_path / "a")
        except UsageError:
            seen[0] += 1
            continue
        value = int(index[0][0])
        seen[value] += 1
        assert len(index) == 50 + value
        assert (index.tokens == value).all()
        assert (index.document_hashes() == value).all()
        assert (tmp_path / "a.beside").read_text(encoding="utf-8") == str(value)
    assert set(seen) == {0, 1, 2}, "the moments of the kills did not meet all cases"


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from megazh.index.writer import IndexWriter
writer = IndexWriter(Path(sys.argv[1]) / "work", np.uint16)
tokens, lengths, hashes = np.zeros(1 << 19, np.uint16), np.full(1 << 13, 64, np.int32), np.zeros(1 << 13, np.uint64)
writer.append(tokens, lengths, hashes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(int(sys.argv[2])):
    writer.append(tokens, lengths, hashes)
appended = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
writer.commit(Path(sys.argv[1]) / "a", writer.finish(), {})
print(appended - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    """Write 300 MB of tokens in 2.4 million documents."""
    code, out, err = finish(start(sys.executable, "-c", MEASURE, tmp_path, 300))
    assert code == 0, err
    appending, finishing = (int(kilobytes) / 1024 for kilobytes in out.split())
    assert appending < 16
    assert finishing < 64
