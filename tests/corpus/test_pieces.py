"""Cutting into pieces: however a corpus is cut, its documents and rejected lines are the same."""

import bz2
import io
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from textdata import Read, gz, json_lines, read_files, texts, use_small_blocks, write_arrow, write_parquet, zst

from megazh.corpus.encodings import recognise
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import cut, piece_size
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Source, find_sources
from megazh.errors import DataError

BOM = b"\xef\xbb\xbf"
WHITE_SPACE = "".join(filter(str.isspace, map(chr, range(0x110000)))) + "\u200b\ufeff"
STORED = {"plain": lambda data: data, "gz": lambda data: gz(data, 3), "zst": lambda data: zst(data, 3)}
SUFFIX = {"plain": "", "gz": ".gz", "zst": ".zst"}
BLANK_LINES = ReadOptions(text_documents=TextDocuments.BLANK_LINES)

character = st.characters(exclude_categories=["Cs"])
document = st.text(character, max_size=60)
good_line = document.map(lambda text: json.dumps({"id": 1, "text": text}, ensure_ascii=len(text) % 2 == 0).encode())
odd_line = st.sampled_from(
    [
        b"",
        b"  \t ",
        b"\r",
        b'{"text": "cut',
        b'{"other": "x"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ["x"]}',
        b'{"text": {"x": "y"}}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xed\xa0\x80"}',
        b'["text"]',
        b'"text"',
        b"17",
        b"null",
        b'{"text": ""}',
        b'{"text": "\xef\xbb\xbf"}',
        b'{"text": "\xef\xbb\xbfa"}',
        b'{"n": NaN, "text": "let through"}',
    ]
)
line = st.tuples(st.one_of(good_line, odd_line), st.sampled_from([b"\n", b"\n", b"\r\n"])).map(b"".join)
json_file = st.builds(
    lambda bom, lines, last: (BOM if bom else b"") + b"".join(lines) + last,
    st.booleans(),
    st.lists(line, max_size=25),
    st.one_of(st.just(b""), good_line),
)
paragraph_file = st.builds(
    lambda bom, parts: (BOM if bom else b"") + b"".join(parts),
    st.booleans(),
    st.lists(
        st.one_of(
            document.map(str.encode),
            st.sampled_from(
                [
                    b"\n",
                    b"\n\n",
                    b"\r\n",
                    b"\r\n\r\n",
                    b"\n \t\n",
                    b"\n\f\v\n",
                    b" ",
                    b"\xff",
                    b"a",
                    b"\r",
                    b"\n\xe3\x80\x80\n",
                ]
            ),
        ),
        max_size=40,
    ),
)


