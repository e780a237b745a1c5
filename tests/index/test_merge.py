"""Merging indexes."""

import json
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textdata import index_bytes, is_one_line_error, json_lines, megazh, small_index, texts, tokenizer_path

from megazh.errors import BusyError, DataError, UsageError
from megazh.files import locked
from megazh.index.build import Request, build_index
from megazh.index.check import verify_index
from megazh.index.merge import merge_indexes
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset


def build(inputs: list[Path], output: Path, **request: object) -> None:
    made = Request([str(path) for path in inputs], output, tokenizer_path(), max_bad=0.5, **request)
    build_index(made, InlinePool(), lambda line: pytest.fail(line))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for name, count in (("a", 70), ("b", 40), ("c", 3)):
        (folder / f"{name}.jsonl").write_bytes(json_lines([*texts(count, count), ""]) + b"broken\n")
        build([folder / f"{name}.jsonl"], folder / name)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "built")
    return tmp_path / "built"


def test_merged_is_what_one_build_of_all_gives(folder: Path) -> None:
    code, out, err = megazh("index", "merge", folder / "a", folder / "b", folder / "c", "--output", folder / "abc")
    assert (code, err) == (0, "")
    assert "113 documents" in out
    build([folder / f"{name}.jsonl" for name in "abc"], folder / "whole")
    merged, whole = index_bytes(folder / "abc", optional=()), index_bytes(folder / "whole", optional=())
    assert merged == whole
    assert (folder / "abc.tokenizer.json").read_bytes() == tokenizer_path().read_bytes()
    assert not (folder / "abc.build").exists()
    assert "are right" in verify_index(str(folder / "abc"))


