"""An installed wheel: it brings the recipes, and commands find them from any folder."""

import sys
from pathlib import Path

import pytest
from processes import Finished, run_command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with megazh installed from its wheel, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # Built from a copy: setuptools writes build/ and *.egg-info beside the sources.
    copy = folder / "source"
    for name in ("megazh", "jobs/recipes"):
        for file in (ROOT / name).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                target = copy / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    stale = copy / "build" / "lib" / "megazh" / "recipes" / "gone.yaml"  # of an earlier build
    stale.parent.mkdir(parents=True)
    stale.write_text("steps: 1\n")
    built = run_command([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", copy], timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("megazh-*.whl")
    placed = run_command([*pip, "install", "--no-deps", "--target", folder / "site", wheel], timeout=120)
    assert placed.returncode == 0, placed.stderr
    return folder / "site"


def call(installed: Path, *words: str) -> Finished:
    """`megazh WORDS` of the installed package, in an empty folder."""
    here = installed.parent / "here"
    here.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "megazh", *words]
    return run_command(command, env={"PYTHONPATH": str(installed)}, cwd=here)


@pytest.mark.slow
def test_recipes_come_along(installed: Path) -> None:
    listed = call(installed, "recipe", "list")
    assert listed.returncode == 0, listed.stderr
    own = {path.stem for path in (ROOT / "jobs" / "recipes").glob("*.yaml") if not path.stem.startswith("_")}
    assert {line.split()[0] for line in listed.stdout.splitlines()} == own
    shown = call(installed, "recipe", "show", "qwen0.5b_6x3090", "steps=20")
    assert f"{installed}/megazh/recipes/_pretrain.yaml:" in shown.stdout, "the recipes of the wheel, not of a checkout"


@pytest.mark.slow
def test_a_plan_and_a_dry_run_need_no_checkout(installed: Path) -> None:
    assert call(installed, "plan", "demo").stdout.startswith("model       865,152 parameters")
    dry = call(installed, "pretrain", "--device", "cpu", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "run         runs/demo" in dry.stdout.splitlines()
