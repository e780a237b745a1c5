"""`megazh plot` on runs with a few steps."""

import sys
from pathlib import Path

import pytest
from made_runs import write_metrics
from processes import Finished, run_command

from megazh.errors import UsageError
from megazh.run.folder import RunFolder


def plot(folder: Path, *words: str) -> Finished:
    """Run `megazh plot WORDS` in a folder with the runs 深 and 宽."""
    for name in ("深", "宽"):
        if not (folder / name).exists():
            write_metrics(RunFolder(folder / name), 20)
    return run_command([sys.executable, "-m", "megazh", "plot", *words], 60, cwd=folder)


def test_draws_runs_by_default_to_a_png_here(tmp_path: Path) -> None:
    finished = plot(tmp_path, "深", "宽", "--y", "bits", "--smooth", "5", "--x-range", "1k", "4k")
    assert finished.returncode == 0, finished
    note, name = finished.stdout.splitlines()
    assert note.startswith("note: bits per byte of training are its loss times")
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert name == "plot.png"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nothing"], "error: nothing/metrics.jsonl: no such file"),
        (["深", "-o", "x.gif"], "error: x.gif: a plot is a PNG or an SVG; name it .png or .svg"),
        (["深", "-o", "none/x.png"], "error: -o none/x.png: none is no folder; make it first"),
        (
            ["深", "--x-range", "1M", "2M"],
            "error: --x-range 1e+06 2e+06: no step is there: the tokens of the steps are 256",
        ),
        (["深", "--smooth", "few"], "error: --smooth few: expected auto"),
        (["深", "--y-range", "3", "2"], "error: --y-range 3 2: expected a smaller and a larger number"),
        (["深", "--log-y", "--y-range", "0", "2"], "error: --y-range 0 2: a logarithmic axis has no 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, words: list[str], error: str) -> None:
    finished = plot(tmp_path, *words)
    assert finished.returncode == UsageError.exit_code
    assert finished.stderr.startswith(error)
    assert len(finished.stderr.splitlines()) == 1
