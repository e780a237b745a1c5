"""`megazh slurm status` against the jobs of a private Slurm cluster, and its forecast in numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run, write_metrics, write_recipe
from slurm_cluster import SlurmCluster

from megazh.cli import main
from megazh.cluster.slurm.status import LEAD_SECONDS, forecast
from megazh.files import locked
from megazh.run.folder import RunFolder

HOUR = 3600.0


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run that stands at step 3 of 12."""
    folder = make_run(tmp_path / "runs" / "it's", write_recipe(tmp_path / "recipe.yaml", stories, steps=12), step=3)
    write_metrics(folder, 3, eta_seconds=5 * HOUR)
    return folder


def began_in(run: RunFolder, job: str) -> None:
    """Have the newest attempt of a run say that it began in a job."""
    path = run.path / "run.json"
    values = json.loads(path.read_text())
    values["attempts"][-1]["job"] = job
    path.write_text(json.dumps(values))


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh slurm status WORDS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "status", *map(str, words)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


class Jobs:
    """Jobs that sleep, on the cluster."""

    def __init__(self, slurm: SlurmCluster, folder: Path) -> None:
        self.slurm = slurm
        self._script = folder / "sleep.sh"
        self._script.write_text('#!/bin/bash\nsleep "$1"\nexit "$2"\n')

    def start(self, seconds: float, code: int, *options: str) -> str:
        """Submit a job that ends with a code after some seconds; returns its number."""
        words = ["sbatch", "--parsable", "--output=/dev/null", *options, str(self._script), str(seconds), str(code)]
        finished = self.slurm.run(*words)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.strip()


