"""`megazh export` on a run with three checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_recipe
from safetensors.torch import load_file

from megazh.cli import main
from megazh.cli.export import size
from megazh.model.decoder import Decoder
from megazh.run.folder import RunFolder
from megazh.training.recipe import run_recipe


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run of six steps, with checkpoints of steps 2 and 6."""
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))
    add_checkpoint(run, run_recipe(run), 2)
    return run


def export(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh export WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def seed_of(run: RunFolder, folder: Path) -> int:
    """The step whose weights a folder holds."""
    found = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    return next(
        step for step in (2, 6) if torch.equal(Decoder(run_recipe(run).model, seed=step).embedding.weight, found)
    )


def test_the_newest_checkpoint_of_a_run(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = export(capfd, run.path, "--to", "hf", tmp_path / "hf")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'hf'}: 37,024 parameters of ")
    assert "step_00000006 as llama, fp32, " in out
    assert seed_of(run, tmp_path / "hf") == 6
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == run.tokenizer().eod_id
    assert config["max_position_embeddings"] == 32


def test_a_step_a_name_and_a_path(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    second = run.checkpoints / "step_00000002"
    for number, words in enumerate([(run.path, "--step", 2), (run.path, "--checkpoint", second.name), (second,)]):
        target = tmp_path / str(number)
        assert export(capfd, *words, target)[0] == 0
        assert seed_of(run, target) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["run", "--step", 3], "run: no checkpoint 'step_00000003'; there are step_00000002, step_00000006"),
        (["run/checkpoints/step_00000002", "--checkpoint", "step_00000006"], "is one checkpoint; give the folder of"),
        (["data"], "data: no run (config.yaml is missing), no checkpoint (manifest.json is missing) and"),
        (["run", "--family", "qwen2"], "--family qwen2: cannot express model.qkv_bias=false"),
        (["run", "--shard-size", "5XB"], "--shard-size"),
    ],
)
def test_what_cannot_be_exported(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[object],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = export(capfd, *words, "hf")
    assert code == 2
    assert problem in err.splitlines()[-1]


@pytest.mark.parametrize(("text", "number"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2G", 2 * 10**9), ("7", 7)])
def test_sizes(text: str, number: int) -> None:
    assert size(text) == number
