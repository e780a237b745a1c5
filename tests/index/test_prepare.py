"""Preparation of stories or of own text up to the manifest: new, repeated, interrupted, and refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from textdata import index_bytes, json_lines, texts, write_parquet

from megazh.corpus.options import TextDocuments
from megazh.errors import BusyError, DataError, UsageError
from megazh.files import locked
from megazh.index import prepare as module
from megazh.index.check import verify_index
from megazh.index.manifest import load_manifest
from megazh.index.metadata import read_metadata
from megazh.index.mixture import Mixture
from megazh.index.prepare import prepare


class Call:
    """Calls `prepare` with one folder, and keeps the lines that it reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def __call__(self, *inputs: Path, **options: Any) -> Path:
        self.said = []
        given = {"vocab_size": 400, "seed": 5, "story_count": 300, **options}
        named = [str(path) for path in inputs] or None
        return prepare(self.folder, inputs=named, say=self.said.append, **given)

    def documents(self) -> int:
        metadata = read_metadata(self.folder / "corpus")
        assert metadata is not None
        return metadata.documents

    def steps(self) -> list[str]:
        return [line.split(":")[0] for line in self.said]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return Call(tmp_path / "run")


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json_lines(texts(60)))
    return path


def test_stories(call: Call) -> None:
    manifest = call()
    assert manifest == call.folder / "mixture.yaml"
    assert call.steps() == ["stories", "tokenizer", "index", "manifest"]
    assert "300 documents" in call.said[2]
    assert "bytes per token" in call.said[2]
    assert (call.documents(), load_manifest(manifest).seed) == (300, 5)
    mixture = Mixture(manifest, 64)
    (corpus,) = mixture.corpora
    assert 10 <= len(corpus.validation) <= 35
    assert len(corpus.training) + len(corpus.validation) == 300
    verify_index(str(call.folder / "corpus"))


def test_same_seed_same_bytes(call: Call, tmp_path: Path) -> None:
    other = Call(tmp_path / "other")
    call()
    other()
    assert index_bytes(call.folder / "corpus") == index_bytes(other.folder / "corpus")
    for name in ("mixture.yaml", "tokenizer.json"):
        assert (call.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_again_nothing_is_done(call: Call) -> None:
    manifest = call()
    before = {path.name: path.stat().st_mtime_ns for path in call.folder.iterdir() if path.name != "prepare.lock"}
    assert call() == manifest
    assert call.steps() == ["data"]
    assert before == {
        path.name: path.stat().st_mtime_ns for path in call.folder.iterdir() if path.name != "prepare.lock"
    }


@pytest.mark.parametrize("missing", ["mixture.yaml", "tokenizer.json", "corpus.idx"])
def test_what_is_missing_is_made_again(call: Call, missing: str) -> None:
    call()
    before = (call.folder / missing).read_bytes()
    (call.folder / missing).unlink()
    call()
    assert (call.folder / missing).read_bytes() == before


def test_damaged_index_is_told_with_the_remedy(call: Call) -> None:
    call()
    (call.folder / "corpus.docs").write_bytes(b"short")
    with pytest.raises(DataError, match=f"corpus.docs.*delete {call.folder}/corpus.idx, which a prep"):
        call()
    (call.folder / "corpus.idx").unlink()
    call()
    verify_index(str(call.folder / "corpus"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "nested key", "folder of files", "one text"])
def test_own_text(call: Call, tmp_path: Path, kind: str) -> None:
    source, options = tmp_path / "in", {}
    source.mkdir()
    if kind == "jsonl":
        (source / "a.jsonl").write_bytes(json_lines(texts(60)))
    if kind == "parquet":
        write_parquet(source / "a.parquet", texts(60))
    if kind == "nested key":
        lines = (json.dumps({"meta": {"body": text}}) for text in texts(60))
        (source / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        options = {"text_key": "meta.body"}
    if kind == "folder of files":
        for number in range(60):
            (source / f"{number}.txt").write_text(f"第{number}篇\n\n今天天气不错。", encoding="utf-8")
    if kind == "one text":
        (source / "a.txt").write_text(
            "\n\n".join(f"第{number}段，今天天气不错。" for number in range(60)), encoding="utf-8"
        )
    manifest = call(source, **options)
    assert call.documents() == 60
    assert ("text" in call.steps()) == (kind == "one text")
    assert "blank line" in call.said[0] or kind != "one text"
    (corpus,) = Mixture(manifest, 16).corpora
    assert 1 <= len(corpus.validation) <= 30
    assert not (call.folder / "stories.jsonl").exists()
    call(source, **options)
    assert call.steps()[-1] == "data"


def test_few_documents_leave_some_on_both_sides(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["今天天气不错，我们去公园散步吧。" * 9, "一二三四五六七八九十"]))
    (corpus,) = Mixture(call(tmp_path / "a.jsonl"), 8).corpora
    assert (list(corpus.training), list(corpus.validation)) == ([0], [1])


@pytest.mark.parametrize("documents", [["今天天气不错。" * 50], ["今天天气不错。"] * 5], ids=["one", "all equal"])
def test_one_document_cannot_be_split(call: Call, tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(documents))
    with pytest.raises(DataError, match=r"1 of them distinct: .* --text-documents blank-lines"):
        call(path)
    path.write_bytes(json_lines([*documents, "明天也不错。"]))
    call(path)
    assert call.documents() == len(documents) + 1


def test_file_as_a_document_when_asked_for(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("今天天气不错。\n\n明天也不错。\n", encoding="utf-8")
    with pytest.raises(DataError, match="has 1 document, 1 of them distinct"):
        call(tmp_path / "a.txt", text_documents=TextDocuments.FILE)
    call(tmp_path / "a.txt")
    assert call.documents() == 2


def test_missing_key_names_those_there_are(call: Call, tmp_path: Path, jsonl: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts(20), key="content"))
    with pytest.raises(DataError, match=r"a\.jsonl: missing key: no 'text'; keys: content .*--text-key"):
        call(path)
    call(path, text_key="content")
    assert call.documents() == 20


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("no such file", UsageError, "nothing.jsonl: no such file"),
        ("empty", DataError, "holds no text"),
        ("vocabulary", UsageError, "--vocab-size 100"),
        ("inside", UsageError, "lies in .*put it elsewhere"),
        ("GBK", DataError, "b.txt: looks like GB18030, .*--encoding gb18030"),
    ],
)
def test_refused_in_one_line_and_no_obstacle(
    call: Call, tmp_path: Path, jsonl: Path, case: str, error: type[Exception], message: str
) -> None:
    path, options = tmp_path / "nothing.jsonl", {}
    if case == "empty":
        path.write_bytes(json_lines(["", ""]))
    if case == "vocabulary":
        path, options = jsonl, {"vocab_size": 100}
    if case == "inside":
        path = call.folder / "own.jsonl"
        path.parent.mkdir()
        path.write_bytes(json_lines(["a", "b"]))
    if case == "GBK":
        path = tmp_path / "b.txt"
        path.write_bytes("今天天气不错\n\n明天也不错".encode("gbk"))
    with pytest.raises(error, match=message) as caught:
        call(path, **options)
    assert "\n" not in str(caught.value)
    call(jsonl)
    assert call.documents() == 60