@pytest.fixture
def jobs(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Jobs of a cluster that this process sees."""
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    return Jobs(slurm, tmp_path)


@pytest.mark.slurm
def test_a_job_that_waits_says_why(jobs: Jobs, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    held = jobs.start(0, 0, "--hold", "--job-name=a | b\x1fc")
    began_in(run, held)
    code, out, err = call(capsys, run.path)
    assert (code, err) == (0, "")
    assert out.startswith(f"job         {held}: PENDING in partition gpu: JobHeldUser\nrun         {run.path}\n")
    assert "step        3 of 12" in out
    assert jobs.slurm.run("scancel", held).returncode == 0


@pytest.mark.slurm
def test_a_run_that_has_not_begun_has_the_job_of_its_chain(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "new"
    code, out, err = call(capsys, run, "--json")
    assert (code, json.loads(out)["outcome"]) == (2, "refused")
    assert (
        err
        == f"error: {run}: no run, and no chain has submitted one; its job is known once it has begun, or by --job N\n"
    )
    held = jobs.start(0, 0, "--hold")
    entry = {"stage": "pretrain", "job": held, "command": [], "result": "runs/new", "time": ""}
    run.parent.mkdir()
    (run.parent / "c.chain.json").write_text(json.dumps({"jobs": [entry]}))
    assert f"job         {held}: PENDING in " in call(capsys, run)[1]
    assert jobs.slurm.run("scancel", held).returncode == 0
    (run.parent / "c.chain.json").write_text('{"jobs": [{"stage": "dinner"}]}')
    code, _, err = call(capsys, run)
    assert (code, "c.chain.json: damaged: " in err) == (3, True)


@pytest.mark.slurm
def test_a_job_that_runs_and_its_forecast(jobs: Jobs, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = (jobs.start(60, 0, f"--time={limit}") for limit in ("1-00:00:00", "2:00:00"))
    for job in (long, short):
        jobs.slurm.wait_job_state(job, "RUNNING")
    with locked(run.lock):
        code, out, err = call(capsys, run.path, "--job", long)
        assert (code, err) == (0, "")
        assert re.match(
            rf"job         {long}: RUNNING on n\d in partition gpu, 2(3:59|4:00):\d\d left \(time limit 24:00:00\)\n",
            out,
        )
        assert re.search(r"^forecast    complete 1[89]:\d\d:\d\d before the time limit$", out, re.MULTILINE)
        began_in(run, short)
        values = json.loads(call(capsys, run.path, "--json")[1])
        assert (values["job"], values["slurm"]["state"], values["status"]["step"]) == (short, "RUNNING", 3)
        # 5 hours, of which 1:50 are left, and each further start has 1:50.
        assert values["forecast"] == {"in_time": False, "spare_seconds": None, "requeues": 2}
    assert jobs.slurm.run("scancel", long, short).returncode == 0


@pytest.mark.slurm
def test_a_job_that_has_ended_says_how(jobs: Jobs, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    failing, cancelled = jobs.start(0, 3), jobs.start(0, 0, "--hold")
    assert jobs.slurm.run("scancel", cancelled).returncode == 0
    assert (jobs.slurm.wait_job(failing), jobs.slurm.wait_job(cancelled)) == ("FAILED", "CANCELLED")
    began_in(run, failing)
    out = call(capsys, run.path)[1]
    assert re.match(rf"job         {failing}: ended as FAILED with exit code 3 on n\d \(NonZeroExitCode\)\n", out)
    assert re.match(rf"job         {cancelled}: ended as CANCELLED", call(capsys, run.path, "--job", cancelled)[1])
    out = call(capsys, run.path, "--job", "999999")[1]
    assert out.startswith("job         999999: Slurm no longer knows it; ")


@pytest.mark.slurm
def test_a_run_outside_of_slurm_and_wrong_numbers(
    jobs: Jobs, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, run.path)[1].startswith("job         none: the newest start of this run was outside of Slurm")
    for number in ("-1", "1;id", "1_2_3", "", "all", "1" * 11):
        code, out, err = call(capsys, run.path, f"--job={number}")
        assert (code, out) == (2, "")
        assert "not the number of a Slurm job" in err


def test_without_slurm_it_is_one_line(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = call(capsys, run.path)
    assert (code, out) == (2, "")
    assert err == ("error: no Slurm on this machine: squeue is not in PATH; call this on a login node of the cluster\n")


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ("17\x1fRUNNING\x1f\n", "squeue answered in a form that this version does not know: '17 RUNNING'"),
        ("RUNNING 17\n", "squeue answered in a form"),
        ("\x1f".join(["17", "RUNNING", "soon", *"abcdefghi", ""]) + "\n", "squeue answered in a form"),
    ],
)
def test_answers_that_are_not_squeues(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    answer: str,
    part: str,
) -> None:
    (tmp_path / "answer").write_text(answer)
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done < '{tmp_path}/answer'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call(capsys, run.path, "--job", "17")
    assert (code, part in err) == (3, True), err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("17|COMPLETED|0:0|n1|a|b", "ended as COMPLETED with exit code 0 on n1"),
        ("17|CANCELLED by 1000|0:15|n[1-2]|x", "ended as CANCELLED on n[1-2] (by 1000)"),
        ("18|FAILED|1:0|n1|x", "Slurm no longer knows it"),
    ],
)
def test_a_job_that_only_the_accounting_knows(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    expected: str,
) -> None:
    """The cluster of the tests keeps no accounts: this answers as the manual of sacct says."""
    for name, body in (("squeue", "echo 'error: Invalid job id specified' >&2; exit 1"), ("sacct", f"echo '{line}'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = call(capsys, run.path, "--job", "17")
    assert (code, err) == (0, "")
    assert expected in out.splitlines()[0]


@pytest.mark.parametrize(
    ("remaining", "left", "limit", "expected"),
    [
        (HOUR, None, None, (True, None, 0)),
        (HOUR, 2 * HOUR, 4 * HOUR, (True, HOUR, 0)),
        (HOUR, HOUR + LEAD_SECONDS - 1, 4 * HOUR, (False, None, 1)),
        (2 * HOUR, 0.0, HOUR + LEAD_SECONDS, (False, None, 2)),
        (2 * HOUR + 1, 0.0, HOUR + LEAD_SECONDS, (False, None, 3)),
        (HOUR, 60.0, LEAD_SECONDS, (False, None, None)),
    ],
)
def test_forecast(remaining: float, left: float | None, limit: float | None, expected: tuple[Any, ...]) -> None:
    found = forecast(remaining, left, limit)
    assert (found.in_time, found.spare_seconds, found.requeues) == expected