def parse_json_lines(data: bytes, limit: int) -> Read:
    """Read a whole JSON Lines file in a simple, slow way that follows the definition."""
    found = Read()
    for number, raw in enumerate(data.removeprefix(BOM).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            is_surrogate = b"\xed\xa0\x80" in raw
            found.rejected.append(("", number, "lone surrogate" if is_surrogate else "invalid UTF-8"))
            continue
        try:
            value = json.loads(text)
        except ValueError:
            found.rejected.append(("", number, "broken JSON"))
            continue
        if not isinstance(value, dict) or "text" not in value:
            found.rejected.append(("", number, "missing key"))
        elif not isinstance(value["text"], str):
            found.rejected.append(("", number, "not text"))
        elif any("\ud800" <= each <= "\udfff" for each in value["text"]):
            found.rejected.append(("", number, "lone surrogate"))
        else:
            add(found, value["text"], number, limit)
    return found


def parse_paragraphs(data: bytes, limit: int) -> Read:
    """Read a whole text file of documents separated by blank lines, in a simple, slow way."""
    found = Read()
    block: list[bytes] = []
    begin = 0
    for number, raw in enumerate([*io.BytesIO(data.removeprefix(BOM)), b"\n"], start=1):
        if raw.decode("utf-8", "replace").strip(WHITE_SPACE):
            begin = begin if block else number
            block.append(raw)
        elif block:
            whole = b"".join(block)
            block = []
            if whole.endswith(b"\n"):
                whole = whole[:-2] if whole.endswith(b"\r\n") else whole[:-1]
            try:
                add(found, whole.decode(), begin, limit)
            except UnicodeDecodeError:
                found.rejected.append(("", begin, "invalid UTF-8"))
    return found


def add(found: Read, text: str, number: int, limit: int) -> None:
    text = text[1:] if text.startswith("\ufeff") else text
    if not text:
        found.empty += 1
    elif len(text.encode()) > limit:
        found.rejected.append(("", number, "too long"))
    else:
        found.texts.append(text)


def assert_same(found: Read, expected: Read) -> None:
    assert found.texts == expected.texts
    assert [entry[1:] for entry in found.rejected] == [entry[1:] for entry in expected.rejected]
    assert found.empty == expected.empty


def check(folder: Path, name: str, data: bytes, options: ReadOptions, size: int, stored: str, expected: Read) -> None:
    path = folder / f"{name}{SUFFIX[stored]}"
    path.write_bytes(STORED[stored](data))
    found = read_files([path], options, size)
    assert_same(found, expected)
    assert {entry[0] for entry in found.rejected} <= {path.name}


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=json_file, size=st.integers(1, 200), block=st.integers(20, 90))
def test_json_lines_are_the_same_however_cut(tmp_path: Path, stored: str, data: bytes, size: int, block: int) -> None:
    assume(not data.removeprefix(BOM).lstrip().startswith(b"["))  # read as one JSON array
    assume(recognise(data) in (None, "utf-8"))  # zero bytes between letters are taken for UTF-16
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, size, block)
        check(tmp_path, "a.jsonl", data, ReadOptions(), size, stored, parse_json_lines(data, 10**9))


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=paragraph_file, size=st.integers(1, 200), block=st.integers(20, 90))
def test_paragraphs_are_the_same_however_cut(tmp_path: Path, stored: str, data: bytes, size: int, block: int) -> None:
    assume(recognise(data) in (None, "utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, size, block)
        check(tmp_path, "a.txt", data, BLANK_LINES, size, stored, parse_paragraphs(data, 10**9))


sized_text = st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(150, 1500)).map(
    lambda length: "abcde" * length
)


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents=st.lists(sized_text, max_size=12),
    last_newline=st.booleans(),
    size=st.integers(1, 300),
    limit=st.integers(30, 200),
)
def test_lines_too_long_for_memory_cost_nothing_but_themselves(
    tmp_path: Path, stored: str, documents: list[str], last_newline: bool, size: int, limit: int
) -> None:
    data = json_lines(documents)
    data = data if last_newline else data[:-1]
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, size)
        options = ReadOptions(max_document_bytes=limit)
        check(tmp_path, "a.jsonl", data, options, size, stored, parse_json_lines(data, limit))


wide_paragraph = st.one_of(
    st.integers(1, 30).map(lambda length: "x" * length),
    st.integers(20, 150).map(lambda lines: "line of text\n" * lines + "end"),
)


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents=st.lists(wide_paragraph, max_size=12),
    gap=st.sampled_from(["\n\n", "\n\n\n", "\r\n\r\n"]),
    size=st.integers(1, 300),
    limit=st.integers(30, 200),
)
@example(documents=["line of text\n" * 26 + "end", "x"], gap="\r\n\r\n", size=80, limit=200)
@example(documents=["line of text\n" * k + "end" for k in (32, 31)] + ["x"], gap="\r\n\r\n", size=81, limit=200)
def test_paragraphs_too_long_for_memory_cost_nothing_but_themselves(
    tmp_path: Path, stored: str, documents: list[str], gap: str, size: int, limit: int
) -> None:
    data = gap.join(documents).encode()
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, size)
        options = ReadOptions(text_documents=TextDocuments.BLANK_LINES, max_document_bytes=limit)
        check(tmp_path, "a.txt", data, options, size, stored, parse_paragraphs(data, limit))


@pytest.mark.parametrize("stored", STORED)
def test_line_numbers_after_an_overlong_paragraph_of_many_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    size = 100
    use_small_blocks(monkeypatch, size)
    data = b"first\n\n" + b"many words in a line\n" * 100 + b"\nbad \xff\n\nlast\n"
    options = ReadOptions(text_documents=TextDocuments.BLANK_LINES, max_document_bytes=200)
    path = tmp_path / f"a.txt{SUFFIX[stored]}"
    path.write_bytes(STORED[stored](data))
    found = read_files([path], options, size)
    assert found.texts == ["first", "last"]
    assert [entry[1:] for entry in found.rejected] == [(3, "too long"), (104, "invalid UTF-8")]


