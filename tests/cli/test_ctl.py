"""`megazh ctl` without a run that runs; tests/training/test_commands.py controls one."""

import json
from pathlib import Path

import pytest
from made_runs import make_run, write_metrics, write_recipe

from megazh.cli import main
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
        (["RUN", "sample"], "required: text"),
        (["RUN", "set"], "required: KEY=VALUE"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    words = [str(run.path), *words[1:]] if words[0] == "RUN" else [str(tmp_path / "nothing"), *words]
    code, out, err = call(capsys, *words)
    assert (code, out, reason in err) == (2, "", True), err
