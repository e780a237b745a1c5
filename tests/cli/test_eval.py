"""`megazh eval`: its tables, figures and refusals, with an untrained model."""

import json
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from textdata import json_lines

from megazh.cli import main
from megazh.run.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> RunFolder:
    """A run of a model that was trained on 32 tokens at a time."""
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder / "run", write_recipe(folder / "mini.yaml", stories))


def evaluate(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh eval WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_passkey(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "passkey.json"
    words = ("passkey", run.path, "--lengths", "400", "--depths", "0", "100", "--languages", "zh", "--tries", "1")
    code, out, _ = evaluate(capfd, *words, "--batch-size", "2", "--json", figures)
    assert code == 0
    first, head, row = out.splitlines()
    assert first == f"{run.path}: trained on 32 tokens at a time"
    assert head.split() == ["zh,", "depth", "0", "%", "100", "%", "all"]
    assert row.split() == ["400", "0/1", "0/1", "0/2"]
    found = json.loads(figures.read_text())
    assert (found["trained_length"], found["seed"], len(found["questions"])) == (32, 0, 2)
    assert evaluate(capfd, *words)[1] == out
    code, _, err = evaluate(capfd, "passkey", run.path, "--lengths", "20")
    assert (code, err.count("\n")) == (2, 1)
    assert "--lengths 20: the question alone has" in err


def test_position_loss(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, figures = tmp_path / "books.jsonl", tmp_path / "losses.json"
    data.write_bytes(json_lines(["短", "从前有一座山，山里有一座庙。" * 20, "春天来了，花开了。" * 30]))
    words = ("position-loss", run.path, data, "--bounds", "32", "64", "128", "--json", figures)
    code, out, _ = evaluate(capfd, *words)
    assert code == 0
    lines = out.splitlines()
    assert lines[1] == f"{data}: 2 of 3 documents have 128 tokens or more"
    assert [line.split()[0] for line in lines[3:]] == ["0-32", "32-64", "64-128"]
    found = json.loads(figures.read_text())
    assert (found["documents"], found["documents_read"]) == (2, 3)
    assert [each["tokens"] for each in found["ranges"]] == [62, 64, 128]
    code, _, err = evaluate(capfd, "position-loss", run.path, data)
    assert code == 2
    assert "none of 3 documents has 8,192 tokens" in err
    assert evaluate(capfd, "position-loss", run.path, data, "--bounds", "1", "8")[2] == (
        "error: --bounds 1: the first token has no loss; give at least 2\n"
    )
    _, _, err = evaluate(capfd, "position-loss", run.path, data, "--text-key", "content")
    assert err == f"error: {data}: holds no document; of rows, --text-key names the key of the text\n"


@pytest.mark.parametrize("what", [["passkey"], ["position-loss"]])
def test_figures_replace_figures_only_and_that_is_known_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: list[str]
) -> None:
    data = tmp_path / "books.jsonl"
    data.write_bytes(json_lines(["从前"]))
    words = [*what, tmp_path / "no-model", *([data] if "loss" in what[0] else [])]
    for path, reason in ((data, "exists, and is no .json file"), (data / "a.json", "cannot be made")):
        code, out, err = evaluate(capfd, *words, "--json", path)
        assert (code, out, err.startswith(f"error: --json {path}: {reason}")) == (2, "", True), err
    assert data.read_bytes() == json_lines(["从前"])
