"""`megazh sft`: its options, output and refusals."""

import json
from pathlib import Path

import pytest
from textdata import tokenizer_path

from megazh.cli import main


def sft(capfd: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh sft WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["sft", *map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of five conversations, the second half of it in need of a cut."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"instruction": "{at}", "output": "{"答" * 9 * at}"}}\n' for at in range(1, 6)))
    return path


def test_preview(rows: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("preview", rows, "--tokenizer", tokenizer_path())
    code, out, err = sft(capfd, *words, "-n", "1", "--max-tokens", "60")
    assert (code, err) == (0, "")
    assert out.startswith("⟦⟧ stand around trained tokens\n\n--- 1. files: rows.jsonl row 1: ")
    assert "\nset            files: 5 conversations\n" in out
    assert out.count("--- ") == 1
    _, limited, _ = sft(capfd, *words, "-n", "0", "--limit", "2")
    assert "\nset            files: 2 conversations\n" in limited
    assert "--- " not in limited
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;32m" in sft(capfd, *words, "--color", "always")[1]


def test_preview_as_a_page(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    code, out, err = sft(capfd, "preview", rows, "--tokenizer", tokenizer_path(), "--html", page)
    assert (code, out, err) == (0, f"{page}: 3 conversations, counts of 5\n", "")
    assert page.read_text(encoding="utf-8").count("<pre>") == 3


def test_preview_of_a_registry_keeps_its_limits(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    registry = tmp_path / "sets.yaml"
    registry.write_text(f"a: {{file_name: {rows}, num_samples: 3}}\nb: {{file_name: {rows}}}\n")
    _, out, _ = sft(capfd, "preview", registry, "--tokenizer", tokenizer_path(), "--limit", "4")
    assert "set            a: 3 conversations\nset            b: 4 conversations\n" in out


def test_a_page_replaces_pages_only(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = rows.read_bytes()
    code, out, err = sft(capfd, "preview", rows, "--tokenizer", tokenizer_path(), "--html", rows)
    assert (code, out) == (2, "")
    assert err == f"error: --html {rows}: exists, and is no .html file; give another name for the page\n"
    assert rows.read_bytes() == before
    (tmp_path / "page.html").write_text("old")
    assert sft(capfd, "preview", rows, "--tokenizer", tokenizer_path(), "--html", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize("command", [["preview"], ["convert", "-o", "out"]])
def test_columns_of_other_names_have_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "问", "answer": "答"}\n' * 2)
    _, out, err = sft(capfd, *command, "rows.jsonl", "--tokenizer", tokenizer_path())
    assert (
        "rows.jsonl line 1: no 'instruction'; keys: question, answer; name the columns of these rows in a registry "
        "(columns: {prompt: ..., response: ...})\n"
    ) in out + err


def test_an_interrupted_conversion_begins_anew(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megazh.finetune.convert.write_manifest", interrupt)
    code, out, err = sft(capfd, "convert", rows, "--tokenizer", tokenizer_path(), "-o", tmp_path / "out")
    assert (code, out, err) == (130, "", "interrupted; nothing is kept of it: the same command begins anew\n")
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_broken_file_is_shown_and_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "问", "output": "答"}] * 4)[:-20])
    code, out, err = sft(capfd, "preview", path, "--tokenizer", tokenizer_path())
    assert (code, err.count("\n")) == (3, 1)
    assert "3 to train on" in out
    assert "the 3 rows before it were read" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.json"], "error: none.json: no such file or folder"),
        (["rows.jsonl", "--template", "none"], "error: --template none: neither chatml, human-assistant nor a file"),
        (["rows.jsonl", "--max-tokens", "1"], "error: --max-tokens 1: expected at least 2"),
        (["rows.jsonl", "--html", "rows.jsonl/a.html"], "error: --html rows.jsonl/a.html: cannot be made"),
    ],
)
def test_refused_in_one_line(
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(rows.parent)
    code, out, err = sft(capfd, "preview", *words, "--tokenizer", tokenizer_path())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)
