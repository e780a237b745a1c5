"""`megazh import`, and what the folder is good for: a recipe, a run that begins from it, text, and another export."""

from pathlib import Path

import pytest
from made_runs import make_run, write_recipe

from megazh.cli import main
from megazh.run.folder import RunFolder


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run that is done."""
    return make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))


def megazh(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_from_a_run_and_back(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, imported, again = tmp_path / "hf", tmp_path / "imported", tmp_path / "again"
    assert megazh(capfd, "export", run.path, first)[0] == 0
    said = f"{imported}: 37,024 parameters of {first}, 2 layers x 32, trained on 32 tokens at a time\n"
    assert megazh(capfd, "import", first, "--to", imported) == (0, said, "")
    assert megazh(capfd, "export", imported, again)[0] == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    texts = {
        megazh(capfd, "sample", path, "小猫", "--max-tokens", 5, "--device", "cpu", "--temperature", 0)[1]
        for path in (run.path, run.checkpoints / "step_00000006", first, imported)
    }
    assert len(texts) == 1
    assert texts.pop().startswith("小猫")


def test_a_start_from_it_passes_its_checks(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    assert megazh(capfd, "export", run.path, folder)[0] == 0
    settings = (f"model.from={folder}", f"initial_checkpoint={folder}")
    words = ("pretrain", "-c", tmp_path / "mini.yaml", "-r", tmp_path / "new", "--device", "cpu", "--dry-run")
    code, out, err = megazh(capfd, *words, *settings)
    assert code == 0, err
    assert str(folder) not in out + err, "no warning is about it"
    code, out, err = megazh(capfd, *words, *settings, "rope_theta=5e5")
    assert "trained with positions of theta 10000, and this run has theta 500000" in out + err


def test_a_folder_that_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, out, err = megazh(capfd, "import", tmp_path, "--to", tmp_path / "out")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {tmp_path / 'config.json'}: model_type is None")
