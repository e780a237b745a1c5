"""Encodings other than UTF-8: recognised and named with the remedy, read with it, and never read wrongly."""

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from textdata import json_lines, read_files, use_small_blocks

from megazh.corpus.encodings import normal_encoding
from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.errors import DataError, UsageError

SIMPLE = ["今天天气不错，我们去公园散步。", "第二个文档，\n分成两行", "third"]
TRADITIONAL = ["國家圖書館藏書豐富，讀者眾多。", "學習語言需要時間，\n這是個簡單的道理", "third"]
BLANK_LINES = TextDocuments.BLANK_LINES


def csv_text(documents: Sequence[str]) -> str:
    sink = io.StringIO()
    csv.writer(sink).writerows([["id", "text"], *([number, text] for number, text in enumerate(documents))])
    return sink.getvalue()


STORED: dict[str, tuple[Callable[[Sequence[str], str], bytes], TextDocuments]] = {
    "a.txt": (lambda texts, encoding: "\n\n".join(texts).encode(encoding), BLANK_LINES),
    "a.jsonl": (lambda texts, encoding: json_lines(texts).decode().encode(encoding), BLANK_LINES),
    "a.json": (
        lambda texts, encoding: json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode(encoding),
        BLANK_LINES,
    ),
    "a.csv": (lambda texts, encoding: csv_text(texts).encode(encoding), BLANK_LINES),
    "a.jsonl.gz": (lambda texts, encoding: gzip.compress(json_lines(texts).decode().encode(encoding)), BLANK_LINES),
    "a.csv.xz": (lambda texts, encoding: lzma.compress(csv_text(texts).encode(encoding)), BLANK_LINES),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    ("encoding", "advised"),
    [
        ("gb18030", "gb18030"),
        ("gbk", "gb18030"),
        ("gb2312", "gb18030"),
        ("big5", "big5"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", "utf-32"),
        ("utf-32-be", "utf-32-be"),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_named_without_the_option_and_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str, advised: str, block: int
) -> None:
    documents = TRADITIONAL if encoding == "big5" else SIMPLE
    write, ends = STORED[name]
    (tmp_path / name).write_bytes(write(documents, encoding))
    with pytest.raises(DataError, match=rf"{name}: looks like .*, not UTF-8; give --encoding {advised},"):
        read_files([tmp_path / name], ReadOptions(text_documents=ends), 1 << 20)
    if block < 100:
        use_small_blocks(monkeypatch, 30, block)
    for given in (encoding, advised):
        options = ReadOptions(text_documents=ends, encoding=normal_encoding(given))
        found = read_files([tmp_path / name], options, 30)
        assert (found.texts, found.rejected) == (documents, [])


def test_whole_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(SIMPLE[0].encode("gbk"))
    (tmp_path / "b.txt").write_bytes(SIMPLE[1].encode("gbk") + b"\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes("今".encode("gbk") * 60)
    found = read_files([tmp_path], ReadOptions(encoding="gb18030", max_document_bytes=100), 1 << 20)
    assert (found.texts, found.empty) == ([SIMPLE[0]], 1)
    assert found.rejected == [("b.txt", 1, "invalid in its encoding"), ("d.txt", 1, "too long")]


@pytest.mark.parametrize(
    ("written", "given", "message"),
    [
        ("utf-8", "gb18030", "looks like UTF-8, not GB18030; leave --encoding out"),
        ("utf-8", "utf-16", "looks like UTF-8, not UTF-16; leave --encoding out"),
        ("utf-8", "latin-1", "looks like UTF-8, not ISO8859-1"),
        ("utf-8-sig", "big5", "looks like UTF-8, not BIG5"),
        ("gb18030", "big5", "looks like GB18030, not BIG5; give --encoding gb18030"),
        ("gb18030", "utf-16-le", "looks like GB18030, not UTF-16-LE"),
        ("gb18030", "latin-1", "looks like GB18030, not ISO8859-1"),
        ("utf-16", "gb18030", "looks like UTF-16, not GB18030; give --encoding utf-16"),
        ("utf-16-be", "utf-16", "has no byte order mark; give --encoding utf-16-be"),
        ("utf-16-le", "utf-16-be", "looks like UTF-16-LE, not UTF-16-BE"),
        ("utf-32", "utf-16", "looks like UTF-32, not UTF-16"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_wrong_encoding_is_a_line_and_no_mojibake(
    tmp_path: Path, name: str, written: str, given: str, message: str
) -> None:
    (tmp_path / name).write_bytes(STORED[name][0](SIMPLE, written))
    with pytest.raises(DataError, match=rf"{name}: {message}") as caught:
        read_files([tmp_path / name], ReadOptions(encoding=normal_encoding(given)), 1 << 20)
    assert "\n" not in str(caught.value)


def test_a_few_bad_bytes_cost_only_their_lines(tmp_path: Path) -> None:
    good = json_lines(SIMPLE * 20).decode()
    (tmp_path / "gbk.jsonl").write_bytes(good.encode("gbk") + b'{"text": "\xff\x80"}\n' + good.encode("gbk"))
    found = read_files([tmp_path / "gbk.jsonl"], ReadOptions(encoding="gb18030"), 500)
    assert found.texts == SIMPLE * 40
    assert found.rejected == [("gbk.jsonl", 61, "invalid in its encoding")]
    (tmp_path / "utf8.jsonl").write_bytes(good.encode() + json_lines(SIMPLE).decode().encode("gbk") + good.encode())
    found = read_files([tmp_path / "utf8.jsonl"], ReadOptions(), 500)
    assert found.texts == [*SIMPLE * 20, SIMPLE[2], *SIMPLE * 20]
    assert [entry[1:] for entry in found.rejected] == [(61, "invalid UTF-8"), (62, "invalid UTF-8")]


def test_file_that_begins_with_plain_ascii(tmp_path: Path) -> None:
    plain, gbk = json_lines(["plain words"] * 5000), json_lines(SIMPLE).decode().encode("gbk")
    (tmp_path / "a.jsonl").write_bytes(plain + gbk * 3000)
    with pytest.raises(DataError, match=r"a\.jsonl: looks like GB18030, not UTF-8"):
        read_files([tmp_path / "a.jsonl"], ReadOptions(), 1 << 20)
    (tmp_path / "b.jsonl").write_bytes(plain + json_lines(SIMPLE) * 3000)
    assert len(read_files([tmp_path / "b.jsonl"], ReadOptions(), 1 << 20).texts) == 14_000
    with pytest.raises(DataError, match=r"b\.jsonl: looks like UTF-8, not GB18030"):
        read_files([tmp_path / "b.jsonl"], ReadOptions(encoding="gb18030"), 1 << 20)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Ceci est un café très agréable où l'été brûle."),
        ("shift_jis", "これは日本語の文章です。今日は天気がいい。"),
        ("koi8-r", "Сегодня хорошая погода"),
        ("gb18030", "only ASCII"),
    ],
)
def test_other_languages_are_read_in_the_encoding_that_is_given(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([text] * 3).decode().encode(encoding))
    assert read_files([tmp_path], ReadOptions(encoding=normal_encoding(encoding)), 100).texts == [text] * 3


def test_byte_order_marks_of_utf8_are_no_other_encoding(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(STORED[name][0](SIMPLE, "utf-8-sig"))
        assert read_files([tmp_path / name], ReadOptions(text_documents=BLANK_LINES), 100).texts == SIMPLE


@pytest.mark.parametrize("name", ["nope", "", "base64", "rot13", "idna", "undefined"])
def test_unknown_encodings_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--encoding {name}: no encoding of that name"):
        normal_encoding(name)


def test_names_of_encodings() -> None:
    assert [normal_encoding(name) for name in ("UTF8", "utf-8-sig", "GBK", "cp936", "GB2312", "Big5", "UTF_16LE")] == [
        None, None, "gb18030", "gb18030", "gb18030", "big5", "utf-16-le",
    ]  # fmt: skip
