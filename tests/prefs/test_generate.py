"""Rejected answers from a model: what is asked, what is kept, what an interruption costs. The model is untrained."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import add_checkpoint, make_run, write_recipe

from megazh.errors import BusyError, DataError, UsageError
from megazh.model.sampling import SamplingOptions
from megazh.prefs.files import only_writer
from megazh.prefs.forms import Template
from megazh.prefs.generate import Request, generate, row_seed
from megazh.run.folder import RunFolder
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.training.recipe import run_recipe
from megazh.training.text_model import TextModel, open_model

ROWS = [{"instruction": f"讲故事{number}", "input": "", "output": f"从前{number}"} for number in range(6)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> RunFolder:
    """A run with a checkpoint of step 6, which tests only read."""
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder / "run", write_recipe(folder / "mini.yaml", stories, model={"vocab_size": 4096}))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of `ROWS`."""
    path = tmp_path / "rows.jsonl"
    write(path, ROWS)
    return path


def write(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def request(run: RunFolder, rows: Path, output: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": 12, "device": "cpu", **changes}
    return Request(run.path, [str(rows)], output, **values)


def said(asked: Request) -> list[str]:
    found: list[str] = []
    generate(asked, found.append)
    return found


def test_the_answer_of_the_data_is_chosen_and_the_models_own_is_rejected(
    run: RunFolder, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "prefs.jsonl"
    lines = said(request(run, rows, output))
    found = read(output)
    assert lines[0].startswith(f"{output}: {len(found)} rows of prompt, chosen (the data's answer), rejected")
    assert 4 <= len(found) <= 6, "an untrained model seldom ends at once"
    model = open_model(run.path, None, "cpu")
    for row in found:
        number = int(row["prompt"].removeprefix("讲故事").removesuffix("\n"))
        own = model.stream(row["prompt"], 12, SamplingOptions(top_p=0.95), row_seed(0, number))
        assert row == {"prompt": f"讲故事{number}\n", "chosen": f"从前{number}", "rejected": "".join(own).strip()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefs.jsonl", "rows.jsonl"]


def test_an_exported_folder_gives_the_answers_of_its_run(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    export_to_hf(find_model(run.path), tmp_path / "hf", ExportOptions())
    said(request(run, rows, tmp_path / "run.jsonl"))
    generate(Request(tmp_path / "hf", [str(rows)], tmp_path / "hf.jsonl", max_tokens=12, device="cpu"), print)
    assert (tmp_path / "hf.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes()


def test_another_command_for_the_same_output_is_refused(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "prefs.jsonl"
    with only_writer(output), pytest.raises(BusyError, match="another command writes it"):
        said(request(run, rows, output))
    said(request(run, rows, output))


def test_a_seed_gives_an_answer(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        said(request(run, rows, tmp_path / f"{name}.jsonl", seed=seed))
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_an_interrupted_command_goes_on_after_the_last_answer(
    run: RunFolder, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(request(run, rows, tmp_path / "whole.jsonl"))
    output, partial, asked = tmp_path / "prefs.jsonl", tmp_path / "prefs.jsonl.partial", []
    stream: Callable[..., Iterator[str]] = TextModel.stream

    def counted(self: TextModel, prompt: str, *others: Any) -> Iterator[str]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(prompt)
        return stream(self, prompt, *others)

    monkeypatch.setattr(TextModel, "stream", counted)
    with pytest.raises(KeyboardInterrupt):
        said(request(run, rows, output))
    assert not output.exists()
    assert len(read(partial)) == 1 + 3
    with open(partial, "ab") as file:
        file.write(b'{"outcome": "pa')  # as a killed process leaves it
    monkeypatch.setattr(TextModel, "stream", stream)
    assert said(request(run, rows, output))[0] == f"{partial}: 3 of 6 rows are answered already; going on after them"
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_answers_of_other_settings_are_not_mixed(
    run: RunFolder, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "prefs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("megazh.prefs.generate._finish", lambda *_: None)  # as if it had been interrupted at the end
        said(request(run, rows, output))
    for changes, name in (
        ({"seed": 1}, "seed 0, and this command has 1"),
        ({"max_tokens": 9}, "max_tokens 12, and this command has 9"),
        ({"template": Template("{instruction}")}, "template"),
    ):
        with pytest.raises(UsageError, match=name):
            said(request(run, rows, output, **changes))
    other = make_run(tmp_path / "run", run.path.parent / "mini.yaml")
    add_checkpoint(other, run_recipe(other), 12)
    with pytest.raises(UsageError, match=r"begun with model .*--force to begin anew"):
        said(request(other, rows, output))
    said(request(run, rows, output, seed=1, overwrite=True))
    said(request(run, rows, tmp_path / "same.jsonl", seed=1))
    assert output.read_bytes() == (tmp_path / "same.jsonl").read_bytes()


def test_what_gives_no_pair_is_counted(run: RunFolder, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "prefs.jsonl"
    write(rows, ROWS[:1])
    said(request(run, rows, output))
    own = read(output)[0]["rejected"]
    long = {"instruction": "很长的问题" * 30, "output": "短"}
    write(rows, [{**ROWS[0], "output": f"{own}\n"}, long, {"instruction": "没有回答"}, *ROWS[:2]])
    lines = said(request(run, rows, output, overwrite=True))
    assert lines == [
        f"{output}: 2 rows of prompt, chosen (the data's answer), rejected (the model's own)",
        "dropped: 1 answers that are equal to the data's",
        "dropped: 1 prompts as long as what the model was trained on at a time, or longer",
        "2 answers end at --max-tokens, or at the length that the model was trained on",
        f"{tmp_path}/prefs.rejected.jsonl: 1 rejected rows: 1 missing key",
    ]
    assert len(read(output)) == 2


def test_no_answer_at_all_is_an_error(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    """The most likely continuation of an untrained model is its last token, here a line break, again and again."""
    output = tmp_path / "prefs.jsonl"
    with pytest.raises(DataError, match="no row to write: 6 answers are empty, 0 are equal"):
        said(request(run, rows, output, sampling=SamplingOptions(temperature=0)))
    assert not output.exists()


def test_a_limit_counts_good_rows(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    write(rows, [{"text": "一篇文章"}, *ROWS])
    output = tmp_path / "prefs.jsonl"
    said(request(run, rows, output, limit=2, sampling=SamplingOptions(temperature=2)))
    assert [row["chosen"] for row in read(output)] == ["从前0", "从前1"]


def test_refused_before_a_model_is_opened(run: RunFolder, rows: Path, tmp_path: Path) -> None:
    nothing = Request(tmp_path / "none", [str(rows)], tmp_path / "prefs.jsonl")
    write(rows, [{"text": "一篇文章"}])
    with pytest.raises(DataError, match="no row with a prompt and an answer in the input: 1 missing key; first: rows"):
        said(nothing)
    write(rows, ROWS)
    (tmp_path / "prefs.jsonl").write_text("kept")
    with pytest.raises(UsageError, match="is there already"):
        said(nothing)
    with pytest.raises(UsageError, match="no run"):
        said(Request(tmp_path / "none", [str(rows)], tmp_path / "new.jsonl"))
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(ROWS)[:-30])
    with pytest.raises(DataError, match="broken JSON at record 6"):
        said(Request(tmp_path / "none", [str(array)], tmp_path / "new.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefs.jsonl", "rows.json", "rows.jsonl"]