@pytest.mark.parametrize("stored", STORED)
def test_paragraph_of_exactly_the_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str) -> None:
    """For documents of many lengths before it, so that the cut falls at many places."""
    options = ReadOptions(text_documents=TextDocuments.BLANK_LINES, max_document_bytes=300)
    for before in range(90, 110):
        size = 100
        use_small_blocks(monkeypatch, size)
        path = tmp_path / f"a.txt{SUFFIX[stored]}"
        path.write_bytes(STORED[stored](b"x" * before + b"\n\n" + b"y" * 300 + b"\n\nz\n"))
        found = read_files([path], options, size)
        assert [len(text) for text in found.texts] == [before, 300, 1], before


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("limit", [1_000, 100_000, 1_000_000])
def test_small_limit_with_real_block_sizes_loses_no_paragraph(tmp_path: Path, stored: str, limit: int) -> None:
    documents = [f"{number}: " + "text " * 150 for number in range(6000)]
    path = tmp_path / f"a.txt{SUFFIX[stored]}"
    path.write_bytes(STORED[stored]("\n\n".join(documents).encode()))
    options = ReadOptions(text_documents=TextDocuments.BLANK_LINES, max_document_bytes=limit)
    found = read_files([path], options, 1 << 20)
    assert found.pieces > 1
    assert (len(found.texts), found.rejected) == (6000, [])
    assert found.texts == documents


@pytest.mark.parametrize("stored", STORED)
def test_overlong_line_in_the_middle_with_real_block_sizes(tmp_path: Path, stored: str) -> None:
    documents = [f"{number}: " + "text " * 150 for number in range(5000)]
    lines = json_lines(documents).splitlines(keepends=True)
    lines.insert(2000, b'{"text": "' + b"y" * 5_000_000 + b'"}\n')
    path = tmp_path / f"a.jsonl{SUFFIX[stored]}"
    path.write_bytes(STORED[stored](b"".join(lines) + b'{"text": "' + b"z" * 5_000_000))
    found = read_files([path], ReadOptions(max_document_bytes=1000), 1 << 20)
    assert found.texts == documents
    assert [number for _, number, _ in found.rejected] == [2001, 5002]
    assert found.rejected[0][2] == "too long"


def test_pieces_of_a_plain_file_join_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts(500)))
    pieces = list(cut(find_sources([str(path)]), ReadOptions(), 1000))
    assert len(pieces) > 10
    assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].end) == (0, path.stat().st_size)
    assert sum(piece.weight for piece in pieces) == path.stat().st_size
    keys = [piece.key for piece in pieces]
    assert keys == sorted(set(keys))


def test_row_groups_are_run_together_but_never_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts(1000), rows=50)
    options = ReadOptions()
    pieces = list(cut(find_sources([str(path)]), options, 30_000))
    assert 1 < len(pieces) < 20
    assert [number for piece in pieces for number in range(piece.start, piece.end)] == list(range(20))
    assert read_files([path], options, 30_000).texts == texts(1000)


@pytest.mark.parametrize("stream", [False, True])
def test_record_batches_are_cut(tmp_path: Path, stream: bool) -> None:
    path = write_arrow(tmp_path / "a.arrow", texts(1000), stream, rows=50)
    found = read_files([path], ReadOptions(), 20_000)
    assert found.pieces > 3
    assert found.texts == texts(1000)


def test_small_text_files_share_a_piece_and_keep_their_order(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:03d}.txt").write_bytes(b"\xff" if number % 10 == 3 else f"file {number}".encode())
    found = read_files([tmp_path], ReadOptions(), 60)
    assert 3 < found.pieces < 50
    assert found.texts == [f"file {number}" for number in range(50) if number % 10 != 3]
    assert found.rejected == [(f"{number:03d}.txt", 1, "invalid UTF-8") for number in (3, 13, 23, 33, 43)]


def test_cutting_many_small_files_takes_time_in_proportion(tmp_path: Path) -> None:
    source = Source(tmp_path / "a.txt", "a.txt", Format.TEXT, None, 40)
    begin = time.perf_counter()
    assert len(list(cut([source] * 10_000, ReadOptions(), 1 << 20))) == 1
    assert time.perf_counter() - begin < 1


