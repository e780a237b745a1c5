"""JSON arrays and CSV: the documents that Python's own readers find, however the file is stored and cut."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from textdata import read_files, texts, use_small_blocks

from megazh.corpus import convert
from megazh.corpus.options import ReadOptions
from megazh.errors import DataError, UsageError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
element = st.one_of(
    st.fixed_dictionaries({"text": text, "id": st.integers(), "nested": st.lists(st.one_of(text, st.none()))}),
    st.sampled_from([{"text": None}, {"other": 1}, 5, "x", None, [1], {"text": ["x"]}, {"text": float("nan")}]),
)


def expected(elements: list[Any]) -> tuple[list[str], int, int]:
    """(texts, number of empty ones, number of rejected ones)."""
    found = [value.get("text") if isinstance(value, dict) else None for value in elements]
    words = [(value[1:] if value.startswith("\ufeff") else value) for value in found if isinstance(value, str)]
    return [word for word in words if word], words.count(""), len(found) - len(words)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    elements=st.lists(element, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    form=st.sampled_from(["array", "objects"]),
    block=st.integers(1, 60),
)
def test_json_arrays_and_spread_objects(
    tmp_path: Path, elements: list[Any], indent: int | None, ascii_only: bool, form: str, block: int
) -> None:
    if form == "objects":
        elements = [{"a": 1, "text": "first"}, *(value for value in elements if isinstance(value, dict))]
        data = "\n".join(json.dumps(value, ensure_ascii=ascii_only, indent=1) for value in elements)
    else:
        data = json.dumps(elements, ensure_ascii=ascii_only, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, 30)
        patch.setattr(convert, "_BLOCK", block)
        path = tmp_path / "a.json"
        path.write_text(data + "\n", encoding="utf-8")
        found = read_files([path], ReadOptions(), 50)
    assert (found.texts, found.empty, len(found.rejected)) == expected(elements)


def test_elements_of_an_array_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf [{"text": "a"}, {"text": "b\xff"},\n{"x": 1}, {"text": "d"}] \n')
    found = read_files([tmp_path / "a.jsonl"], ReadOptions(), 1)
    assert found.texts == ["a", "d"]
    assert found.rejected == [("a.jsonl", 2, "invalid UTF-8"), ("a.jsonl", 3, "missing key")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}, {"text": "b', "record 2, character 25: the file ends within it"),
        ('[{"text": "a"}, {"text":', "record 2, character 24: the file ends within it"),
        ('[{"text": "a"}', "record 2, character 14: expected , or ]"),
        ('[{"text": "a"} {"text": "b"}]', "record 2, character 15: expected , or ]"),
        ('[{"text": "a"}, {"text" "b"}]' + " " * 50, "record 2, character 24: Expecting ':'"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "there is more behind the end of the array"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_array_is_named_with_the_place(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "a.json").write_text(data, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: broken JSON at ") as caught:
        read_files([tmp_path / "a.json"], ReadOptions(), 100)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)),
    delimiter=st.sampled_from([",", "\t", ";"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    bom=st.booleans(),
    size=st.integers(1, 200),
)
def test_rows_of_csv_are_those_that_were_written(
    tmp_path: Path, documents: list[str], delimiter: str, end: str, quoting: Any, bom: bool, size: int
) -> None:
    # Python 3.11 leaves a lone carriage return unquoted, and it ends a row.
    assume(quoting == csv.QUOTE_ALL or "\r" not in "".join(documents))
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(["id", "text", "url"])
    writer.writerows([number, document, "x"] for number, document in enumerate(documents))
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    path.write_bytes(sink.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, size)
        found = read_files([path], ReadOptions(), size)
    stripped = [document.removeprefix("\ufeff") for document in documents]
    assert found.texts == [document for document in stripped if document]
    assert (found.empty, found.rejected) == (stripped.count(""), [])


def test_fields_longer_than_pythons_limit(tmp_path: Path) -> None:
    documents = ["x" * 500_000, "y,\n" * 100_000, "z" * 900_000]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([document] for document in documents)])
    found = read_files([tmp_path / "a.csv"], ReadOptions(max_document_bytes=600_000), 1 << 20)
    assert found.texts == documents[:2]
    assert found.rejected == [("a.csv", 3, "too long")]


def test_rows_with_another_number_of_fields_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n2\n3,not, quoted\n4,d,,\n\n5,\xff\n6,f\n")
    found = read_files([tmp_path / "a.csv"], ReadOptions(), 10)
    assert found.texts == ["a", "d", "f"]
    assert found.rejected == [("a.csv", 2, "broken row"), ("a.csv", 3, "broken row"), ("a.csv", 5, "invalid UTF-8")]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("id,body\n1,a\n", UsageError, "no column 'text'; its first line names: id, body (choose one with --text-key)"),
        ("1,你好\n2,世界\n", UsageError, "no column 'text'; its first line names: 1, 你好"),
        ("text,id,text\na,1,b\n", UsageError, "has 2 columns 'text'"),
        ('id,text\n1,"a\n2,b\n', DataError, "broken CSV at line 3: unexpected end of data: a quoted field never ends"),
        ('id,text\n1,"a"b\n', DataError, "broken CSV at line 2: ',' expected after '\"'"),
    ],
)
def test_csv_that_cannot_be_read_is_named(tmp_path: Path, data: str, error: type[Exception], message: str) -> None:
    (tmp_path / "a.csv").write_text(data, encoding="utf-8")
    with pytest.raises(error) as caught:
        read_files([tmp_path / "a.csv"], ReadOptions(), 100)
    assert f"a.csv: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_delimiter_of_a_csv_file_is_the_one_that_gives_the_column(tmp_path: Path) -> None:
    for name, data in (
        ("a.csv", "sep=;\r\nid;text\r\n1;a,b\r\n"),
        ("b.csv", "id|text\n1|a;b\n"),
        ("c.csv", "text\nx\n"),
    ):
        (tmp_path / name).write_text(data, encoding="utf-8", newline="")
    assert read_files([tmp_path], ReadOptions(), 100).texts == ["a,b", "a;b", "x"]


def test_files_without_rows(tmp_path: Path) -> None:
    for name, data in (("a.csv", b""), ("b.csv", b"id,text\n"), ("c.json", b"[]"), ("d.json", b" [ ]\n")):
        (tmp_path / name).write_bytes(data)
    assert read_files([tmp_path], ReadOptions(), 100).texts == []


def test_large_array_is_read_in_little_memory_and_many_pieces(tmp_path: Path) -> None:
    documents = texts(6_000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": each} for each in documents], indent=1), encoding="utf-8")
    found = read_files([tmp_path / "a.json"], ReadOptions(), 1 << 18)
    assert found.texts == documents
    assert found.pieces > 5
