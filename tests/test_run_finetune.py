"""`jobs/run_finetune.sh`: the Python that it runs, its arguments, and the folder that it runs in."""

import sys
from pathlib import Path

from processes import run_command

JOBS = Path(__file__).parents[1] / "jobs"

# A Python that passes the check of setup.sh, and prints its folder, PYTHONPATH and arguments.
PYTHON = f"""#!/bin/bash
[[ $1 == - ]] && exec {sys.executable} "$@"
printf '%s\\n' "$PWD" "$PYTHONPATH" "$@"
exit 7
"""


def test_it_hands_the_options_over_and_stays_where_it_was_started(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    here = tmp_path / "a folder"
    here.mkdir()
    options = ["-t", "normal", "-i", "从前 有.jsonl", "data.path=$HOME"]
    env = {"MEGAZH_PYTHON": str(python), "PYTHONPATH": "/elsewhere"}
    finished = run_command(["bash", JOBS / "run_finetune.sh", *options], env=env, cwd=here)
    words = ["-P", "-m", "megazh", "finetune", *options]
    assert finished.stdout.splitlines() == [str(here), f"{JOBS.parent}:/elsewhere", *words]
    assert finished.returncode == 7, "the exit code is Python's"


def test_its_help_has_examples() -> None:
    finished = run_command(["bash", JOBS / "run_finetune.sh", "--help"], env={"MEGAZH_PYTHON": sys.executable})
    assert finished.returncode == 0, finished
    assert "examples:\n  bash jobs/run_finetune.sh -t normal  " in finished.stdout
