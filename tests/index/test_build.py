"""Building an index within this process: its contents, resuming, refusals, bad records, the fast encoder."""

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from textdata import (
    index_bytes,
    is_one_line_error,
    json_lines,
    megazh,
    small_index,
    texts,
    tokenizer_path,
    write_parquet,
)

from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.errors import BusyError, DataError, MegazhError, UsageError
from megazh.files import locked
from megazh.index.build import Request, Summary, build_index
from megazh.index.piece import Result, Setup, Task
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.encoders import FastokensEncoder

PIECE = 4000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megazh.index.build.piece_size", lambda sources: PIECE)
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))


class CountingPool(InlinePool):
    """Counts the pieces that it encodes. At a given piece, it may be interrupted or call a function."""

    def __init__(self, stop_at: int | None = None, at: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.encoded = 0
        self._stop_at, self._at = stop_at, at

    def run(self, setup: Setup, tasks: Iterator[Task]) -> Iterator[Result]:
        for task in tasks:
            if task.piece is not None:
                if self.encoded == self._stop_at:
                    raise KeyboardInterrupt
                if self._at:
                    self._at(self.encoded)
                self.encoded += 1
            yield self._worker.run(setup, task)


def build(source: Path | Sequence[Path], output: Path, pool: InlinePool | None = None, **request: Any) -> Summary:
    inputs = [str(path) for path in ([source] if isinstance(source, Path) else source)]
    request.setdefault("tokenizer", tokenizer_path())
    said: list[str] = request.pop("said", [])
    return build_index(Request(inputs=inputs, output=output, **request), pool or InlinePool(), said.append)


def interrupted(source: Path | Sequence[Path], output: Path, pieces: int, **request: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(source, output, CountingPool(pieces), **request)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(json_lines(texts(200)))
    return path


def documents_of(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def expected_documents(documents: Sequence[str], tokenizer: Path | None = None) -> list[list[int]]:
    loaded = load_tokenizer(tokenizer or tokenizer_path())
    return [[*loaded.encode(text), loaded.eod_id] for text in documents]


def test_index_holds_the_documents_in_order_each_with_its_end(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = build(corpus, tmp_path / "x", said=said)
    assert summary.pieces > 5
    assert said == []
    assert documents_of(tmp_path / "x") == expected_documents(texts(200))
    hashes = IndexedDataset(tmp_path / "x").document_hashes()
    assert hashes.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in texts(200)]


def test_description_is_right(corpus: Path, tmp_path: Path) -> None:
    corpus.write_bytes(corpus.read_bytes() + json_lines(["", "\ufeff"]) + b'{"text": 5}\n')
    metadata = build(corpus, tmp_path / "x", max_bad=0.5).metadata
    assert json.loads((tmp_path / "x.json").read_bytes()) == metadata.model_dump()
    documents = expected_documents(texts(200))
    assert metadata.documents == 200
    assert metadata.tokens == sum(map(len, documents))
    assert metadata.text_bytes == sum(len(text.encode()) for text in texts(200))
    assert metadata.empty_documents == 2
    assert (metadata.rejected.total, metadata.rejected.reasons) == (1, {"not text": 1})
    histogram: dict[str, int] = {}
    for document in documents:
        edge = str(1 << (len(document).bit_length() - 1))
        histogram[edge] = histogram.get(edge, 0) + 1
    assert metadata.token_length_histogram == histogram
    assert list(metadata.token_length_histogram) == sorted(histogram, key=int)
    assert [(source.name, source.bytes) for source in metadata.sources] == [("a.jsonl", corpus.stat().st_size)]
    tokenizer = load_tokenizer(tokenizer_path())
    assert (metadata.tokenizer.fingerprint, metadata.tokenizer.vocab_size) == (tokenizer.fingerprint, 1500)
    assert (tmp_path / "x.tokenizer.json").read_bytes() == tokenizer_path().read_bytes()
    assert metadata.dtype == "uint16"


def test_description_tells_nothing_of_time_or_place(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    elsewhere = tmp_path / "other" / "place"
    shutil.copytree(corpus.parent, elsewhere)
    (elsewhere / "tok").mkdir()
    shutil.copy(tokenizer_path(), elsewhere / "tok" / "tokenizer.json")
    build(elsewhere / "a.jsonl", elsewhere / "y", tokenizer=elsewhere / "tok")
    assert index_bytes(tmp_path / "x") == index_bytes(elsewhere / "y")


def test_order_of_inputs_on_the_command_line_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    (corpus.parent / "b.jsonl").write_bytes(json_lines(texts(20, 3)))
    both = [corpus, corpus.parent / "b.jsonl"]
    build(both, tmp_path / "x")
    build(both[::-1], tmp_path / "y")
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "y")
    assert documents_of(tmp_path / "x") == expected_documents(texts(200) + texts(20, 3))


def wide_tokenizer(folder: Path) -> Path:
    """A vocabulary so large that ids need int32; most of them are never used."""
    settings = json.loads(tokenizer_path().read_text(encoding="utf-8"))
    settings["model"]["vocab"].update({f"unused {number}": number for number in range(1500, 65_500)})
    path = folder / "wide.json"
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return path


def test_large_vocabulary_is_stored_in_32_bits(corpus: Path, tmp_path: Path) -> None:
    metadata = build(corpus, tmp_path / "x", tokenizer=wide_tokenizer(tmp_path)).metadata
    assert metadata.dtype == "int32"
    assert IndexedDataset(tmp_path / "x").dtype == np.int32
    assert documents_of(tmp_path / "x") == expected_documents(texts(200))


def test_end_token_of_ones_own(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x", eod="<|im_end|>")
    assert {document[-1] for document in documents_of(tmp_path / "x")} == {3}


def test_literal_control_tokens_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["<|endoftext|>", "a<|endoftext|>b<|pad|>"]))
    build(tmp_path / "a.jsonl", tmp_path / "x")
    documents = documents_of(tmp_path / "x")
    assert [document.count(1) for document in documents] == [1, 1]
    assert min(token for document in documents for token in document[:-1]) > 3


@pytest.mark.parametrize("pieces", [0, 1, 4])
def test_interrupted_build_goes_on(corpus: Path, tmp_path: Path, pieces: int) -> None:
    whole = build(corpus, tmp_path / "whole")
    interrupted(corpus, tmp_path / "x", pieces)
    assert not (tmp_path / "x.idx").exists()
    assert not (tmp_path / "x.bin").exists()
    pool = CountingPool()
    summary = build(corpus, tmp_path / "x", pool)
    assert (summary.pieces_kept, pool.encoded, summary.pieces) == (pieces, whole.pieces - pieces, whole.pieces)
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "whole")
    assert not (tmp_path / "x.build").exists()


def test_pieces_finished_out_of_order_are_kept(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "whole")
    interrupted(corpus, tmp_path / "x", 6)
    pieces = sorted((tmp_path / "x.build").glob("*.piece"))
    pieces[0].unlink()
    pieces[3].unlink()
    assert build(corpus, tmp_path / "x").pieces_kept == 4
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "whole")


