"""Which files a folder or a glob brings: each real file once, nothing special, and what is left out is counted."""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textdata import json_lines, write_arrow

from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import list_inputs
from megazh.errors import DataError, UsageError


def put(path: Path, data: bytes | str = json_lines(["x"])) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def names(*inputs: Path | str, format: Format | None = None) -> list[str]:
    return [source.name for source in list_inputs([str(each) for each in inputs], format).sources]


def left_out(*inputs: Path | str, format: Format | None = None) -> str:
    return list_inputs([str(each) for each in inputs], format).left_out.describe()


def test_linked_folder_is_read(tmp_path: Path) -> None:
    put(tmp_path / "raw" / "a.jsonl")
    put(tmp_path / "elsewhere" / "deep" / "b.jsonl")
    (tmp_path / "raw" / "sub").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "raw") == ["a.jsonl", "sub/deep/b.jsonl"]


@pytest.mark.timeout(20)
def test_links_in_a_circle_end(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        put(tmp_path / folder / "x.jsonl")
        (tmp_path / folder / "up").symlink_to(tmp_path)
        (tmp_path / folder / "other").symlink_to(tmp_path / ("b" if folder == "a" else "a"))
    assert names(tmp_path) == ["a/x.jsonl", "b/x.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["a/x.jsonl", "b/x.jsonl"]


def test_one_file_under_many_names_is_read_once(tmp_path: Path) -> None:
    real = put(tmp_path / "m.jsonl")
    (tmp_path / "a.jsonl").symlink_to(real)
    (tmp_path / "k").mkdir()
    os.link(real, tmp_path / "k" / "hard.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path / "k")
    os.link(put(tmp_path / "y.jsonl"), tmp_path / "x.jsonl")
    found = names(tmp_path, tmp_path / "a.jsonl", real, f"{tmp_path}/*.jsonl", tmp_path / "linked", tmp_path / "k")
    assert found == ["k/hard.jsonl", "x.jsonl"]
    assert names(tmp_path / "a.jsonl") == ["a.jsonl"]
    assert names(tmp_path / "linked") == ["hard.jsonl"]


def test_a_name_without_a_link_comes_before_one_with_it(tmp_path: Path) -> None:
    put(tmp_path / "real" / "x.jsonl")
    put(tmp_path / "y.jsonl")
    (tmp_path / "a-link").symlink_to("real")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "link").symlink_to(tmp_path / "real")
    assert names(tmp_path) == ["real/x.jsonl", "y.jsonl"]
    assert names(tmp_path / "given", tmp_path / "real") == ["x.jsonl"]


def test_file_of_a_hub_cache_is_read_under_the_name_that_has_a_suffix(tmp_path: Path) -> None:
    put(tmp_path / "blobs" / "deadbeef")
    put(tmp_path / "blobs" / "feed", "# a data set card")
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "snapshots" / "1" / "train.jsonl").symlink_to("../../blobs/deadbeef")
    (tmp_path / "snapshots" / "1" / "README.md").symlink_to("../../blobs/feed")
    assert names(tmp_path) == ["train.jsonl"]
    assert left_out(tmp_path) == "README.md"


@pytest.mark.parametrize("target", ["gone", "x.jsonl"])
def test_link_that_leads_nowhere_is_an_error(tmp_path: Path, target: str) -> None:
    put(tmp_path / "a.jsonl")
    (tmp_path / "x.jsonl").symlink_to(target)
    for given in (tmp_path, tmp_path / "x.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match=rf"x\.jsonl: a link to {target}, which cannot be followed"):
            names(given)


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "p.jsonl")
    (tmp_path / "l.jsonl").symlink_to("p.jsonl")
    (tmp_path / "null.txt").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind("s.jsonl")
    for given in (tmp_path, f"{tmp_path}/*"):
        assert names(given) == ["a.jsonl"]
        assert left_out(given) == "null.txt (device), p.jsonl (pipe), s.jsonl (socket)"
    for name, kind in (("p.jsonl", "pipe"), ("l.jsonl", "pipe"), ("s.jsonl", "socket"), ("null.txt", "device")):
        with pytest.raises(UsageError, match=f"{name}: is a {kind}, not a file"):
            names(tmp_path / name)


def test_hidden_files_and_folders_are_read_only_where_they_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl", ".git/c.jsonl", ".git/d/e.jsonl"):
        put(tmp_path / name)
    assert names(tmp_path) == names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl"]
    assert left_out(tmp_path) == ".b.jsonl, .git/"
    assert names(tmp_path / ".b.jsonl", tmp_path / ".git", tmp_path) == [
        ".b.jsonl", ".git/c.jsonl", ".git/d/e.jsonl", "a.jsonl",
    ]  # fmt: skip
    assert names(f"{tmp_path}/.*") == [".b.jsonl", ".git/c.jsonl", ".git/d/e.jsonl"]


def test_what_surrounds_a_data_set_is_no_text(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl")
    put(tmp_path / "chapter.md", "text")
    around = ["README.md", "README.zh-CN.md", "readme_zh.txt", "LICENSE", "LICENSE.txt", "NOTICE.md", "vocab.txt"]
    for name in around:
        put(tmp_path / name, "about the data")
    described = ["dataset_info.json", "state.json", "dataset_dict.json"]
    for name in described:
        put(tmp_path / name, '{"features": {"text": {"dtype": "string"}},\n "splits": []}')
    put(tmp_path / "wiki.rejected.jsonl", '{"file": "a", "line": 1, "reason": "broken JSON", "detail": "x"}\n')
    put(tmp_path / "tokenizer.json", '{"model": {"vocab": {' + '"x": 1, ' * 20_000 + '"y": 2}}}')
    for name in ("wiki.bin", "mixture.yaml", "wiki.log", "x.lock"):
        put(tmp_path / name, "x")
    listing = list_inputs([str(tmp_path)])
    assert [source.name for source in listing.sources] == ["chapter.md", "train.jsonl"]
    told = listing.left_out.describe(None)
    for name in [*around, "wiki.rejected.jsonl", "wiki.bin", "mixture.yaml", "wiki.log", "x.lock"]:
        assert name in told
    assert "4 *.json without 'text'" in told
    assert names(tmp_path / "README.md", tmp_path) == ["README.md", "chapter.md", "train.jsonl"], "named: it is read"


def test_single_objects_with_text_are_documents(tmp_path: Path) -> None:
    put(tmp_path / "1.json", '{"text": "one"}')
    put(tmp_path / "2.json", '{\n "id": 2,\n "text": "two"\n}\n')
    put(tmp_path / "meta.json", '{"title": "no text"}')
    assert names(tmp_path) == ["1.json", "2.json"]
    assert left_out(tmp_path) == "meta.json"
    with pytest.raises(UsageError, match=r"no file with text; left out: 1\.json, 2\.json, meta\.json"):
        list_inputs([str(tmp_path)], read=ReadOptions(text_key="body"))


def test_run_folders_and_unfinished_indexes_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for name in ("runs/demo/run.json", "runs/demo/config.yaml", "runs/demo/metrics.jsonl", "runs/demo/logs/x.txt"):
        put(tmp_path / name)
    for name in ("wiki.build/plan.json", "wiki.build/rejected.jsonl"):
        put(tmp_path / name)
    for name in ("demo/prepared.json", "demo/mixture.yaml", "demo/stories.jsonl"):
        put(tmp_path / "data_index" / name)
    assert names(tmp_path) == ["a.jsonl"]
    assert left_out(tmp_path) == "demo/ (prepared data), demo/ (run folder), wiki.build/ (unfinished index)"
    with pytest.raises(UsageError, match=r"no file with text; left out: demo/ \(run folder\)"):
        names(tmp_path / "runs" / "demo")
    assert names(tmp_path / "data_index" / "demo" / "stories.jsonl") == ["stories.jsonl"], "named: it is read"


def test_files_without_a_suffix_are_counted_with_the_option_that_reads_them(tmp_path: Path) -> None:
    """As WikiExtractor writes them."""
    for number in range(20):
        put(tmp_path / "AA" / f"wiki_{number:02}")
    with pytest.raises(UsageError, match="left out: 20 without a suffix; --format reads files of other suffixes, too"):
        names(tmp_path)
    assert len(names(tmp_path, format=Format.JSONL)) == 20
    put(tmp_path / "a.jsonl")
    assert names(tmp_path) == ["a.jsonl"]


def test_left_out_files_are_counted_by_suffix_with_the_remedy(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for number in range(12):
        put(tmp_path / f"{number}.PDF", "x")
    for name in ("1.docx", "2.docx", "x.zip", "y.tar.gz", "z.jsonl.lz4", "noext", "i/README.md", "README.md"):
        put(tmp_path / name, "x")
    assert left_out(tmp_path) == (
        "12 *.pdf, 2 *.docx, 2 README.md, noext, x.zip, y.tar.gz, z.jsonl.lz4 (to read them: compress .lz4 with gzip, "
        "bzip2, xz or zstd instead; save .docx, .pdf as .txt; unpack .tar.gz, .zip)"
    )
    assert left_out(tmp_path, format=Format.JSONL).startswith("12 *.pdf, 2 *.docx"), "no format makes these text"
    with pytest.raises(UsageError, match=r"\.PDF: no file with text; left out: 12 \*\.pdf \(to read them: save"):
        names(f"{tmp_path}/*.PDF")
    with pytest.raises(UsageError, match=r"1\.docx: \.docx files are not read; save as \.txt"):
        names(tmp_path / "1.docx")


def test_line_of_left_out_files_stays_short(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for number in range(100):
        put(tmp_path / f"x.e{number}", "x")
    told = left_out(tmp_path)
    assert told.endswith(", 84 more")
    assert len(told) < 200


@pytest.fixture
def open_to_all(tmp_path: Path) -> Iterator[Path]:
    """A folder that another user can enter; tests that are run by root become another user within it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_read_is_an_error_with_its_path(open_to_all: Path, what: str) -> None:
    put(open_to_all / "ok.jsonl")
    closed = put(open_to_all / "closed" / "a.jsonl")
    closed = closed.parent if what == "folder" else closed
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        for given in (open_to_all, f"{open_to_all}/**/*.jsonl", open_to_all / "closed" / "a.jsonl"):
            with pytest.raises(DataError, match=r"closed.*: cannot be read: Permission denied"):
                names(given)
    finally:
        os.seteuid(user)
    assert not stat.S_IMODE(closed.stat().st_mode)


def test_every_input_has_to_bring_text(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "pdfs" / "b.pdf")
    with pytest.raises(UsageError, match=r"--input .*pdfs: no file with text; left out: b\.pdf"):
        names(tmp_path / "a.jsonl", tmp_path / "pdfs")
    with pytest.raises(UsageError, match=r"--input .*x=1/a\.jsonl: no such file or folder"):
        names(tmp_path / "a.jsonl", tmp_path / "x=1" / "a.jsonl")


def test_globs_match_as_pythons_do(tmp_path: Path) -> None:
    for name in ("a/1.jsonl", "a/b/2.jsonl", "lang=zh/3.jsonl", "x[1].jsonl", "x1.jsonl"):
        put(tmp_path / name)
    assert names(f"{tmp_path}/**/*.jsonl") == ["a/1.jsonl", "a/b/2.jsonl", "lang=zh/3.jsonl", "x1.jsonl", "x[1].jsonl"]
    assert names(f"{tmp_path}/**") == names(tmp_path)
    assert names(f"{tmp_path}/lang=*/*") == ["3.jsonl"]
    assert names(f"{tmp_path}/*/?.jsonl") == ["a/1.jsonl", "lang=zh/3.jsonl"]
    assert names(f"{tmp_path}/x[1].jsonl") == ["x[1].jsonl"], "a file of that very name comes first"
    assert names(f"{tmp_path}/x[[]1].jsonl") == ["x[1].jsonl"]


def test_file_systems_without_inode_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems give 0 for all files; none of them may go missing."""
    for name in ("a.jsonl", "b.jsonl", "c/d.jsonl", "e/f.jsonl"):
        put(tmp_path / name)
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    (tmp_path / "g.jsonl").symlink_to("a.jsonl")
    real_stat = os.stat

    def stat_without_inode(*arguments: Any, **options: Any) -> os.stat_result:
        found = list(real_stat(*arguments, **options))
        found[1] = 0
        return os.stat_result(found)

    with monkeypatch.context() as patch:
        patch.setattr("megazh.corpus.listing.os.stat", stat_without_inode)
        assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c/d.jsonl", "e/f.jsonl"]


def test_caches_of_datasets_are_passed_over(tmp_path: Path) -> None:
    for name in (
        "data-00000-of-00001.arrow",
        "cache-0f3c9a1b2c4d5e6f.arrow",
        "cache-0f3c9a1b2c4d5e6f_00000_of_00004.arrow",
    ):
        write_arrow(tmp_path / name, ["x"])
    assert names(tmp_path) == ["data-00000-of-00001.arrow"]


def test_names_that_break_lines_stay_on_one(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "two\nlines.pdf", "x")
    put(tmp_path / "\u4e2d\u6587.docx", "x")
    assert left_out(tmp_path).startswith("two\\nlines.pdf, 中文.docx (to read them")
