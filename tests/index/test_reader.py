"""Every damage is found on opening; the error is one line with the file, the expected and the found value."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from textdata import index_bytes, is_one_line_error, json_lines, megazh, small_index, texts, tokenizer_path

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.format import Header
from megazh.index.reader import IndexedDataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes made by the command: `a` and `b` of the same size, and `c`."""
    folder = tmp_path_factory.mktemp("built")
    two = ["ab 12", "cd 34 今天"]
    for name, documents in (("a", two), ("b", two[::-1]), ("c", texts(30))):
        (folder / f"{name}.jsonl").write_bytes(json_lines(documents))
        arguments = ("--input", folder / f"{name}.jsonl", "--tokenizer", tokenizer_path(), "--output", folder / name)
        assert megazh("index", "build", *arguments)[0] == 0
    for suffix in ("bin", "idx"):
        first, second = ((folder / f"{name}.{suffix}").read_bytes() for name in "ab")
        assert len(first) == len(second)
        assert first != second
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "built")
    return tmp_path / "built"


def refused(prefix: Path, file: str, kind: type[MegazhError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        IndexedDataset(prefix)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{prefix}{file}" in message
    return message


def patched(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + new + old[at + len(new) :]


S = 40  # number of sequences in the small index
LENGTHS, POINTERS, BOUNDARIES = 34, 34 + 4 * S, 34 + 12 * S

IDX_DAMAGE = {
    "empty": lambda old: b"",
    "no header": lambda old: old[:20],
    "cut in the lengths": lambda old: old[:100],
    "one byte less": lambda old: old[:-1],
    "one byte more": lambda old: old + b"\0",
    "too long": lambda old: old + bytes(1000),
    "magic": patched(0, b"MMAPIDX"),
    "version": patched(9, struct.pack("<Q", 2)),
    "float32": patched(17, b"\x07"),
    "code 0": patched(17, b"\x00"),
    "code 99": patched(17, b"\x63"),
    "sequences": patched(18, struct.pack("<Q", S + 1)),
    "sequences, huge": patched(18, struct.pack("<Q", 1 << 63)),
    "boundaries": patched(26, struct.pack("<Q", S)),
    "boundaries, none": lambda old: patched(26, struct.pack("<Q", 0))(old)[:BOUNDARIES],
    "negative length": patched(LENGTHS + 4 * 7, struct.pack("<i", -3)),
    "longer length": patched(LENGTHS + 4 * 7, struct.pack("<i", 10_000)),
    "pointer": patched(POINTERS + 8 * 5, struct.pack("<q", 1)),
    "last pointer": patched(POINTERS + 8 * (S - 1), struct.pack("<q", 1 << 40)),
    "first boundary": patched(BOUNDARIES, struct.pack("<q", 1)),
    "last boundary": patched(BOUNDARIES + 8 * S, struct.pack("<q", S - 1)),
    "boundaries that descend": patched(BOUNDARIES + 8 * 3, struct.pack("<q", 9)),
    "negative boundary": patched(BOUNDARIES + 8 * 3, struct.pack("<q", -1)),
    "pickle": lambda old: pickle.dumps({"magic": "MMIDIDX"}),
}


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_idx_is_refused(tmp_path: Path, damage: str) -> None:
    prefix = tmp_path / "small"
    small_index(prefix, S)
    path = Path(f"{prefix}.idx")
    path.write_bytes(IDX_DAMAGE[damage](path.read_bytes()))
    message = refused(prefix, ".idx")
    assert "expected" in message or "make" in message, message
    assert "found" in message, message


@pytest.mark.parametrize(
    ("damage", "change"),
    [("truncated", lambda old: old[:-2]), ("empty", lambda old: b""), ("too long", lambda old: old + b"\0\0")],
)
def test_bin_of_another_size_is_refused(tmp_path: Path, damage: str, change: Callable[[bytes], bytes]) -> None:
    prefix = tmp_path / "small"
    small_index(prefix)
    path = Path(f"{prefix}.bin")
    size = path.stat().st_size
    path.write_bytes(change(path.read_bytes()))
    message = refused(prefix, ".bin")
    assert f"expected {size} bytes" in message
    assert f"found {path.stat().st_size}" in message


def test_other_dtype_code_does_not_fit_the_bin(tmp_path: Path) -> None:
    prefix = tmp_path / "small"
    small_index(prefix)
    path = Path(f"{prefix}.idx")
    path.write_bytes(patched(17, b"\x04")(path.read_bytes()))
    with pytest.raises(DataError):
        IndexedDataset(prefix)


def test_random_damage_of_an_idx_never_ends_in_a_traceback(tmp_path: Path) -> None:
    prefix = tmp_path / "small"
    docs = small_index(prefix)
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    draw = random.Random(3)
    refusals: list[str] = []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            index = IndexedDataset(prefix)
        except DataError as error:
            refusals.append(str(error))
        else:
            assert sum(len(index[number]) for number in range(len(index))) == sum(map(len, docs))
    assert len(refusals) > 300
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_half_an_index_is_none(tmp_path: Path, missing: str) -> None:
    prefix = tmp_path / "small"
    small_index(prefix)
    Path(f"{prefix}{missing}").unlink()
    assert "missing" in refused(prefix, missing, UsageError)


def test_no_index_at_all(tmp_path: Path) -> None:
    assert "no index there" in refused(tmp_path / "nothing", ".bin", UsageError)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("opened_before", [False, True])
def test_file_of_another_build_of_the_same_size_is_refused(folder: Path, suffix: str, opened_before: bool) -> None:
    if opened_before:
        IndexedDataset(folder / "a")
    (folder / f"b{suffix}").rename(folder / f"a{suffix}")
    message = refused(folder / "a", suffix)
    assert "expected sha256" in message
    assert "found" in message


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("opened_before", [False, True])
def test_one_flipped_bit_is_found_on_opening(folder: Path, suffix: str, opened_before: bool) -> None:
    if opened_before:
        IndexedDataset(folder / "c")
    path = folder / f"c{suffix}"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    refused(folder / "c", suffix)


@pytest.mark.parametrize("cut", [0, 1, 300, -3])
def test_truncated_description_is_refused(folder: Path, cut: int) -> None:
    path = folder / "c.json"
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder / "c", ".json")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("documents", 31, "documents"),
        ("tokens", 1, "tokens"),
        ("dtype", "int32", "dtype"),
        ("documents", "30", "'documents'"),
        ("format_version", 2, "format_version"),
        ("format", "other", "not the description"),
        ("docments", 1, "did you mean 'documents'"),
    ],
)
def test_description_that_does_not_fit_is_refused(folder: Path, key: str, value: object, part: str) -> None:
    path = folder / "c.json"
    data = json.loads(path.read_bytes())
    data[key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    assert part in refused(folder / "c", ".json")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"\xff\xfe", b"not json"])
