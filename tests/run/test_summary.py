"""The closing lines of a complete run, compared with numbers worked out by hand."""

import shlex
from pathlib import Path

import pytest
from made_runs import make_run, write_metrics, write_recipe

from megazh.program import program
from megazh.run.folder import RunFolder
from megazh.run.summary import describe_end

LONGER, ANEW = "the longer one", "the new one"


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A complete run of six steps."""
    found = make_run(tmp_path / "a run", write_recipe(tmp_path / "mini.yaml", stories))
    write_metrics(found, 6, seconds=0.5)
    return found


def closing_lines(run: RunFolder) -> list[str]:
    """The lines of a run whose steps of 256 tokens take half a TFLOP each."""
    return list(describe_end(run, 6, 0.5e12 / 256, ["sample", str(run.path), "it's 从前"], LONGER, ANEW))


def test_end_of_a_run(run: RunFolder) -> None:
    lines = closing_lines(run)
    assert lines[1:] == [
        f"{run.path}: complete, 6 steps",
        "loss        4.0000 at step 1, 1.5000 at the end",
        "validation  5.0000 before, 2.5000 after; 4.000 and 2.000 bits per byte",
        "sample      after step 6: 问1|二 二",
        "sample      after step 6: 问2|三",
        f"plot        {run.plot}",
        "time        3 s in 6 steps, 3.0 TFLOP",
        "",
        "go on:",
        lines[-4],
        lines[-3],
        f"  {LONGER}    # train on, twice as long",
        f"  {ANEW}    # start another run",
    ]
    assert shlex.split(lines[-4])[-3:] == ["sample", str(run.path), "it's 从前"], "quoted for a shell"
    assert lines[-4].startswith(f"  {program()} ")
    assert shlex.split(lines[-3])[-2:] == ["--logdir", str(run.path / "tensorboard")]
    assert lines[-3].startswith(f"  {program('tensorboard', 'tensorboard.main')} ")
    assert run.plot.read_bytes().startswith(b"\x89PNG")


def test_end_of_a_run_without_validation(run: RunFolder) -> None:
    metrics = run.path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"kind": "validation"' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    lines = closing_lines(run)
    assert not any(line.startswith("validation") for line in lines)
    assert "loss        4.0000 at step 1, 1.5000 at the end" in lines


def test_a_plot_that_cannot_be_written_is_a_warning(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAZH_WARNED", "")
    (run.plot / "in the way").mkdir(parents=True)
    lines = closing_lines(run)
    assert not any(line.startswith("plot") for line in lines)
    assert "go on:" in lines
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {run.plot}: cannot be written: Is a directory; ")


def test_skipped_steps_are_counted(run: RunFolder) -> None:
    metrics = run.path / "metrics.jsonl"
    text = metrics.read_text().replace('"skipped": false', '"skipped": true', 3)
    metrics.write_text(text.replace('"grad_norm": 1.0', '"grad_norm": "inf"', 1))
    assert "skipped     3 of 6 steps: 1 not finite, 2 spikes" in closing_lines(run)


def test_without_metrics_the_run_is_complete_all_the_same(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").unlink()
    assert closing_lines(run)[1:] == [
        f"{run.path}: complete, 6 steps",
        f"metrics     no steps are in {run.path / 'metrics.jsonl'}",
    ]
