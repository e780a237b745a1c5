"""`megazh import`, and what the folder is good for: a recipe, a run that begins from it, text, and another export."""

import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from processes import Finished, run_command

from megazh.run.folder import RunFolder


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run that is done."""
    return make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))


def megazh(*words: object) -> Finished:
    """Run `megazh WORDS`."""
    return run_command([sys.executable, "-m", "megazh", *map(str, words)], 60)


def test_from_a_run_and_back(run: RunFolder, tmp_path: Path) -> None:
    first, imported, again = tmp_path / "hf", tmp_path / "imported", tmp_path / "again"
    assert megazh("export", run.path, first).returncode == 0
    finished = megazh("import", first, "--to", imported)
    assert finished.returncode == 0, finished
    assert finished.stdout == (
        f"{imported}: 37,024 parameters of {first}, 2 layers x 32, trained on 32 tokens at a time\n"
    )
    assert megazh("export", imported, again).returncode == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    texts = {
        megazh("sample", path, "小猫", "--max-tokens", 5, "--device", "cpu", "--temperature", 0).stdout
        for path in (run.path, run.checkpoints / "step_00000006", first, imported)
    }
    assert len(texts) == 1
    assert texts.pop().startswith("小猫")


def test_a_start_from_it_passes_its_checks(run: RunFolder, tmp_path: Path) -> None:
    assert megazh("export", run.path, tmp_path / "hf").returncode == 0
    folder = tmp_path / "hf"
    settings = (f"model.from={folder}", f"initial_checkpoint={folder}")
    words = ("pretrain", "-c", tmp_path / "mini.yaml", "-r", tmp_path / "new", "--device", "cpu", "--dry-run")
    finished = megazh(*words, *settings)
    assert finished.returncode == 0, finished
    assert str(folder) not in finished.stdout + finished.stderr, "no warning is about it"
    finished = megazh(*words, *settings, "rope_theta=5e5")
    assert "trained with model.rope_theta=10000" in finished.stdout + finished.stderr


def test_a_folder_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    finished = megazh("import", tmp_path, "--to", tmp_path / "out")
    assert (finished.returncode, finished.stdout) == (3, "")
    assert finished.stderr.startswith(f"error: {tmp_path / 'config.json'}: model_type is None")
