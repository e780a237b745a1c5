"""`megazh prefs`: its options, output and refusals; an interruption."""

import json
import signal
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from processes import run_command, start_command, wait_until

from megazh.cli import main

PAIR = {"instruction": "写诗", "input": "春天", "chosen": "好", "rejected": "坏"}


def prefs(capfd: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh prefs WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["prefs", *map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_convert_with_a_template_and_in_messages(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "a.json", tmp_path / "prefs.jsonl"
    source.write_text(json.dumps([PAIR, {**PAIR, "chosen": ""}], ensure_ascii=False), encoding="utf-8")
    words = ("convert", source, "--to", output)
    code, out, err = prefs(capfd, *words, "--template", r"问：{instruction}\n{input}\n答：")
    assert (code, err) == (0, "")
    assert out == (
        f"{output}: 1 rows of prompt, chosen, rejected\n"
        f"{tmp_path}/prefs.rejected.jsonl: 1 rejected rows: 1 empty answer\n"
    )
    assert json.loads(output.read_text(encoding="utf-8"))["prompt"] == "问：写诗\n春天\n答："
    code, _, err = prefs(capfd, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "is there already; give another name, or --force to replace it" in err
    assert prefs(capfd, *words, "--form", "messages", "--force")[0] == 0
    assert json.loads(output.read_text(encoding="utf-8"))["prompt"] == [{"role": "user", "content": "写诗\n春天"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "none.json", "--to", "o.jsonl"], "error: none.json: no such file or folder\n"),
        (["convert", "a.json", "--to", "o.jsonl", "--template", "x"], "error: --template 'x': lacks {instruction}\n"),
        (
            ["generate", "run", "a.json", "--to", "o.jsonl", "--temperature", "-1"],
            "error: temperature -1.0: expected at",
        ),
        (["generate", "run", "a.json", "--to", "o.txt"], "error: --to o.txt: expected a name that ends in .jsonl\n"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([PAIR]))
    code, out, err = prefs(capfd, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


@pytest.mark.slow
def test_ctrl_c_keeps_the_answers_and_the_same_command_goes_on(tmp_path: Path, stories: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories, seq_len=512))
    rows, output, partial = tmp_path / "rows.jsonl", tmp_path / "prefs.jsonl", tmp_path / "prefs.jsonl.partial"
    row = json.dumps({"instruction": "讲故事", "output": "从前"}, ensure_ascii=False)
    rows.write_text(f"{row}\n" * 60, encoding="utf-8")
    words = ["-m", "megazh", "prefs", "generate", run.path, rows, "--to", output, "--device", "cpu", "--max-tokens", 40]
    command = [sys.executable, *map(str, words)]
    with start_command(command) as running:
        wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 3, 60, "the first answers")
        running.process.send_signal(signal.SIGINT)
        ended = running.wait(60)
    assert ended.returncode == 130, ended.stderr
    assert "run the same command again to continue" in ended.stderr
    kept = partial.read_bytes()
    finished = run_command(command, 120)
    assert finished.returncode == 0, finished.stderr
    answered = kept[: kept.rindex(b"\n")].count(b"\n")
    assert f"{answered} of 60 rows are answered already; going on after them" in finished.stdout
    assert 50 < output.read_bytes().count(b"\n") <= 60, "an untrained model seldom ends at once"
