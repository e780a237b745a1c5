"""The command line: help, exit codes, Ctrl-C, and the tool that does the same as the command."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from textdata import (
    ROOT,
    finish,
    index_bytes,
    is_one_line_error,
    json_lines,
    kill_group,
    megazh,
    start,
    start_megazh,
    texts,
    tokenizer_path,
)

COMMANDS = [
    ("index", "build"),
    ("index", "inspect"),
    ("index", "verify"),
    ("index", "merge"),
    ("tokenizer", "train"),
    ("tokenizer", "show"),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts(50)))
    return path


def build(corpus: Path, output: Path, *more: object, **options: object) -> tuple[int, str, str]:
    return megazh(
        "index", "build", "--input", corpus, "--tokenizer", tokenizer_path(), "--output", output, *more, **options
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_examples(command: tuple[str, str]) -> None:
    code, out, err = megazh(*command, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"examples?:\n  megazh {' '.join(command)} ", out)


def test_help_names_every_command() -> None:
    code, out, _ = megazh("--help")
    assert code == 0
    assert all(group in out for group in ("index", "tokenizer"))
    for group in ("index", "tokenizer"):
        code, out, _ = megazh(group, "--help")
        assert code == 0
        assert all(name in out for known, name in COMMANDS if known == group)


def test_version() -> None:
    code, out, _ = megazh("--version")
    assert code == 0
    assert re.fullmatch(r"megazh \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("index",),
        ("index", "build"),
        ("index", "build", "--inptu", "x"),
        ("index", "inspect", "a", "--document", "x"),
        ("index", "inspect", "a", "--tokens", "0"),
        ("tokenizer", "train", "--input", "a", "--output", "b.json", "--vocab-size", "-5"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    code, out, err = megazh(*arguments)
    assert (code, out) == (2, "")
    assert "usage: megazh" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("given", ["-0.1", "1.5", "101%", "nan", "x", "%"])
def test_share_of_bad_records_must_be_a_share(corpus: Path, tmp_path: Path, given: str) -> None:
    code, _, err = build(corpus, tmp_path / "x", f"--max-bad={given}")
    assert code == 2
    assert "expected a share between 0 and 1, or a percentage" in err


@pytest.mark.parametrize(("given", "code"), [("0.02", 0), ("2%", 0), ("0.019", 3), ("1.9%", 3)])
def test_share_of_bad_records_as_number_or_percentage(corpus: Path, tmp_path: Path, given: str, code: int) -> None:
    corpus.write_bytes(json_lines(texts(49)) + b"broken\n")
    found, out, err = build(corpus, tmp_path / "x", "--max-bad", given)
    assert found == code, err
    if code:
        assert is_one_line_error(err, "1 of 50 records are bad", "a.jsonl line 50")
    else:
        assert "rejected   1 (broken JSON 1)" in out


def test_summary_tells_what_is_there(corpus: Path, tmp_path: Path) -> None:
    code, out, err = build(corpus, tmp_path / "x")
    assert (code, err) == (0, "")
    for part in ("index ", "uint16", "documents  50", "tokens ", "bytes", "MB/s", "fastokens", "checked against"):
        assert part in out, part
    code, out, _ = build(corpus, tmp_path / "x")
    assert code == 0
    assert "complete already" in out


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        ({"--input": "nowhere/*.jsonl"}, 2, "no file matches"),
        ({"--tokenizer": "nowhere.json"}, 2, "no such file"),
        ({"--eod": "<|nowhere|>"}, 2, "--eod"),
        ({"--text-key": "body"}, 3, "missing key"),
        ({"--format": "parquet"}, 3, "holds text, not parquet"),
        ({"--output": "."}, 2, "is a folder"),
        ({"--output": "x.bin"}, 2, "without .bin"),
    ],
)
def test_errors_are_one_line_with_their_code(
    corpus: Path, tmp_path: Path, change: dict[str, str], code: int, part: str
) -> None:
    options = {"--input": corpus, "--tokenizer": tokenizer_path(), "--output": tmp_path / "x", **change}
    found, out, err = megazh("index", "build", *(word for pair in options.items() for word in pair))
    assert (found, out) == (code, ""), err
    assert is_one_line_error(err, part), err
    assert not (tmp_path / "x.idx").exists()


def test_wrong_format_does_not_stand_in_the_way_of_the_right_one(corpus: Path, tmp_path: Path) -> None:
    """A build that failed before its first piece has nothing worth keeping."""
    assert build(corpus, tmp_path / "x", "--format", "parquet")[0] == 3
    code, _, err = build(corpus, tmp_path / "x")
    assert (code, err) == (0, "")


def test_tool_gives_the_same_bytes_as_the_command(corpus: Path, tmp_path: Path) -> None:
    assert build(corpus, tmp_path / "x")[0] == 0
    arguments = ("--input", corpus, "--text-key", "text", "--tokenizer", tokenizer_path(), "--output", tmp_path / "y")
    code, out, err = finish(start(sys.executable, ROOT / "tools" / "index_dataset.py", *arguments))
    assert (code, err) == (0, "")
    assert "documents  50" in out
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "y")
    code, out, _ = finish(start(sys.executable, ROOT / "tools" / "index_dataset.py", "--help"))
    assert code == 0
    assert "examples:" in out


def test_inputs_may_be_given_in_several_ways(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts(5, ord(name))))
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    assert build(a, tmp_path / "x", "--input", c, b)[0] == 0
    assert build(f"{tmp_path}/*.jsonl", tmp_path / "y")[0] == 0
    assert index_bytes(tmp_path / "x") == index_bytes(tmp_path / "y")


def test_reader_of_a_pipe_that_goes_away_is_no_error(corpus: Path, tmp_path: Path) -> None:
    assert build(corpus, tmp_path / "x")[0] == 0
    process = start_megazh("index", "inspect", tmp_path / "x", "--document", "0")
    process.stdout.close()
    try:
        process.wait(30)
        assert process.stderr.read() == ""
    finally:
        kill_group(process)
        process.stderr.close()


def test_ctrl_c_while_the_input_is_hashed_does_not_wait_for_the_end(tmp_path: Path) -> None:
    """A sparse file of 60 GB takes half a minute or more to hash."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(json_lines(["x"]))
        file.truncate(60 << 30)
    arguments = ("--input", path, "--tokenizer", tokenizer_path(), "--output", tmp_path / "x", "--workers", 1)
    process = start_megazh("index", "build", *arguments)
    end = time.monotonic() + 20
    while not (tmp_path / "x.build" / "lock").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process, timeout=10)
    assert code == 130
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x.build").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("sample", "runs/x", "-abc"), "'-abc' looks like an option"),
        (("index", "build", "--eod", "-x"), "'-x' looks like an option"),
        (("pretrain", "-n", "2", "-abc"), "'-abc' looks like an option"),
        (("pretrain", "-n", "2", "-p1", "--inptu"), ""),
        (("sample", "runs/x"), ""),
    ],
)
def test_text_that_begins_with_a_dash_is_explained(words: tuple[str, ...], hint: str) -> None:
    code, _, err = megazh(*words)
    assert code == 2
    assert ("looks like an option" in err) == bool(hint)
    assert hint in err


def test_a_setting_that_the_shell_has_split_is_shown_quoted() -> None:
    code, _, err = megazh("pretrain", "steps=60", "schedule.batch={0:", "16,", "100K:", "32}", "warmup=5")
    assert code == 2
    assert err.endswith("error: a setting in several words: quote it: 'schedule.batch={0: 16, 100K: 32}'\n")
    code, _, err = megazh("pretrain", "sample_prompts=[a]", "32]")
    assert "unrecognized arguments: sample_prompts=[a] 32]" in err


@pytest.mark.parametrize("words", [("-你好",), ("--“好”",), ("--", "-abc")])
def test_text_that_begins_with_a_dash_is_text(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, _, err = megazh("sample", tmp_path, *words)
    assert (code, err.partition(" (")[0]) == (2, f"error: {tmp_path}: no run"), "the folder is looked at, not the text"
