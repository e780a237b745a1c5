"""`jobs/setup.sh`: its output and refusals; without network, and without making an environment."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_command

SETUP = Path(__file__).parents[1] / "jobs" / "setup.sh"


def setup(python: str | Path, *options: str):
    """Run `jobs/setup.sh OPTIONS` with MEGAZH_PYTHON, in `/`, so that nothing is found by chance."""
    return run_command(["bash", SETUP, *options], env={"MEGAZH_PYTHON": str(python)}, cwd=Path("/"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("options", [[], ["--dev"]])
def test_a_complete_interpreter_is_taken_as_it_is(options: list[str]) -> None:
    finished = setup(sys.executable, *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{sys.executable}\n"
    assert finished.stderr == ""


def test_a_bare_interpreter_is_told_what_it_lacks(bare: Path) -> None:
    finished = setup(bare, "--mpi")
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    lacking = line.removeprefix(f"error: setup: MEGAZH_PYTHON={bare} lacks ").partition(";")[0].split()
    assert {"numpy", "torch", "deepspeed", "tensorboard", "mpi4py"} <= set(lacking)
    assert "pytest" not in lacking, "required although --dev is not given"
    assert "requirements/" in line, "the remedy"
    assert not list(bare.parents[1].glob("lib/*/site-packages/*")), "something was installed"


def test_an_old_interpreter_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\n(echo "import sys; sys.version_info = (3, 9)"; cat) | exec {sys.executable} "$@"\n')
    old.chmod(0o755)
    finished = setup(old)
    assert finished.returncode == 2
    assert "Python 3.11 or newer (it is 3.9)" in finished.stderr


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python", "/tmp", "/bin/false"])
def test_what_is_no_interpreter_is_named(python: str) -> None:
    finished = setup(python)
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: setup: MEGAZH_PYTHON={python}: ")


def test_an_unknown_option_is_named() -> None:
    finished = setup(sys.executable, "--gpu")
    assert finished.returncode == 2
    assert "--gpu" in finished.stderr
    assert finished.stdout == ""


def test_all_requirements_are_pinned() -> None:
    for path in SETUP.parents[1].glob("requirements/*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines, path
        for line in lines:
            name, _, version = line.partition("==")
            assert name, line
            assert version, f"{path.name}: {line} is not pinned"
            assert not name.startswith("nvidia"), "torch pins what it needs"