def test_restart_throws_finished_pieces_away(corpus: Path, tmp_path: Path) -> None:
    interrupted(corpus, tmp_path / "x", 4)
    pool = CountingPool()
    summary = build(corpus, tmp_path / "x", pool, restart=True)
    assert (summary.pieces_kept, pool.encoded) == (0, summary.pieces)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-16] + b"\xff" * 8 + data[-8:],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    ],
)
def test_damaged_piece_is_done_again(corpus: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    build(corpus, tmp_path / "whole")
    interrupted(corpus, tmp_path / "x", 3)
    piece = min((tmp_path / "x.build").glob("*.piece"))
    piece.write_bytes(damage(piece.read_bytes()))
    assert build(corpus, tmp_path / "x").pieces_kept == 2
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "whole")


def test_damaged_plan_is_no_traceback(corpus: Path, tmp_path: Path) -> None:
    for content in (b"", b"{}", b"[]", b'{"tokenizer": {}}'):
        interrupted(corpus, tmp_path / "x", 1)
        (tmp_path / "x.build" / "plan.json").write_bytes(content)
        try:
            build(corpus, tmp_path / "x")
        except MegazhError:
            build(corpus, tmp_path / "x", restart=True)
        assert (tmp_path / "x.idx").exists()
        (tmp_path / "x.idx").unlink()


