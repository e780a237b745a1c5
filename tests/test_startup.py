"""What commands import: a slow library only where the command needs it."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from processes import run_command

ROOT = Path(__file__).parents[1]
# Calls the command line, and prints at last which libraries were imported.
CALL = """
import json, sys
from megazh.cli import main
arguments, libraries = json.loads(sys.argv[1])
try:
    main(arguments)
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps([name for name in libraries if name in sys.modules]))
"""
LIBRARIES = ["torch", "numpy", "pydantic", "numba", "deepspeed", "triton", "tensorboard", "matplotlib", "pyarrow"]


def environment() -> dict[str, str]:
    """Variables with which Python finds this megazh from any folder."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def imported(folder: Path, *arguments: str) -> set[str]:
    """The libraries out of `LIBRARIES` that `megazh ARGUMENTS`, called in a folder, imports."""
    given = json.dumps([arguments, LIBRARIES])
    finished = run_command([sys.executable, "-c", CALL, given], 60, environment(), folder)
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout.splitlines()[-1]))


def test_help_imports_no_library(tmp_path: Path) -> None:
    assert imported(tmp_path, "--help") == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("recipe", "show", "demo"),
        ("plan", "demo"),
        ("pretrain", "--dry-run", "--device", "cpu", "-c", "demo"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_that_only_print_import_no_heavy_library(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert imported(tmp_path, *arguments) <= {"numpy", "pydantic"}
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_rank_imports_torch() -> None:
    """The check above can fail: the same look at `sys.modules` finds torch where it is used."""
    look = "import sys, megazh.training.loop; print('torch' in sys.modules)"
    finished = run_command([sys.executable, "-c", look], 120, environment())
    assert (finished.returncode, finished.stdout.splitlines()[-1:]) == (0, ["True"]), finished


def test_help_takes_less_than_a_second(tmp_path: Path) -> None:
    """The best of three, since other processes may take the processor away."""
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        finished = run_command([sys.executable, "-m", "megazh", "--help"], 60, environment(), tmp_path)
        seconds.append(time.monotonic() - begin)
        assert (finished.returncode, "pretrain" in finished.stdout) == (0, True), finished
    assert min(seconds) < 1
