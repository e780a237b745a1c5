"""`megazh ctl` without a run that runs; tests/training/test_commands.py controls one."""

import json
from pathlib import Path

import pytest
from made_runs import make_run, write_metrics, write_recipe

from megazh.cli import main
from megazh.errors import BusyError
from megazh.run.folder import RunFolder


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A complete run of six steps."""
    folder = make_run(tmp_path / "run", write_recipe(tmp_path / "recipe.yaml", stories))
    write_metrics(folder, 6)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh ctl WORDS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["ctl", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_status_of_a_run_that_has_ended(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, str(run.path), "status")
    assert (code, err) == (0, "")
    assert "state       complete" in out.splitlines()
    code, out, _ = call(capsys, str(run.path), "status", "--json")
    assert (code, json.loads(out)["state"]) == (0, "complete")


@pytest.mark.parametrize(
    "words", [["save"], ["validate"], ["pause"], ["resume"], ["stop"], ["sample", "从前"], ["set", "keep_last=1"]]
)
def test_a_run_that_has_ended_takes_no_commands(
    run: RunFolder, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, out, err = call(capsys, str(run.path), *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {run.path}: is not running: start it first ('")
    assert not run.control.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["status"], "not the folder of a run"),
        (["save"], "not the folder of a run"),
        (["RUN", "sample", "a", "--seed", "-1"], "ctl sample: key 'seed'"),
        (["RUN", "sample", "a", "--temperature", "nan"], "ctl sample: key 'temperature'"),
        (["RUN", "sample", "字" * 90_000], "the request has 270,"),
        (["RUN", "sample", "\udcff"], "the text is not valid UTF-8"),
        (["RUN", "launch"], "invalid choice: 'launch'"),
        (["RUN", "stauts"], "did you mean 'status'?"),
        (["RUN", "save", "--wait", "abc"], "expected a whole number of at least 1, found abc"),
        (["RUN", "save", "--sooon"], "ctl RUN save: error: unrecognized arguments: --sooon"),
        (["RUN", "watch", "--once", "--json"], "watch has no --json: '"),
        (
            ["RUN", "set", "learning_rate"],
            "set learning_rate: no value: expected KEY=VALUE, such as learning_rate=",
        ),
        (["RUN/config.yaml", "status"], "config.yaml: a file, not the folder of a run; give the folder: "),
        (["RUN/config.yaml", "save"], "config.yaml: a file, not the folder of a run; give the folder: "),
        (["RUN", "sample"], "required: text"),
        (["RUN", "set"], "required: KEY=VALUE"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    if words[0].startswith("RUN"):
        words = [words[0].replace("RUN", str(run.path)), *words[1:]]
    else:
        words = [str(tmp_path / "nothing"), *words]
    code, out, err = call(capsys, *words)
    assert (code, out, reason in err) == (2, "", True), err


@pytest.mark.parametrize("words", [["status"], ["save"], ["set", "keep_last"], ["sample", "a", "--seed", "-1"]])
def test_with_json_a_refusal_is_json_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text("schedule: {}\n")
    folder = tmp_path / "none" if words == ["status"] else tmp_path
    code, out, err = call(capsys, str(folder), *words, "--json")
    values = json.loads(out)
    assert (code, values["outcome"], values["exit_code"]) == (2, "refused", 2)
    assert err == f"error: {values['text']}\n"


def test_with_json_a_failure_is_json_as_well(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise BusyError("no answer within 1 s")

    monkeypatch.setattr("megazh.run.requests.ask", busy)
    code, out, err = call(capsys, str(run.path), "save", "--json")
    assert (code, err) == (4, "error: no answer within 1 s\n")
    assert json.loads(out) == {"outcome": "failed", "text": "no answer within 1 s", "exit_code": 4}