def change_content(corpus: Path) -> dict[str, Any]:
    data = corpus.read_bytes()
    corpus.write_bytes(data.replace(data[100:103], b"zzz"[: len(data[100:103])], 1))
    return {}


def change_name(corpus: Path) -> dict[str, Any]:
    corpus.rename(corpus.with_name("b.jsonl"))
    return {"source": corpus.with_name("b.jsonl")}


CHANGES = {
    "content": (change_content, "a.jsonl has changed"),
    "name": (change_name, "a.jsonl was there"),
    "one more": (
        lambda corpus: {"source": [corpus, write_parquet(corpus.parent / "z.parquet", ["x"])]},
        "z.parquet was not",
    ),
    "end": (lambda corpus: {"eod": "<|im_end|>"}, "another tokenizer (fingerprint"),
    "tokenizer": (lambda corpus: {"tokenizer": wide_tokenizer(corpus.parent.parent)}, "another tokenizer (fingerprint"),
    "key": (lambda corpus: {"read": ReadOptions(text_key="body")}, "text_key was 'text', is 'body'"),
    "limit": (lambda corpus: {"read": ReadOptions(max_document_bytes=9)}, "max_document_bytes was 64000000, is 9"),
    "documents": (
        lambda corpus: {"read": ReadOptions(text_documents=TextDocuments.BLANK_LINES)},
        "text_documents was 'file', is 'blank-lines'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("complete", [False, True])
def test_changed_request_is_refused_by_name(corpus: Path, tmp_path: Path, change: str, complete: bool) -> None:
    if complete:
        build(corpus, tmp_path / "x")
    else:
        interrupted(corpus, tmp_path / "x", 2)
    before = index_bytes(tmp_path / "x") if complete else sorted((tmp_path / "x.build").glob("*.piece"))
    make, part = CHANGES[change]
    request = make(corpus)
    with pytest.raises(UsageError) as caught:
        build(request.pop("source", corpus), tmp_path / "x", **request)
    message = str(caught.value)
    assert part in message
    assert "--restart" in message
    assert "\n" not in message
    assert before == (index_bytes(tmp_path / "x") if complete else sorted((tmp_path / "x.build").glob("*.piece")))


def test_more_bad_records_allowed_is_no_change(corpus: Path, tmp_path: Path) -> None:
    corpus.write_bytes(corpus.read_bytes() + b"broken\n" * 3)
    with pytest.raises(
        DataError, match=r"^3 of 203 records are bad \(1\.478%, more than --max-bad 0\.100%\)"
    ) as caught:
        build(corpus, tmp_path / "x")
    assert "broken JSON 3" in str(caught.value)
    assert "first: a.jsonl line 201" in str(caught.value)
    assert not (tmp_path / "x.idx").exists()
    listed = (tmp_path / "x.build" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in listed] == [201, 202, 203]
    pool = CountingPool()
    summary = build(corpus, tmp_path / "x", pool, max_bad=0.05)
    assert pool.encoded == 0
    assert summary.pieces_kept == summary.pieces


@pytest.mark.parametrize(
    ("bad", "good", "limit", "allowed"),
    [
        (1, 999, 0.001, True),
        (2, 998, 0.001, False),
        (1, 998, 0.001, False),
        (1, 9, 0.1, True),
        (29, 71, 0.29, True),
        (30, 70, 0.29, False),
        (57, 43, 0.57, True),
        (1, 9, 0.0, False),
        (9, 1, 1.0, True),
    ],
)
def test_limit_of_bad_records_is_inclusive(tmp_path: Path, bad: int, good: int, limit: float, allowed: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"broken\n" * bad + json_lines(["x"] * good))
    if allowed:
        assert build(path, tmp_path / "x", max_bad=limit).metadata.rejected.total == bad
    else:
        with pytest.raises(DataError, match="records are bad"):
            build(path, tmp_path / "x", max_bad=limit)


def test_file_of_nothing_but_bad_lines_is_given_up_early(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "the key is another one"}\n' * 5000)
    pool = CountingPool()
    with pytest.raises(DataError, match=r"missing key 1\d\d\d; first: a\.jsonl line 1: no 'text'; keys: content"):
        build(path, tmp_path / "x", pool)
    assert pool.encoded < 15


@pytest.mark.parametrize("content", [b"", b"\n\n", json_lines(["", ""]), b"broken\n"])
def test_input_without_a_document_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no document to index"):
        build(tmp_path / "a.jsonl", tmp_path / "x", max_bad=1.0)
    assert not (tmp_path / "x.idx").exists()


def test_reject_file_is_exact(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = json_lines(texts(100)).splitlines(keepends=True)
    lines[3:3] = [b'{"text": null}\n']
    lines[80:80] = [b"{\n", b"\n"]
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    rows: list[str | None] = list(texts(60, 4))
    rows[50] = None
    write_parquet(folder / "b.parquet", rows, 20)
    (folder / "c.txt").write_bytes(b"\xff")
    (folder / "d.txt").write_bytes(b"fine")
    (folder / "e.txt").write_bytes("漢字".encode("big5"))
    build(folder, tmp_path / "x", max_bad=0.5)
    entries = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in entries] == [
        ("a.jsonl", 4, "not text"),
        ("a.jsonl", 81, "broken JSON"),
        ("b.parquet", 51, "not text"),
        ("c.txt", 1, "invalid UTF-8"),
        ("e.txt", 1, "invalid UTF-8"),
    ]
    assert all(set(entry) == {"file", "line", "reason", "detail"} and entry["detail"] for entry in entries)


def test_reject_file_of_an_older_build_goes(corpus: Path, tmp_path: Path) -> None:
    good = corpus.read_bytes()
    corpus.write_bytes(good + b"broken\n")
    build(corpus, tmp_path / "x", max_bad=0.5)
    assert (tmp_path / "x.rejected.jsonl").exists()
    corpus.write_bytes(good)
    build(corpus, tmp_path / "x", restart=True)
    assert not (tmp_path / "x.rejected.jsonl").exists()


def test_line_that_names_a_lone_surrogate_can_be_reported(corpus: Path, tmp_path: Path) -> None:
    corpus.write_bytes(corpus.read_bytes() + b'{"\\ud800": 1}\n')
    assert build(corpus, tmp_path / "x", max_bad=0.5).metadata.rejected.reasons == {"missing key": 1}
    (entry,) = map(json.loads, (tmp_path / "x.rejected.jsonl").read_bytes().splitlines())
    assert entry["line"] == 201


def test_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """File names in GBK are common on old disks."""
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    path = os.fsdecode(folder + "/今天.jsonl".encode("gbk"))
    Path(path).write_bytes(json_lines(texts(10)) + b"broken\n")
    code, _, err = megazh(
        "index",
        "build",
        "--input",
        path,
        "--tokenizer",
        tokenizer_path(),
        "--output",
        tmp_path / "x",
        "--max-bad",
        "50%",
    )
    assert "Traceback" not in err
    assert code in (0, 2)
    if code == 0:
        assert len(IndexedDataset(tmp_path / "x")) == 10


def test_complete_index_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    before = index_bytes(tmp_path / "x")
    pool = CountingPool()
    summary = build(corpus, tmp_path / "x", pool)
    assert summary.already_complete
    assert pool.encoded == 0
    assert index_bytes(tmp_path / "x") == before
    assert not (tmp_path / "x.build").exists()


@pytest.mark.parametrize("damage", ["no bin", "short bin", "no docs"])
def test_index_with_a_file_gone_is_not_called_complete(corpus: Path, tmp_path: Path, damage: str) -> None:
    build(corpus, tmp_path / "x")
    path = tmp_path / ("x.docs" if damage == "no docs" else "x.bin")
    if damage == "short bin":
        os.truncate(path, 100)
    else:
        path.unlink()
    try:
        complete = build(corpus, tmp_path / "x").already_complete
    except MegazhError:
        return  # refused, which is as good as built again
    assert not complete
    assert len(IndexedDataset(tmp_path / "x").document_hashes()) == 200


def test_restart_replaces_a_complete_index_only_when_done(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    old = index_bytes(tmp_path / "x")
    interrupted(corpus, tmp_path / "x", 3, eod="<|im_end|>", restart=True)
    assert index_bytes(tmp_path / "x") == old
    build(corpus, tmp_path / "x", eod="<|im_end|>", restart=True)
    assert {document[-1] for document in documents_of(tmp_path / "x")} == {3}


def test_interrupted_replacement_goes_on_without_restart(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    interrupted(corpus, tmp_path / "x", 3, eod="<|im_end|>", restart=True)
    assert build(corpus, tmp_path / "x", eod="<|im_end|>").pieces_kept == 3
    assert {document[-1] for document in documents_of(tmp_path / "x")} == {3}


def test_foreign_index_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    small_index(tmp_path / "x")
    with pytest.raises(UsageError, match=r"x\.idx: an index that megazh did not build is in the way"):
        build(corpus, tmp_path / "x")
    assert len(IndexedDataset(tmp_path / "x")) == 40


def test_folder_left_by_a_kill_right_after_commit_does_no_harm(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x.build.done").mkdir()
    (tmp_path / "x.build.done" / "000000-00000000.piece").write_bytes(b"left")
    build(corpus, tmp_path / "x")
    assert len(IndexedDataset(tmp_path / "x")) == 200


def test_pieces_left_by_a_kill_after_commit_go_with_the_next_run(corpus: Path, tmp_path: Path) -> None:
    interrupted(corpus, tmp_path / "x", 5)
    shutil.copytree(tmp_path / "x.build", tmp_path / "kept")
    build(corpus, tmp_path / "x")
    shutil.copytree(tmp_path / "kept", tmp_path / "x.build")
    assert build(corpus, tmp_path / "x").already_complete
    assert not (tmp_path / "x.build").exists()


def test_input_that_changes_meanwhile_is_noticed(corpus: Path, tmp_path: Path) -> None:
    def append(number: int) -> None:
        if number == 3:
            with open(corpus, "ab") as file:
                file.write(json_lines(["one more"]))

    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        build(corpus, tmp_path / "x", CountingPool(at=append))
    assert not (tmp_path / "x.idx").exists()


def test_same_prefix_twice_at_once_is_refused(corpus: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "x.build" / "lock"), pytest.raises(BusyError, match="another process builds this index"):
        build(corpus, tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json", ".docs"])
def test_output_with_a_suffix_of_ours_is_refused(corpus: Path, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UsageError, match=f"give the prefix without {suffix}"):
        build(corpus, tmp_path / f"x{suffix}")


def test_output_that_is_a_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; give a prefix"):
        build(corpus, tmp_path)


@pytest.mark.parametrize("output", ["in/a.jsonl/x", "/proc/nowhere/x"])
def test_output_where_nothing_can_be_written_is_one_line(corpus: Path, tmp_path: Path, output: str) -> None:
    arguments = ("--input", corpus, "--tokenizer", tokenizer_path(), "--output", tmp_path / output)
    code, _, err = megazh("index", "build", *arguments)
    assert code in (2, 5), err
    assert is_one_line_error(err), err


def test_output_among_the_inputs_does_not_become_an_input(corpus: Path, tmp_path: Path) -> None:
    try:
        interrupted(corpus.parent, corpus.parent / "x", 2)
    except UsageError:
        return
    assert build(corpus.parent, corpus.parent / "x").pieces_kept == 2
    assert build(corpus.parent, corpus.parent / "x").already_complete
    assert len(IndexedDataset(corpus.parent / "x")) == 200


def test_new_folders_are_made_for_the_output(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "new" / "er" / "x.v1")
    assert len(IndexedDataset(tmp_path / "new" / "er" / "x.v1")) == 200


def change_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[Sequence[str], np.ndarray], np.ndarray]) -> None:
    right = FastokensEncoder.encode_batch

    def encode_batch(self: FastokensEncoder, batch: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = right(self, batch)
        return change(batch, ids.copy()), offsets

    monkeypatch.setattr(FastokensEncoder, "encode_batch", encode_batch)


def wrong_where_marked(batch: Sequence[str], ids: np.ndarray) -> np.ndarray:
    if any("MARK" in text for text in batch):
        ids[ids > 10] -= 1
    return ids


def fail_where_marked(batch: Sequence[str], ids: np.ndarray) -> np.ndarray:
    if any("MARK" in text for text in batch):
        raise RuntimeError("panicked at src/lib.rs")
    return ids


def above_where_marked(batch: Sequence[str], ids: np.ndarray) -> np.ndarray:
    if any("MARK" in text for text in batch):
        ids[-1] = 70_000
    return ids


@pytest.mark.parametrize("change", [wrong_where_marked, fail_where_marked, above_where_marked])
def test_fast_encoder_that_fails_midway_gives_way_to_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Sequence[str], np.ndarray], np.ndarray]
) -> None:
    documents = texts(120)
    documents[60] = "MARK " + "x" * PIECE  # fills a piece, and is the first document of the next one's neighbour
    documents[61] = "MARK and text"
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(documents))
    change_encoder(monkeypatch, change)
    said: list[str] = []
    summary = build(path, tmp_path / "x", said=said)
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert "tokenizers" in said[0]
    assert "\n" not in said[0]
    assert summary.encoder == "tokenizers"
    assert documents_of(tmp_path / "x") == expected_documents(documents)


@pytest.mark.parametrize("how", ["missing", "wrong from the start"])
def test_fast_encoder_that_is_no_use_is_replaced_with_a_warning(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    build(corpus, tmp_path / "right")
    if how == "missing":
        monkeypatch.setitem(__import__("sys").modules, "fastokens", None)
    else:
        change_encoder(monkeypatch, lambda _, ids: ids + np.uint32(1))
    said: list[str] = []
    summary = build(corpus, tmp_path / "x", said=said)
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert summary.encoder == "tokenizers"
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "right")


def test_pieces_of_a_wrong_encoder_are_not_kept(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed build does not reuse pieces of an encoder that was found wrong."""
    build(corpus, tmp_path / "right")
    with monkeypatch.context() as patch:
        change_encoder(patch, lambda _, ids: ids)
        interrupted(corpus, tmp_path / "x", 4)
    change_encoder(monkeypatch, lambda _, ids: ids + np.uint32(1))
    assert build(corpus, tmp_path / "x").pieces_kept == 0
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "right")


def test_documents_are_checked_against_the_reference(corpus: Path, tmp_path: Path) -> None:
    summary = build(corpus, tmp_path / "x")
    assert summary.encoder == "fastokens"
    assert summary.samples_checked >= summary.pieces / 8


def test_an_encoder_found_wrong_is_not_used_when_the_build_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(corpus, tmp_path / "right")
    with monkeypatch.context() as patch:
        change_encoder(patch, lambda _, ids: ids + np.uint32(1))
        interrupted(corpus, tmp_path / "x", 4)
    summary = build(corpus, tmp_path / "x")
    assert (summary.encoder, summary.pieces_kept) == ("tokenizers", 4)
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "right")


def test_log_tells_how_it_was_built(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    log = (tmp_path / "x.log").read_text(encoding="utf-8")
    assert "built with 1 workers and fastokens" in log
    assert f"{corpus.stat().st_size} bytes of input" in log


def test_damaged_source_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts(500), 50)
    data = bytearray(path.read_bytes())
    data[2000:2600] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: truncated or damaged"):
        build(path, tmp_path / "x")
    assert not (tmp_path / "x.idx").exists()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with one file of each kind that is cut as a stream, and some that are left out."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    parts = [texts(60, seed) for seed in range(6)]
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress(json_lines(parts[0])))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(json_lines(parts[1])))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in parts[2]], indent=1), encoding="utf-8")
    with open(folder / "d.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(parts[3])])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.tsv.gz").write_bytes(gzip.compress(b"text\nplain words\nand more\n"))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (folder / "README.md").write_text("about", encoding="utf-8")
    for number in range(3):
        (folder / f"{number}.pdf").write_bytes(b"%PDF-1.7")
    return folder


def test_streams_of_every_kind_give_one_result_also_after_an_interruption(mixed: Path, tmp_path: Path) -> None:
    whole = build(mixed, tmp_path / "x")
    assert whole.metadata.documents == 242
    assert whole.metadata.rejected.total == 0
    assert whole.pieces > 8
    interrupted(mixed, tmp_path / "y", 5)
    resumed = CountingPool()
    assert build(mixed, tmp_path / "y", resumed).pieces_kept == 5
    assert resumed.encoded == whole.pieces - 5
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "y")


def test_what_is_left_out_is_told_and_logged(mixed: Path, tmp_path: Path) -> None:
    said: list[str] = []
    build(mixed, tmp_path / "x", said=said)
    left_out = "left out: 3 *.pdf, README.md (to read them: save .pdf as .txt)"
    assert said[0] == left_out
    assert left_out in (tmp_path / "x.log").read_text(encoding="utf-8")


def test_another_encoding_is_another_plan(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["今天天气不错"] * 3).decode().encode("gbk"))
    with pytest.raises(DataError, match=r"a\.jsonl: looks like GB18030, not UTF-8; give --encoding gb18030"):
        build(path, tmp_path / "x")
    data = build(path, tmp_path / "x", read=ReadOptions(encoding="gb18030")).metadata
    assert (data.documents, data.options.encoding) == (3, "gb18030")
    path.write_bytes(json_lines(["plain"]))
    build(path, tmp_path / "y")
    with pytest.raises(UsageError, match="another option: encoding was None, is 'gb18030'"):
        build(path, tmp_path / "y", read=ReadOptions(encoding="gb18030"))


def test_index_from_before_encodings_is_still_known(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "x")
    description = json.loads((tmp_path / "x.json").read_bytes())
    del description["options"]["encoding"]
    (tmp_path / "x.json").write_text(json.dumps(description), encoding="utf-8")
    assert build(corpus, tmp_path / "x").already_complete


def test_request_is_what_identity_is_made_of() -> None:
    """A new field of Request that changes the bytes must be part of the plan, so that a resumed build is refused."""
    known = {"inputs", "output", "tokenizer", "eod", "front_tokens", "format", "read", "max_bad", "restart", "listing"}
    known |= {"max_lost", "ranks"}  # a refusal only; part of the tokenizer's kind
    known |= {"part"}  # which of the sources, that are in the plan, and part of the prefix
    assert {field.name for field in dataclasses.fields(Request)} == known
