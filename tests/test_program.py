"""The command that messages tell users to run: one that works where `megazh` is not on PATH, too."""

import subprocess
import sys
from pathlib import Path

import pytest

from megazh.program import program, runnable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python in a folder of its own, which PATH does not lead to."""
    path = tmp_path / "venv" / "bin" / "python3"
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(ROOT)
    return path


def test_installed_and_on_path_it_is_megazh(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python.with_name("megazh").touch(mode=0o755)
    assert program() == str(python.with_name("megazh"))
    monkeypatch.chdir(python.parents[2])
    assert program() == "venv/bin/megazh"
    monkeypatch.setenv("PATH", f"/usr/bin:{python.parent}")
    assert program() == "megazh"


def test_without_the_script_it_is_a_module_of_this_python(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program() == f"{python} -m megazh"
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin")
    assert program() == "python3 -m megazh"
    monkeypatch.setenv("PYTHONPATH", f"/other dir:{ROOT}")
    assert program() == "python3 -m megazh", "from the repository's folder"
    monkeypatch.chdir("/")
    assert program() == f"PYTHONPATH='/other dir:{ROOT}' python3 -m megazh"


def test_what_is_named_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as MEGAZH_PYTHON users are: from any folder, with the repository in PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = program()
    monkeypatch.delenv("PYTHONPATH")
    done = subprocess.run(["sh", "-c", f"{command} --version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("megazh "), done.stderr


def test_messages_name_it(python: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megazh.cli import main

    with pytest.raises(SystemExit):
        main(["recipe", "check", "steps=3"])
    assert f"a name from '{python} -m megazh recipe list'" in capsys.readouterr().err


def test_other_programs_are_named_the_same_way(python: Path) -> None:
    assert program("tensorboard", "tensorboard.main") == f"{python} -m tensorboard.main"
    python.with_name("tensorboard").touch(mode=0o755)
    assert program("tensorboard", "tensorboard.main") == str(python.with_name("tensorboard"))


def test_commands_that_messages_quote_are_those_of_this_user(python: Path) -> None:
    assert runnable("not there; 'megazh index adopt P' makes it, megazh not") == (
        f"not there; '{python} -m megazh index adopt P' makes it, megazh not"
    )
