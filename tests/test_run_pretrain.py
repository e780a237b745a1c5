"""`jobs/run_pretrain.sh`: the Python that it runs, its arguments, and the folder that it runs in."""

import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from processes import run_command

JOBS = Path(__file__).parents[1] / "jobs"

# A Python that passes the check of setup.sh, and prints its folder, PYTHONPATH and arguments.
PYTHON = f"""#!/bin/bash
[[ $1 == - ]] && exec {sys.executable} "$@"
echo "$MEGAZH_BEGUN" > "${{OUT:-/dev/null}}"
printf '%s\\n' "$PWD" "$PYTHONPATH" "$@"
exit 7
"""


def test_it_hands_the_options_over_and_stays_where_it_was_started(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    here = tmp_path / "a folder"
    here.mkdir()
    options = ["-c", "demo", "-p", "从前 有", "-r", "data.path=$HOME"]
    finished = run_command(
        ["bash", JOBS / "run_pretrain.sh", *options],
        env={"MEGAZH_PYTHON": str(python), "PYTHONPATH": "/elsewhere"},
        cwd=here,
    )
    assert finished.stdout.splitlines() == [
        str(here),
        f"{JOBS.parent}:/elsewhere",
        "-P",
        "-m",
        "megazh",
        "pretrain",
        *options,
    ]
    assert finished.returncode == 7, "the exit code is Python's"


def test_without_a_python_it_says_what_setup_says() -> None:
    finished = run_command(["bash", JOBS / "run_pretrain.sh"], env={"MEGAZH_PYTHON": "/nowhere/python"})
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: setup: MEGAZH_PYTHON=/nowhere/python: ")


@pytest.mark.parametrize(
    ("options", "extras"), [("-t hf -c demo", "--hf\n"), ("-c demo --type=hf", "--hf\n"), ("-t ds_pp -c hf", "\n")]
)
def test_the_packages_of_an_engine_are_set_up_with_it(tmp_path: Path, options: str, extras: str) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    shutil.copy(JOBS / "run_pretrain.sh", jobs)
    (jobs / "setup.sh").write_text('echo "$@" > extras; echo true\n')
    finished = run_command(["bash", jobs / "run_pretrain.sh", *options.split()], cwd=tmp_path)
    assert finished.returncode == 0, finished
    assert (tmp_path / "extras").read_text() == extras


def test_nothing_in_the_current_folder_passes_for_a_module(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('the wrong argparse')")
    shutil.copytree(JOBS.parent / "megazh" / "cli", tmp_path / "megazh")
    finished = run_command(
        ["bash", JOBS / "run_pretrain.sh", "--no-such-option"], env={"MEGAZH_PYTHON": sys.executable}, cwd=tmp_path
    )
    assert finished.returncode == 2
    assert "usage: megazh" in finished.stderr


@pytest.mark.parametrize("ends", ["| true", ">&-", "2>&-", "> /dev/full", "|& true", "<&- >&- 2>&-"])
def test_the_exit_code_is_the_runs_whoever_reads(tmp_path: Path, ends: str) -> None:
    """`| true` reads nothing: the pipe is closed at once."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("printf", "sleep 0.1; printf"))
    python.chmod(0o755)
    line = f"bash {shlex.quote(str(JOBS / 'run_pretrain.sh'))} -c demo {ends}\necho ${{PIPESTATUS[0]}} > code"
    run_command(["bash", "-c", line], 30, {"MEGAZH_PYTHON": str(python), "OUT": str(tmp_path / "begun")}, tmp_path)
    assert (tmp_path / "code").read_text() == "7\n"
    assert abs(float((tmp_path / "begun").read_text()) - time.time()) < 30, "the time at which Python began"
