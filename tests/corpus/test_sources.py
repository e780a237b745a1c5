"""From files, folders and globs to a sorted list of sources."""

import bz2
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from textdata import gz, json_lines, write_arrow, write_parquet, zst

from megazh.corpus.formats import Format
from megazh.corpus.sources import find_sources, list_inputs
from megazh.errors import DataError, UsageError

LINE = json_lines(["x"])
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gz, ".zst": zst, ".bz2": bz2.compress, ".xz": lzma.compress}


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            write_parquet(path, ["x"])
        elif path.suffix == ".arrow":
            write_arrow(path, ["x"])
        else:
            path.write_bytes(PACKERS.get(path.suffix, bytes)(LINE))


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("a.jsonl", Format.JSONL, None),
        ("a.JSONL", Format.JSONL, None),
        ("a.json", Format.JSONL, None),
        ("a.ndjson", Format.JSONL, None),
        ("a.b.c.jsonl.gz", Format.JSONL, "gzip"),
        ("a.json.zst", Format.JSONL, "zstd"),
        ("a.txt", Format.TEXT, None),
        ("a.txt.zst", Format.TEXT, "zstd"),
        ("a.csv", Format.CSV, None),
        ("a.tsv.bz2", Format.TSV, "bz2"),
        ("a.jsonl.xz", Format.JSONL, "xz"),
        ("a.parquet", Format.PARQUET, None),
        ("a.arrow", Format.ARROW, None),
    ],
)
def test_suffix_tells_format_and_compression(
    tmp_path: Path, name: str, format: Format, compression: str | None
) -> None:
    put(tmp_path, name)
    (source,) = find_sources([str(tmp_path / name)])
    assert (source.format, source.compression, source.name) == (format, compression, name)
    assert source.size == (tmp_path / name).stat().st_size


def test_files_folders_and_globs_are_sorted_and_taken_once(tmp_path: Path) -> None:
    put(tmp_path, "b.jsonl", "a/z.jsonl", "a/k.jsonl.gz", "a/deep/er/m.txt", "a/notes.log")
    inputs = [
        str(tmp_path / "b.jsonl"),
        str(tmp_path / "a"),
        str(tmp_path / "*.jsonl"),
        str(tmp_path / "a" / "z.jsonl"),
    ]
    expected = ["a/deep/er/m.txt", "a/k.jsonl.gz", "a/z.jsonl", "b.jsonl"]
    assert [source.name for source in find_sources(inputs)] == expected
    assert [source.name for source in find_sources(inputs[::-1])] == expected


def test_recursive_glob(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jsonl", "x/y/2.jsonl", "3.jsonl")
    assert [source.name for source in find_sources([f"{tmp_path}/**/*.jsonl"])] == [
        "3.jsonl",
        "x/1.jsonl",
        "x/y/2.jsonl",
    ]


def test_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    put(tmp_path, "part[1].jsonl", "part1.jsonl")
    assert [source.name for source in find_sources([str(tmp_path / "part[1].jsonl")])] == ["part[1].jsonl"]


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for place in ("here", "there/below"):
        put(tmp_path / place, "u/a.jsonl", "v/b.jsonl")
    named = [[s.name for s in find_sources([str(tmp_path / place)])] for place in ("here", "there/below")]
    assert named[0] == named[1] == ["u/a.jsonl", "v/b.jsonl"]


def test_given_format_rules_over_suffixes(tmp_path: Path) -> None:
    put(tmp_path, "a.data", "b.log.gz")
    sources = find_sources([str(tmp_path)], Format.JSONL)
    assert [(source.format, source.compression) for source in sources] == [(Format.JSONL, None), (Format.JSONL, "gzip")]


@pytest.mark.parametrize("given", ["none.jsonl", "*.nothing", "empty"])
def test_input_that_matches_nothing_is_named(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "a.jsonl")
    with pytest.raises(UsageError, match=r"no such file|no file") as caught:
        find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / given)])
    assert given in str(caught.value)


def test_unknown_suffix_is_refused_with_the_choices(tmp_path: Path) -> None:
    put(tmp_path, "a.data")
    with pytest.raises(UsageError, match=r"a\.data: .*--format jsonl\|json\|csv\|tsv\|parquet\|arrow\|text"):
        find_sources([str(tmp_path / "a.data")])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
@pytest.mark.parametrize("content", [b"", LINE])
def test_compression_that_the_first_bytes_deny_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        find_sources([str(tmp_path / name)])


def test_zstd_that_begins_with_a_skippable_frame_is_accepted(tmp_path: Path) -> None:
    """pzstd writes a skippable frame before every frame."""
    skippable = bytes.fromhex("502a4d18 04000000 12345678")
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + zst(LINE))
    (source,) = find_sources([str(tmp_path / "a.jsonl.zst")])
    assert source.compression == "zstd"


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.parquet.gz")
    with pytest.raises(UsageError, match="decompress it first"):
        find_sources([str(tmp_path / "a.parquet.gz")])