def test_what_the_run_writes_is_no_input(call: Call, tmp_path: Path, jsonl: Path) -> None:
    call(tmp_path)
    assert call.documents() == 60
    (call.folder / "metrics.jsonl").write_bytes(json_lines(["later"]))
    call(tmp_path)
    assert call.steps() == ["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 500}, "vocab_size 400, this run asks for 500"),
        ({"seed": 6}, "seed 5, this run asks for 6"),
        ({"text_key": "body"}, "text_key text, this run asks for body"),
        ("stories", "from own text, this run asks for stories"),
        ("content", "own.jsonl has changed"),
        ("file", "more.jsonl is new"),
    ],
    ids=str,
)
def test_other_input_in_the_same_folder_is_refused(
    call: Call, tmp_path: Path, jsonl: Path, change: Any, message: str
) -> None:
    call(jsonl)
    before = index_bytes(call.folder / "corpus")
    inputs = [jsonl]
    if change == "stories":
        inputs = []
    if change == "content":
        jsonl.write_bytes(json_lines(texts(61)))
    if change == "file":
        (tmp_path / "more.jsonl").write_bytes(json_lines(texts(3)))
        inputs.append(tmp_path / "more.jsonl")
    with pytest.raises(UsageError, match=f"{message}.*-r.*the same again$"):
        call(*inputs, **(change if isinstance(change, dict) else {}))
    assert index_bytes(call.folder / "corpus") == before


@pytest.mark.parametrize("step", ["write_stories", "train_tokenizer", "build_index", "_split"])
def test_interrupted_the_next_call_goes_on(call: Call, tmp_path: Path, step: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    done = call.steps()
    call()
    assert [*done, *call.steps()] == ["stories", "tokenizer", "index", "manifest"]
    whole = Call(tmp_path / "whole")
    whole()
    assert index_bytes(call.folder / "corpus") == index_bytes(whole.folder / "corpus")


def test_interrupted_and_then_asked_for_something_else(call: Call, jsonl: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_split", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    call(jsonl)
    assert call.documents() == 60
    assert not (call.folder / "stories.jsonl").exists()


def test_files_of_another_hand_are_left_alone(call: Call, jsonl: Path) -> None:
    call.folder.mkdir()
    (call.folder / "tokenizer.json").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"tokenizer\.json: is in the way"):
        call(jsonl)
    assert (call.folder / "tokenizer.json").read_bytes() == b"mine"


def test_two_at_once(call: Call) -> None:
    with (
        locked(call.folder / "prepare.lock"),
        pytest.raises(BusyError, match=rf"another process prepares.*{os.getpid()}"),
    ):
        call()
    call()
    assert call.documents() == 300


def test_text_in_another_encoding_beside_files_that_are_no_text(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    plain = [f"第{number}段文字，我们去公园散步。" for number in range(60)]
    (source / "a.txt").write_bytes("\n\u3000\n".join(plain).encode("gb18030"))
    for name in ("README.md", "b.docx", "c.docx"):
        (source / name).write_bytes(b"about")
    with pytest.raises(DataError, match="looks like GB18030"):
        call(source)
    call(source, encoding="gb18030")
    assert call.documents() == 60
    left_out = "left out: 2 *.docx, README.md (to read them: save .docx as .txt)"
    assert call.said[0] == left_out
    assert left_out in (call.folder / "corpus.log").read_text(encoding="utf-8")
    call(source, encoding="gb18030")
    assert call.steps() == ["left out", "text", "data"]


def test_files_whose_names_are_not_utf8(call: Call, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode("语料.jsonl".encode("gbk"))).write_bytes(json_lines(texts(60)))
    call(tmp_path)
    assert call.documents() == 60
    call(tmp_path)
    assert call.steps() == ["data"]
