"""Inspecting and verifying an index."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from textdata import is_one_line_error, json_lines, megazh, small_index, texts, tokenizer_path

from megazh.errors import DataError, UsageError
from megazh.index.build import Request, build_index
from megazh.index.check import inspect_index, verify_index
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.jsonl").write_bytes(
        json_lines(["今天 hello\nworld", *texts(60), "last one"]) + b"broken\n" + json_lines([""])
    )
    request = Request([str(folder / "a.jsonl")], folder / "x", tokenizer_path(), max_bad=0.5)
    build_index(request, InlinePool(), lambda line: pytest.fail(line))
    return folder


@pytest.fixture
def prefix(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(built, tmp_path / "copy")
    return str(tmp_path / "copy" / "x")


def change_tokens(prefix: str, at: int, token: int) -> None:
    """Write another token, and put matching hashes into the description."""
    path = Path(f"{prefix}.bin")
    with open(path, "r+b") as file:
        file.seek(at * 2)
        file.write(struct.pack("<H", token))
    description = Path(f"{prefix}.json")
    data = json.loads(description.read_bytes())
    data["files"]["bin"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    description.write_text(json.dumps(data), encoding="utf-8")


def test_whole_index_passes(prefix: str) -> None:
    data = json.loads(Path(f"{prefix}.json").read_bytes())
    assert verify_index(prefix).startswith(f"{data['documents']:,} documents, {data['tokens']:,} tokens: hashes")
    code, out, err = megazh("index", "verify", prefix, prefix)
    assert (code, err) == (0, "")
    assert out.count("are right") == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs"])
def test_flipped_bit_is_found_even_with_time_and_size_as_before(prefix: str, suffix: str) -> None:
    IndexedDataset(prefix).document_hashes()
    path = Path(f"{prefix}{suffix}")
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError) as caught:
        verify_index(prefix)
    assert f"{prefix}{suffix}" in str(caught.value)
    code, out, err = megazh("index", "verify", prefix)
    assert (code, out) == (3, "")
    assert is_one_line_error(err, f"{prefix}{suffix}", "expected", "found")


def test_id_above_the_vocabulary_is_found(prefix: str) -> None:
    change_tokens(prefix, 17, 1500)
    with pytest.raises(DataError, match=r"x\.bin: token 17: expected an id below the vocabulary of 1500, found 1500"):
        verify_index(prefix)


def test_missing_end_token_is_found(prefix: str) -> None:
    index = IndexedDataset(prefix)
    change_tokens(prefix, int(index.starts[6]) - 1, 77)
    with pytest.raises(DataError, match=r"x\.bin: document 5: expected end-of-document id 1, found 77"):
        verify_index(prefix)


def test_end_token_within_a_document_is_found(prefix: str) -> None:
    index = IndexedDataset(prefix)
    change_tokens(prefix, int(index.starts[5]), 1)
    with pytest.raises(DataError, match=r"expected 62 end-of-document ids, one per document, found 63"):
        verify_index(prefix)


def test_missing_content_hashes_are_found(prefix: str) -> None:
    Path(f"{prefix}.docs").unlink()
    code, _, err = megazh("index", "verify", prefix)
    assert code == 3, err
    assert is_one_line_error(err, ".docs")


def test_large_index_is_checked_in_steps(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megazh.index.check._STEP", 100)
    assert "are right" in verify_index(prefix)
    change_tokens(prefix, 1234, 60_000)
    with pytest.raises(DataError, match="token 1234: "):
        verify_index(prefix)


def test_index_without_description_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    docs = small_index(tmp_path / "small", dtype=np.int32)
    assert f"largest id {max(doc.max() for doc in docs)}" in verify_index(str(tmp_path / "small"))
    with open(tmp_path / "small.bin", "r+b") as file:
        file.seek(4 * 9)
        file.write(struct.pack("<i", -5))
    with pytest.raises(DataError, match=r"token 9: expected an id of at least 0, found -5"):
        verify_index(str(tmp_path / "small"))


def test_inspect_shows_header_counts_and_histogram(prefix: str) -> None:
    code, out, err = megazh("index", "inspect", prefix)
    assert (code, err) == (0, "")
    data = json.loads(Path(f"{prefix}.json").read_bytes())
    for part in (
        "MMIDIDX version 1",
        "uint16",
        "62 in 62 sequences",
        f"{data['tokens']:,}",
        f"{data['text_bytes']:,} bytes",
        data["tokenizer"]["fingerprint"],
        "1 <|endoftext|>",
        "1 empty documents, 1 rejected lines",
        data["files"]["bin"]["sha256"],
        "a.jsonl",
    ):
        assert part in out, part
    counts = [line.split("█")[0].split()[-1] for line in out.splitlines() if "█" in line]
    assert counts == [str(count) for count in data["token_length_histogram"].values()]


@pytest.mark.parametrize(("number", "text"), [(0, "今天 hello\nworld<|endoftext|>"), (-1, "last one<|endoftext|>")])
def test_inspect_decodes_a_document(prefix: str, number: int, text: str) -> None:
    code, out, err = megazh("index", "inspect", prefix, "--document", number)
    assert (code, err) == (0, "")
    assert out.endswith(f"{text}\n")
    ids = " ".join(map(str, IndexedDataset(prefix)[number].tolist()))
    assert ids in out


def test_inspect_shows_at_most_so_many_tokens(prefix: str) -> None:
    lines = list(inspect_index(prefix, 0, tokens=2))
    assert "the first 2" in lines[-3]
    assert len(lines[-2].split()) == 3


@pytest.mark.parametrize("number", [62, -63])
def test_inspect_of_a_document_that_is_not_there(prefix: str, number: int) -> None:
    with pytest.raises(UsageError, match=rf"--document {number}: .* has documents 0 to 61"):
        list(inspect_index(prefix, number))


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_inspect_does_not_decode_with_another_tokenizer(prefix: str, how: str) -> None:
    path = Path(f"{prefix}.tokenizer.json")
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"x\.tokenizer\.json"):
        list(inspect_index(prefix, 0))


def test_inspect_of_what_megatron_wrote(tmp_path: Path) -> None:
    docs = small_index(tmp_path / "small")
    lines = list(inspect_index(str(tmp_path / "small"), 3))
    assert any("small.json is missing" in line for line in lines)
    assert " ".join(map(str, docs[3])) in lines[-1]