def test_no_input_at_all() -> None:
    with pytest.raises(UsageError, match="--input"):
        find_sources([])


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)
PAGE = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
ERROR_XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n'
TEXT_NAMES = ["a.jsonl", "a.json", "a.csv", "a.txt"]
TABLE_NAMES = ["a.parquet", "a.arrow", "a.feather"]
PACKED_NAMES = ["a.jsonl.gz", "a.jsonl.zst", "a.csv.xz", "a.txt.bz2"]


@pytest.mark.parametrize("name", [*TEXT_NAMES, *TABLE_NAMES, *PACKED_NAMES])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "a Git LFS pointer in place of the file, not .*; fetch the file: git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "a ZIP archive, or a .docx or .xlsx file"),
        (
            b"/annex/objects/SHA256E-s12--ab.jsonl\n",
            "a git-annex pointer in place of the file, not .*; .* git annex get",
        ),
        (b"%PDF-1.7\n", "a PDF file, not .*pdftotext"),
        (bytes(257) + b"ustar" + bytes(50), "a tar archive"),
        (b"FEA1\x00\x00\x00\x00" + bytes(60), "a table in the old format Feather V1, not .*as Parquet"),
    ],
    ids=["LFS", "zip", "annex", "PDF", "tar", "Feather V1"],
)
def test_foreign_content_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=f"{name}: holds {message}"):
            find_sources([str(given)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", *TABLE_NAMES, *PACKED_NAMES])
@pytest.mark.parametrize("content", [PAGE, ERROR_XML], ids=["HTML", "XML"])
def test_error_page_of_a_download_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: holds an HTML or XML page, not .*failed download"):
        find_sources([str(tmp_path)])


def test_markup_in_a_text_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(PAGE)
    assert len(find_sources([str(tmp_path)])) == 1


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gz), (".zst", zst), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_content_under_another_name(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    for name in ("a.jsonl", "a.txt", "a.csv", "a.parquet"):
        (tmp_path / name).write_bytes(pack(LINE))
        with pytest.raises(DataError, match=rf"{name}: holds \w+ data, not \w+; rename it to {name}{suffix}"):
            find_sources([str(tmp_path / name)])
    (tmp_path / f"b.jsonl{suffix}").write_bytes(LINE)
    with pytest.raises(DataError, match=r"is no \w+ file: plain text; rename it to b\.jsonl, or fetch it again"):
        find_sources([str(tmp_path / f"b.jsonl{suffix}")])
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(pack(LINE)))
    with pytest.raises(DataError, match=rf"c\.jsonl{suffix}: holds \w+ data inside, not jsonl"):
        find_sources([str(tmp_path / f"c.jsonl{suffix}")])


def test_tables_under_another_name_and_text_under_theirs(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "real.parquet", ["x"]).read_bytes()
    for name in ("a.jsonl", "a.txt", "a.arrow"):
        (tmp_path / name).write_bytes(table)
        with pytest.raises(DataError, match=rf"{name}: holds a Parquet table, not \w+; rename it to {name}\.parquet"):
            find_sources([str(tmp_path / name)])
    for name in TABLE_NAMES:
        (tmp_path / name).write_bytes(LINE)
        with pytest.raises(DataError, match=rf"{name}: holds text, not \w+; rename it"):
            find_sources([str(tmp_path / name)])
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}: is empty"):
            find_sources([str(tmp_path / name)])


def test_text_that_begins_like_a_signature_is_text(tmp_path: Path) -> None:
    for number, text in enumerate(
        ["PARENTS", "PAR1 is", "ARROW1", "FEA1 ", "BZhang", "P*M", "Rar!", "%PDF is a format"]
    ):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    assert len(find_sources([str(tmp_path)])) == 8


@pytest.mark.parametrize("start", [b"[", b"\xef\xbb\xbf[", b"\n  [\n", b'{\n "id": 1,\n "text": "a"\n}\n'])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_what_is_not_one_object_per_line_is_taken_apart(tmp_path: Path, start: bytes, name: str) -> None:
    data = start + b'{"text": "x"}' + (b"]" if b"[" in start else b"")
    (tmp_path / name).write_bytes(gz(data) if name.endswith("gz") else data)
    (source,) = find_sources([str(tmp_path / name)])
    assert source.format is Format.JSON


@pytest.mark.parametrize(
    "data", [LINE, LINE * 2, b'{"text": "cut\n' + LINE, b"", b"\n\n" + LINE, b'{"text": "' + b"x" * 200_000]
)
def test_one_object_per_line_stays_jsonl(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    (source,) = find_sources([str(tmp_path / "a.json")])
    assert source.format is Format.JSONL


def test_empty_files_are_told(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl")
    for name in ("b.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert list_inputs([str(tmp_path)]).notes() == ["empty files: b.jsonl, c.txt"]