def test_empty_files_give_nothing(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(b"")
    write_parquet(tmp_path / "c.parquet", [])
    write_arrow(tmp_path / "d.arrow", [])
    write_arrow(tmp_path / "e.arrow", [], stream=True)
    (tmp_path / "f.jsonl.gz").write_bytes(gz(b""))
    (tmp_path / "g.jsonl.zst").write_bytes(zst(b""))
    assert read_files([tmp_path], BLANK_LINES, 1000).texts == []
    assert read_files([tmp_path], ReadOptions(), 1000).empty == 1


def test_piece_size_follows_the_corpus_within_bounds(tmp_path: Path) -> None:
    def size(total: int) -> int:
        return piece_size([Source(tmp_path, "", Format.JSONL, None, total)])

    assert (size(0), size(10**6), size(10**9), size(10**13)) == (1 << 20, 1 << 20, 10**9 // 256, 16 << 20)


def test_file_that_shrinks_after_it_was_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts(200)))
    sources = find_sources([str(path)])
    path.write_bytes(json_lines(texts(20)))
    with pytest.raises(DataError, match=r"a\.jsonl: shorter than the"):
        list(cut(sources, ReadOptions(), 1000))
    path.write_bytes(json_lines(texts(200)))
    (piece,) = cut(sources, ReadOptions(), 1 << 20)
    path.write_bytes(json_lines(texts(20)))
    with pytest.raises(DataError, match=r"a\.jsonl: shorter than the"):
        list(read_piece(sources, piece, ReadOptions()))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gz, "zst": zst, "bz2": bz2.compress, "xz": lzma.compress}
PROGRAMS = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "xz": "xz"}


@pytest.mark.parametrize("stored", PACKERS)
def test_compressed_file_cut_off_anywhere_is_noticed(tmp_path: Path, stored: str) -> None:
    whole = PACKERS[stored](json_lines(texts(30)))
    path = tmp_path / f"a.jsonl.{stored}"
    for length in [14, 15, 18, *range(20, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            DataError, match=rf"a\.jsonl\.{stored}: truncated or damaged \w+ file, near byte "
        ) as caught:
            read_files([path], ReadOptions(), 500)
        assert str(caught.value).endswith(f"keep what can be read: {PROGRAMS[stored]} -dc a.jsonl.{stored} > a.jsonl")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", PACKERS)
def test_compressed_file_with_other_bytes_inside_is_noticed(tmp_path: Path, stored: str) -> None:
    whole = bytearray(PACKERS[stored](json_lines(texts(300))))
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path = tmp_path / f"a.jsonl.{stored}"
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"a\.jsonl\.{stored}: truncated or damaged"):
        read_files([path], ReadOptions(), 500)


@pytest.mark.parametrize("stored", ["gz", "bz2", "xz"])
def test_members_and_zero_bytes_between_them(tmp_path: Path, stored: str) -> None:
    data, pack = json_lines(texts(20)), PACKERS[stored]
    path = tmp_path / f"a.jsonl.{stored}"
    path.write_bytes(pack(data[:101]) + pack(b"") + bytes(8) + pack(data[101:]) + bytes(512))
    for size in (1, 700, 1 << 20):
        assert read_files([path], ReadOptions(), size).texts == texts(20)
    path.write_bytes(pack(data) + b"not part of it")
    with pytest.raises(DataError, match="truncated or damaged"):
        read_files([path], ReadOptions(), 700)


def test_data_that_packs_a_thousandfold_is_unpacked_step_by_step(tmp_path: Path) -> None:
    line = json_lines(["今" * 20_000])
    for stored in ("gz", "bz2", "xz"):
        (tmp_path / f"a.jsonl.{stored}").write_bytes(PACKERS[stored](line * 20))
    found = read_files([tmp_path], ReadOptions(), 1 << 20)
    assert [len(text) for text in found.texts] == [20_000] * 60


def test_zstd_with_a_window_above_128_mib_is_named_with_the_remedy(tmp_path: Path) -> None:
    """The frame header asks for a window of 2 GiB, as `zstd --long=31` writes it."""
    path = tmp_path / "a.jsonl.zst"
    data = b"x" * 100
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data  # the last block, stored as it is
    path.write_bytes(bytes.fromhex("28b52ffd 00 a8") + block)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: .*window above 128 MiB .*zstd -dc --long=31 a\.jsonl\.zst \|"):
        find_sources([str(path)])