def test_merged_is_what_megatron_merges(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    merge_indexes([str(folder / "b"), str(folder / "a")], folder / "ours")
    builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
    for name in "ba":
        builder.add_index(str(folder / name))
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (folder / f"theirs.{suffix}").read_bytes()


def test_order_is_the_one_given(folder: Path) -> None:
    merge_indexes([str(folder / "c"), str(folder / "a"), str(folder / "c")], folder / "cac")
    index, one = IndexedDataset(folder / "cac"), IndexedDataset(folder / "c")
    assert len(index) == 3 + 70 + 3
    assert index[0].tolist() == index[73].tolist() == one[0].tolist()
    assert index.document_hashes()[-3:].tolist() == one.document_hashes().tolist()


def test_numbers_add_up(folder: Path) -> None:
    metadata = merge_indexes([str(folder / "a"), str(folder / "b")], folder / "ab")
    parts = [json.loads((folder / f"{name}.json").read_bytes()) for name in "ab"]
    assert metadata.tokens == sum(part["tokens"] for part in parts)
    assert metadata.text_bytes == sum(part["text_bytes"] for part in parts)
    assert (metadata.empty_documents, metadata.rejected.total) == (2, 2)
    assert [source.name for source in metadata.sources] == ["a.jsonl", "b.jsonl"]


def test_many_documents_go_in_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_indexes([str(folder / "a"), str(folder / "b")], folder / "one")
    monkeypatch.setattr("megazh.index.merge._DOCUMENTS", 7)
    merge_indexes([str(folder / "a"), str(folder / "b")], folder / "two")
    assert index_bytes(folder / "one") == index_bytes(folder / "two")


def test_tokenizers_that_differ_are_refused_by_name(folder: Path) -> None:
    build([folder / "b.jsonl"], folder / "other", eod="<|im_end|>")
    code, out, err = megazh("index", "merge", folder / "a", folder / "other", "--output", folder / "x")
    assert (code, out) == (2, "")
    assert is_one_line_error(
        err, folder / "other", folder / "a", "end-of-document token '<|endoftext|>' (1) and '<|im_end|>' (3)"
    )
    assert not (folder / "x.build").exists()


def reformatted(settings: dict[str, Any], how: str) -> str:
    """The same tokenizer as another tool would write it."""
    if how == "spaces":
        return json.dumps(settings, indent=4)
    if how == "order of keys":
        return json.dumps(settings, sort_keys=True)
    if how == "merges as strings":
        merges = [" ".join(pair) for pair in settings["model"]["merges"]]
        return json.dumps({**settings, "model": {**settings["model"], "merges": merges}})
    if how == "padding":
        return json.dumps({**settings, "truncation": None, "padding": None, "post_processor": None})
    assert how == "defaults left out"
    del settings["model"]["ignore_merges"], settings["model"]["fuse_unk"]
    return json.dumps(settings)


@pytest.mark.parametrize(
    "how", ["copy", "spaces", "order of keys", "merges as strings", "padding", "defaults left out"]
)
def test_equal_tokenizers_of_other_form_or_place_are_merged(folder: Path, how: str) -> None:
    """They were refused with "X differs from X"."""
    other = folder / "elsewhere" / "tokenizer.json"
    other.parent.mkdir()
    text = tokenizer_path().read_text(encoding="utf-8")
    other.write_text(text if how == "copy" else reformatted(json.loads(text), how), encoding="utf-8")
    made = Request([str(folder / "b.jsonl")], folder / "other", other, max_bad=0.5)
    build_index(made, InlinePool(), lambda line: pytest.fail(line))
    code, _, err = megazh("index", "merge", folder / "a", folder / "other", "--output", folder / "x")
    assert (code, err) == (0, "")
    merge_indexes([str(folder / "a"), str(folder / "b")], folder / "expected")
    assert index_bytes(folder / "x") == index_bytes(folder / "expected")
    assert "are right" in verify_index(str(folder / "x"))


def changed(settings: dict[str, Any], how: str) -> None:
    if how == "added token":
        new = {**settings["added_tokens"][0], "id": 1500, "content": "<|new|>"}
        settings["added_tokens"].append(new)
    elif how == "normalizer":
        settings["normalizer"] = {"type": "NFKC"}
    elif how == "merges":
        merges = settings["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]
    elif how == "regex":
        settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|x{3}"
    else:
        vocabulary = settings["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("added token", "added token 1500 is missing and '<|new|>' (special)"),
        ("normalizer", "different 'normalizer'"),
        ("merges", "different 'merges'"),
        ("regex", "different 'pre_tokenizer'"),
        ("ids", "vocabularies in which"),
    ],
)
def test_what_differs_between_tokenizers_is_named(folder: Path, how: str, part: str) -> None:
    settings = json.loads(tokenizer_path().read_text(encoding="utf-8"))
    changed(settings, how)
    other = folder / "other.json"
    other.write_text(json.dumps(settings), encoding="utf-8")
    made = Request([str(folder / "b.jsonl")], folder / "other", other, max_bad=0.5)
    build_index(made, InlinePool(), lambda line: None)
    with pytest.raises(UsageError) as caught:
        merge_indexes([str(folder / "a"), str(folder / "other")], folder / "x")
    assert part in str(caught.value)
    assert str(folder / "other") in str(caught.value)


def test_index_without_description_is_refused(folder: Path) -> None:
    small_index(folder / "small")
    with pytest.raises(DataError, match=r"small\.json: missing"):
        merge_indexes([str(folder / "a"), str(folder / "small")], folder / "x")


def test_missing_input_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no index there"):
        merge_indexes([str(folder / "a"), str(folder / "nothing")], folder / "x")


def test_damaged_input_is_refused(folder: Path) -> None:
    data = bytearray((folder / "b.bin").read_bytes())
    data[5] ^= 1
    (folder / "b.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"b\.bin: wrong content"):
        merge_indexes([str(folder / "a"), str(folder / "b")], folder / "x")


@pytest.mark.parametrize("output", ["a", "c"])
def test_output_that_is_there_is_refused(folder: Path, output: str) -> None:
    before = index_bytes(folder / output)
    with pytest.raises(UsageError, match="an index is there already"):
        merge_indexes([str(folder / "a"), str(folder / "b")], folder / output)
    assert index_bytes(folder / output) == before


def test_output_that_is_being_built_is_refused(folder: Path) -> None:
    with locked(folder / "x.build" / "lock"), pytest.raises(BusyError):
        merge_indexes([str(folder / "a")], folder / "x")


def test_failed_merge_leaves_nothing(folder: Path) -> None:
    (folder / "b.docs").unlink()
    code, _, err = megazh("index", "merge", folder / "a", folder / "b", "--output", folder / "x")
    assert code == 3
    assert is_one_line_error(err, "b.docs")
    assert not list(folder.glob("x.*"))


def test_full_disk_is_one_line(folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    code, _, err = megazh("index", "merge", folder / "a", folder / "b", "--output", folder / "x", preexec_fn=limit)
    assert code == 5, err
    assert is_one_line_error(err, folder / "x.build" / "index.bin", "needed, 'ulimit -f' allows 2.0 kB"), err
    assert not list(folder.glob("x.*"))


def test_interrupted_build_of_the_output_is_not_thrown_away(folder: Path) -> None:
    """A merge must not delete the finished pieces of a build: they may be hours of work."""

    class Stopping(InlinePool):
        def run(self, setup: object, tasks: object) -> object:
            yield from super().run(setup, (next(tasks) for _ in range(1)))  # type: ignore[arg-type]
            raise KeyboardInterrupt

    request = Request([str(folder / "b.jsonl")], folder / "x", tokenizer_path(), max_bad=0.5)
    with pytest.raises(KeyboardInterrupt):
        build_index(request, Stopping(), lambda line: None)
    assert (folder / "x.build" / "plan.json").exists()
    with pytest.raises(UsageError):
        merge_indexes([str(folder / "a")], folder / "x")
    assert (folder / "x.build" / "plan.json").exists()