def test_foreign_description_is_refused(folder: Path, content: bytes) -> None:
    (folder / "c.json").write_bytes(content)
    refused(folder / "c", ".json")


@pytest.mark.parametrize("how", ["missing", "shorter", "of another build"])
def test_content_hashes_that_do_not_fit_are_refused(folder: Path, how: str) -> None:
    path = folder / "a.docs"
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (folder / "b.docs").rename(path)
    with pytest.raises(DataError, match=r"a\.docs: ") as caught:
        IndexedDataset(folder / "a").document_hashes()
    assert "\n" not in str(caught.value)


def test_content_hashes_are_one_a_document(folder: Path) -> None:
    index = IndexedDataset(folder / "c")
    assert index.document_hashes().dtype == np.uint64
    assert len(set(index.document_hashes().tolist())) == len(index) == 30


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_more_than_two_billion_tokens(tmp_path: Path, dtype: type) -> None:
    """An index of sparse files with three documents, the last one beyond 2**31 tokens."""
    item = np.dtype(dtype).itemsize
    lengths = np.array([2**31 - 5, 2**31 - 7, 3], np.int64)
    total = int(lengths.sum())
    header = Header(np.dtype(dtype), 3, 4)
    pointers = (np.cumsum(lengths) - lengths) * item
    (tmp_path / "big.idx").write_bytes(
        header.pack() + lengths.astype("<i4").tobytes() + pointers.tobytes() + np.arange(4, dtype="<i8").tobytes()
    )
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(total * item)
        file.seek((total - 3) * item)
        file.write(np.array([7, 8, 9], dtype).tobytes())
    index = IndexedDataset(tmp_path / "big")
    assert len(index.tokens) == total > 2**32 - 10
    assert index[2].tolist() == [7, 8, 9]
    assert len(index[1]) == 2**31 - 7
    assert index.starts.tolist() == [0, 2**31 - 5, 2**32 - 12, total]


def test_many_sequences_are_checked_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = small_index(tmp_path / "small")
    monkeypatch.setattr("megazh.index.reader._STEP", 7)
    index = IndexedDataset(tmp_path / "small")
    assert [doc.tolist() for doc in index] == [doc.tolist() for doc in docs]
    path = tmp_path / "small.idx"
    path.write_bytes(patched(POINTERS + 8 * 30, struct.pack("<q", 3))(path.read_bytes()))
    assert "sequence 30" in refused(tmp_path / "small", ".idx")


def test_tokens_cannot_be_written_to(tmp_path: Path) -> None:
    small_index(tmp_path / "small")
    index = IndexedDataset(tmp_path / "small")
    with pytest.raises(ValueError, match="read-only"):
        index[0][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        index.tokens[0] = 1


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    small_index(tmp_path / "small")
    for suffix in (".idx", ".bin", ".json"):
        Path(f"{tmp_path}/small{suffix}").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError):
        IndexedDataset(tmp_path / "small")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb is no bomb"


def test_command_says_it_in_one_line(folder: Path) -> None:
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-2])
    code, out, err = megazh("index", "inspect", folder / "a")
    assert (code, out) == (3, "")
    assert is_one_line_error(err, "a.bin", "expected", "found")
    code, _, err = megazh("index", "inspect", folder / "nothing")
    assert code == 2
    assert is_one_line_error(err, folder / "nothing")


def test_copy_in_another_place_is_whole(built: Path, folder: Path) -> None:
    assert index_bytes(built / "c") == index_bytes(folder / "c")
    assert len(IndexedDataset(folder / "c")) == 30
