"""From files, folders and globs to a sorted list of sources."""

from pathlib import Path

import pytest
from textdata import gz, json_lines, zst

from megazh.corpus.formats import Format
from megazh.corpus.sources import find_sources
from megazh.errors import DataError, UsageError

LINE = json_lines(["x"])


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gz(LINE) if name.endswith(".gz") else zst(LINE) if name.endswith(".zst") else LINE)


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
