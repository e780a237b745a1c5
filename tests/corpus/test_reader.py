"""Single records: documents, empty documents, and each reason to reject a line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from textdata import gz, json_lines, read_files, texts, write_arrow, write_parquet, zst

from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.pieces import cut, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.records import Reason
from megazh.corpus.sources import find_sources
from megazh.errors import DataError, MegazhError, UsageError

SIZE = 1 << 20
BLANK_LINES = ReadOptions(text_documents=TextDocuments.BLANK_LINES)


def json_line(tmp_path: Path, raw: bytes, options: ReadOptions | None = None) -> tuple[list[str], list[str], int]:
    """(texts, reasons, number of empty documents) that one line between two good ones gives."""
    path = tmp_path / "a.jsonl"
    key = (options or ReadOptions()).text_key.split(".")
    good = b'{"%s": "good"}' % key[0].encode() if len(key) == 1 else b'{"a": {"b": "good"}}'
    path.write_bytes(good + b"\n" + raw + b"\n" + good + b"\n")
    found = read_files([path], options or ReadOptions(), SIZE)
    assert (found.texts[0], found.texts[-1]) == ("good", "good")
    assert [entry[:2] for entry in found.rejected] in ([], [("a.jsonl", 2)])
    return found.texts[1:-1], [entry[2] for entry in found.rejected], found.empty


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "x"', Reason.BROKEN_JSON),
        (b'{"text": "x"} {"text": "y"}', Reason.BROKEN_JSON),
        (b"{'text': 'x'}", Reason.BROKEN_JSON),
        (b"<html>", Reason.BROKEN_JSON),
        (b"\x00\x00", Reason.BROKEN_JSON),
        (b'\xef\xbb\xbf{"text": "BOM inside the file"}', Reason.BROKEN_JSON),
        (b"[" * 200_000, Reason.BROKEN_JSON),
        (b'{"other": "x"}', Reason.MISSING_KEY),
        (b'{"Text": "x"}', Reason.MISSING_KEY),
        (b"{}", Reason.MISSING_KEY),
        (b"[]", Reason.MISSING_KEY),
        (b'["text"]', Reason.MISSING_KEY),
        (b'"text"', Reason.MISSING_KEY),
        (b"1.5", Reason.MISSING_KEY),
        (b"null", Reason.MISSING_KEY),
        (b"true", Reason.MISSING_KEY),
        (b'{"text": null}', Reason.NOT_TEXT),
        (b'{"text": 12}', Reason.NOT_TEXT),
        (b'{"text": false}', Reason.NOT_TEXT),
        (b'{"text": ["x"]}', Reason.NOT_TEXT),
        (b'{"text": {"text": "x"}}', Reason.NOT_TEXT),
        (b'{"text": "\xff"}', Reason.INVALID_UTF8),
        ('{"text": "今天"}'.encode("gbk"), Reason.INVALID_UTF8),
        (b'{"other": "\xc3", "text": "x"}', Reason.INVALID_UTF8),
        (b'{"text": "\xc0\xaf"}', Reason.INVALID_UTF8),
        (b'{"text": "\\ud800"}', Reason.LONE_SURROGATE),
        (b'{"text": "a\\udc00\\ud800b"}', Reason.LONE_SURROGATE),
        (b'{"text": "\xed\xa0\x80"}', Reason.LONE_SURROGATE),
        (b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', Reason.LONE_SURROGATE),
        (b'{"text": "' + b"x" * 101 + b'"}', Reason.TOO_LONG),
        ('{"text": "' + "今" * 34 + '"}', Reason.TOO_LONG),
    ],
)
def test_bad_line_is_rejected_with_its_reason(tmp_path: Path, raw: bytes | str, reason: Reason) -> None:
    raw = raw.encode() if isinstance(raw, str) else raw
    assert json_line(tmp_path, raw, ReadOptions(max_document_bytes=100)) == ([], [reason.value], 0)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"text": "  not trimmed \\n\\n"}', "  not trimmed \n\n"),
        (b'{"text": "a\\r\\nb"}\r', "a\r\nb"),
        (b'  {"text": "x"}  ', "x"),
        (b'{"text": "\xef\xbb\xbfx"}', "x"),
        (b'{"text": "\\ufeffx"}', "x"),
        (b'{"text": "x\xef\xbb\xbf"}', "x\ufeff"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'{"text": "\\u0000"}', "\x00"),
        (b'{"score": NaN, "text": "x"}', "x"),
        (b'{"score": -Infinity, "text": "x"}', "x"),
        (b'{"other": "\\ud800", "text": "x"}', "x"),
        (b'{"id": 123456789012345678901234567890, "text": "x"}', "x"),
        (b'{"text": "first", "text": "x"}', "x"),
        (b'{"text": "' + b"x" * 100 + b'"}', "x" * 100),
        (b'{"text": "\xef\xbb\xbf' + b"x" * 100 + b'"}', "x" * 100),
    ],
)
def test_good_line_gives_its_text_untouched(tmp_path: Path, raw: bytes, text: str) -> None:
    assert json_line(tmp_path, raw, ReadOptions(max_document_bytes=100)) == ([text], [], 0)


@pytest.mark.parametrize("raw", [b"", b"   ", b"\t\r"])
def test_blank_lines_are_nothing(tmp_path: Path, raw: bytes) -> None:
    assert json_line(tmp_path, raw) == ([], [], 0)


@pytest.mark.parametrize("raw", [b'{"text": ""}', b'{"text": "\xef\xbb\xbf"}'])
def test_empty_text_is_counted(tmp_path: Path, raw: bytes) -> None:
    assert json_line(tmp_path, raw) == ([], [], 1)


def test_white_space_is_text(tmp_path: Path) -> None:
    assert json_line(tmp_path, b'{"text": " "}') == ([" "], [], 0)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"a": {"b": "x"}}', (["x"], [])),
        (b'{"a": {"b": "x"}, "a.b": "y"}', (["y"], [])),
        (b'{"a": {}}', ([], ["missing key"])),
        (b'{"a": "x"}', ([], ["missing key"])),
        (b'{"a": null}', ([], ["missing key"])),
        (b'{"b": "x"}', ([], ["missing key"])),
        (b'{"a": {"b": null}}', ([], ["not text"])),
        (b'{"a": {"b": "\\ud800"}}', ([], ["lone surrogate"])),
        (b'{"a": [{"b": "x"}]}', ([], ["missing key"])),
    ],
)
def test_nested_key(tmp_path: Path, raw: bytes, expected: tuple[list[str], list[str]]) -> None:
    assert json_line(tmp_path, raw, ReadOptions(text_key="a.b"))[:2] == expected


def test_detail_tells_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"title": 1, "body": 2}\n{"text": [1]}\n{"text": "ab\xff"}\n')
    sources = find_sources([str(path)])
    options = ReadOptions()
    (piece,) = cut(sources, options, SIZE)
    (batch,) = read_piece(piece_sources(sources, piece, options), piece, options)
    details = [bad.detail for bad in batch.rejected]
    assert "title, body" in details[0]
    assert "a list" in details[1]
    assert "ff" in details[2]


def test_detail_can_be_written_whatever_the_line_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud800": 1}\n' + b'{"' + b"k" * 100_000 + b'": 1}\n{"text": "x"}\n')
    sources = find_sources([str(path)])
    options = ReadOptions()
    (piece,) = cut(sources, options, SIZE)
    (batch,) = read_piece(piece_sources(sources, piece, options), piece, options)
    for bad in batch.rejected:
        bad.detail.encode()
        assert len(bad.detail) < 1000


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_json_lines_in_every_wrapping(tmp_path: Path, suffix: str, bom: bytes, last: bytes) -> None:
    data = bom + json_lines(texts(50)).removesuffix(b"\n") + last
    stored = gz(data, 4) if suffix.endswith("gz") else zst(data, 4) if suffix.endswith("zst") else data
    (tmp_path / f"a{suffix}").write_bytes(stored)
    assert read_files([tmp_path / f"a{suffix}"], ReadOptions(), 700).texts == texts(50)


def test_members_may_end_within_a_line_and_may_be_empty(tmp_path: Path) -> None:
    data = json_lines(texts(20))
    (tmp_path / "a.jsonl.gz").write_bytes(gz(data[:101]) + gz(b"") + gz(data[101:102]) + gz(data[102:]))
    (tmp_path / "b.jsonl.zst").write_bytes(zst(data[:101]) + zst(b"") + zst(data[101:102]) + zst(data[102:]))
    assert read_files([tmp_path], ReadOptions(), 700).texts == texts(20) * 2


DOCUMENTS = ["第一", "", "second\r\n line ", "\ufeffthird", "𠮷" * 30]
EXPECTED = ["第一", "second\r\n line ", "third", "𠮷" * 30]


@pytest.mark.parametrize(
    "column_type",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
@pytest.mark.parametrize("nested", [False, True])
def test_columns_of_every_text_type(tmp_path: Path, column_type: pa.DataType, form: str, nested: bool) -> None:
    value = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    plain: list[str | bytes | None] = [None, *DOCUMENTS]
    if pa.types.is_binary(value) or pa.types.is_large_binary(value):
        plain = [text.encode() if isinstance(text, str) else text for text in plain]
    column = pa.array(plain, value)
    column = column.dictionary_encode().cast(column_type) if pa.types.is_dictionary(column_type) else column
    if nested:
        column = pa.StructArray.from_arrays([column, pa.array(range(6))], ["b", "n"])
    if form == "parquet" and nested and column_type == pa.string_view():
        pytest.skip("pyarrow cannot write this")
    table = pa.table({"id": pa.array(range(6)), "a": column})
    path = tmp_path / f"a.{'parquet' if form == 'parquet' else 'arrow'}"
    if form == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    found = read_files([path], ReadOptions(text_key="a.b" if nested else "a"), 1)
    assert found.texts == EXPECTED
    assert found.empty == 1
    assert found.rejected == [(path.name, 1, "not text")]
    assert found.pieces == 3 if form != "stream" or not pa.types.is_dictionary(column_type) else found.pieces >= 1


def test_rows_of_null_structs_and_null_columns_are_rejected(tmp_path: Path) -> None:
    structs = pa.array([{"b": "x"}, None, {"b": None}], pa.struct([("b", pa.string())]))
    pq.write_table(pa.table({"a": structs}), tmp_path / "a.parquet")
    found = read_files([tmp_path / "a.parquet"], ReadOptions(text_key="a.b"), SIZE)
    assert (found.texts, [entry[1] for entry in found.rejected]) == (["x"], [2, 3])
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "b.parquet")
    assert len(read_files([tmp_path / "b.parquet"], ReadOptions(), SIZE).rejected) == 3


def test_column_whose_name_has_a_dot(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a.b": ["x", "y"]}), tmp_path / "a.parquet")
    assert read_files([tmp_path / "a.parquet"], ReadOptions(text_key="a.b"), SIZE).texts == ["x", "y"]


def test_rows_are_numbered_across_row_groups_and_batches(tmp_path: Path) -> None:
    documents: list[str | None] = list(texts(2000, most=5))
    for number in (0, 255, 256, 700, 1999):
        documents[number] = None
    write_parquet(tmp_path / "a.parquet", documents, rows=300)
    write_arrow(tmp_path / "b.arrow", documents, rows=600)
    found = read_files([tmp_path], ReadOptions(), 10_000)
    expected = [1, 256, 257, 701, 2000]
    assert [entry[:2] for entry in found.rejected] == [
        (name, number) for name in ("a.parquet", "b.arrow") for number in expected
    ]


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_two_columns_of_one_name_are_refused_in_one_line(tmp_path: Path, form: str) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["x", "x", "text"])
    path = tmp_path / f"a.{'parquet' if form == 'parquet' else 'arrow'}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    assert read_files([path], ReadOptions(), SIZE).texts == ["c"]
    with pytest.raises(UsageError, match=rf"{path.name}: has 2 columns 'x'; rename all but one"):
        read_files([path], ReadOptions(text_key="x"), SIZE)


def test_bytes_that_are_no_text_in_a_binary_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff", b"\xed\xa0\x80"])}), tmp_path / "a.parquet")
    found = read_files([tmp_path / "a.parquet"], ReadOptions(), SIZE)
    assert found.texts == ["ok"]
    assert [entry[1:] for entry in found.rejected] == [(2, "invalid UTF-8"), (3, "lone surrogate")]
    assert read_files([tmp_path / "a.parquet"], ReadOptions(encoding="gb18030"), SIZE) == found, "tables hold UTF-8"


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("key", "parts"),
    [("body", ["no column 'body'", "id, text, a"]), ("id", ["int64"]), ("a.z", ["no column"]), ("a", ["struct"])],
)
def test_missing_or_other_column_is_refused_by_name(tmp_path: Path, form: str, key: str, parts: Sequence[str]) -> None:
    table = pa.table({"id": [1], "text": ["x"], "a": [{"b": "x"}]})
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UsageError) as caught:
        read_files([path], ReadOptions(text_key=key), SIZE)
    assert all(part in str(caught.value) for part in [path.name, *parts]), str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_columnar_file_cut_off_anywhere_is_one_line(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("a.parquet" if form == "parquet" else "a.arrow")
    if form == "parquet":
        write_parquet(path, texts(300), rows=50)
    else:
        write_arrow(path, texts(300), form == "stream", rows=50)
    whole = path.read_bytes()
    for length in [0, 1, 7, 100, *range(200, len(whole) - 9, len(whole) // 40), len(whole) - 9]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{path.name}: ") as caught:
            read_files([path], ReadOptions(), 5000)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_columnar_file_with_other_bytes_inside_never_ends_in_a_traceback(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("a.parquet" if form == "parquet" else "a.arrow")
    if form == "parquet":
        write_parquet(path, texts(100), rows=50)
    else:
        write_arrow(path, texts(100), form == "stream", rows=50)
    whole = path.read_bytes()
    messages: list[str] = []
    for at in range(0, len(whole) - 60, len(whole) // 60):
        path.write_bytes(whole[:at] + bytes(byte ^ 0xA5 for byte in whole[at : at + 60]) + whole[at + 60 :])
        try:
            read_files([path], ReadOptions(), 5000)
        except MegazhError as error:
            messages.append(str(error))
    assert all(path.name in message and "\n" not in message for message in messages)


TEXT_CASES = [
    (b"one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
    (b"one\r\ntwo\r\n\r\nthree\r\n", ["one\r\ntwo", "three"]),
    (b"\xef\xbb\xbfone\n\ntwo", ["one", "two"]),
    (b"\n\n\none\n\n\n\ntwo\n\n\n", ["one", "two"]),
    (b"one\n \t \ntwo\n\f\n", ["one", "two"]),
    (b"  one  \n\n\ttwo\t", ["  one  ", "\ttwo\t"]),
    ("one\n\u3000\ntwo".encode(), ["one", "two"]),
    ("one\n\u00a0\u3000 \ntwo\n\u200b\nthree".encode(), ["one", "two", "three"]),
    ("one\n\u2028\ntwo\u2028\u2028three".encode(), ["one", "two\u2028\u2028three"]),
    ("one\n\ufeff\ntwo\n\u2003\u205f\u1680\u0085\n\u3000three".encode(), ["one", "two", "\u3000three"]),
    (b"one\r\rtwo", ["one\r\rtwo"]),
    (b"", []),
    (b"\n \n", []),
    (b"\xef\xbb\xbf", []),
]


@pytest.mark.parametrize(("data", "documents"), TEXT_CASES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 5, SIZE])
def test_text_split_at_blank_lines(tmp_path: Path, data: bytes, documents: list[str], suffix: str, size: int) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gz(data, 2) if suffix == ".gz" else zst(data, 2) if suffix == ".zst" else data)
    found = read_files([path], BLANK_LINES, size)
    assert (found.texts, found.rejected, found.empty) == (documents, [], 0)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    def put(name: str, data: bytes) -> None:
        stored = gz(data, 2) if suffix == ".gz" else zst(data, 2) if suffix == ".zst" else data
        (tmp_path / f"{name}.txt{suffix}").write_bytes(stored)

    put("a", b"\n one\r\n\r\ntwo \n")
    put("b", b"\xef\xbb\xbfwith BOM")
    put("c", b"")
    put("d", b"\xff")
    put("e", b"x" * 100)
    put("f", b"x" * 101)
    put("g", b"\xef\xbb\xbf" + b"x" * 100)
    put("h", b"x" * 5000)
    found = read_files([tmp_path], ReadOptions(max_document_bytes=100), SIZE)
    assert found.texts == ["\n one\r\n\r\ntwo \n", "with BOM", "x" * 100, "x" * 100]
    assert found.empty == 1
    assert found.rejected == [
        (f"d.txt{suffix}", 1, "invalid UTF-8"),
        (f"f.txt{suffix}", 1, "too long"),
        (f"h.txt{suffix}", 1, "too long"),
    ]


def test_files_whose_names_are_not_utf8(tmp_path: Path) -> None:
    """As an archive from an old Chinese system leaves them."""
    name = os.fsdecode("语料".encode("gbk"))
    write_parquet(tmp_path / "made", ["1"]).rename(tmp_path / f"{name}.1.parquet")
    for number, stream in ((2, False), (3, True)):
        write_arrow(tmp_path / "made", [str(number)], stream)
        (tmp_path / "made").rename(tmp_path / f"{name}.{number}.arrow")
    for suffix, pack in ((".gz", gz), (".zst", zst), ("", bytes)):
        (tmp_path / f"{name}.4.jsonl{suffix}").write_bytes(pack(json_lines(["4"])))
    (tmp_path / f"{name}.pdf").write_bytes(b"x")
    assert read_files([tmp_path], ReadOptions(), SIZE).texts == ["1", "2", "3", "4", "4", "4"]
    with pytest.raises(UsageError, match=r"pdf files are not read"):
        read_files([tmp_path / f"{name}.pdf"], ReadOptions(), SIZE)


def test_file_that_went_away_is_named_itself(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    sources = find_sources([str(tmp_path)])
    options = ReadOptions()
    (piece,) = cut(sources, options, SIZE)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt: cannot be read"):
        list(read_piece(piece_sources(sources, piece, options), piece, options))


def test_batches_stay_small_for_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["x" * 1000] * 8000))
    sources = find_sources([str(path)])
    options = ReadOptions()
    (piece,) = cut(sources, options, 1 << 24)
    sizes = [sum(map(len, batch.texts)) for batch in read_piece(sources, piece, options)]
    assert len(sizes) > 4
    assert max(sizes) < 2 << 20


def test_format_option_reads_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text(json.dumps({"text": "x"}), encoding="utf-8")
    assert read_files([tmp_path / "a.data"], ReadOptions(), SIZE, Format.JSONL).texts == ["x"]
    assert read_files([tmp_path / "a.data"], ReadOptions(), SIZE, Format.TEXT).texts == ['{"text": "x"}']
