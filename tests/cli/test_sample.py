"""`megazh sample`: its output and refusals, with an untrained model."""

from pathlib import Path

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_recipe

from megazh.cli import main
from megazh.index.prepare import prepare
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.training.recipe import run_recipe

PROMPT = "从前，有一只小兔子。"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a checkpoint of step 6, which tests only read."""
    folder = tmp_path_factory.mktemp("run")
    manifest = prepare(folder / "data", 400, 1, None, story_count=200, say=lambda line: None)
    return make_run(folder / "run", write_recipe(folder / "mini.yaml", manifest, model={"vocab_size": 4096}))


def sample(capfd: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh sample WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["sample", *map(str, words)])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_greedy_is_the_same_with_and_without_cache(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    words = (run.path, PROMPT, "--temperature", "0", "--max-tokens", "40", "--ignore-end")
    code, cached, err = sample(capfd, *words)
    assert code == 0
    assert cached.startswith(PROMPT)
    assert len(cached) > len(PROMPT) + 1
    assert err.startswith("[4")
    assert "tokens, " in err
    assert sample(capfd, *words, "--no-cache")[1] == cached


def test_a_seed_gives_a_text_and_count_gives_those_of_the_next_seeds(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (run.path, PROMPT, "--max-tokens", "20", "--ignore-end", "--temperature", "1.5", "--top-k", "0")
    one, again, other = (sample(capfd, *words, "--seed", seed)[1] for seed in ("7", "7", "8"))
    assert one == again != other
    code, three, err = sample(capfd, *words, "--seed", "7", "--count", "3")
    assert code == 0
    assert three.startswith(one + other)
    assert err.count("tokens, ") == 3


def test_without_a_seed_it_is_the_same_each_time(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    words = (run.path, PROMPT, "--max-tokens", "20")
    assert sample(capfd, *words)[1] == sample(capfd, *words, "--seed", "0")[1]


def test_a_model_that_has_learned_nothing_writes_text(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    """capfd decodes strictly: half a character would be an error."""
    for prompt in ("hello", "🙂\n"):
        options = ("--max-tokens", "80", "--temperature", "3", "--top-k", "0", "--top-p", "1", "--ignore-end")
        code, out, _ = sample(capfd, run.path, prompt, *options)
        assert code == 0
        assert out.startswith(prompt)
        assert len(out) > len(prompt) + 20


def test_a_checkpoint_and_a_hugging_face_folder(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_to_hf(find_model(run.path), tmp_path / "hf", ExportOptions())
    (checkpoint,) = list_checkpoints(run.checkpoints)
    options = (PROMPT, "--temperature", "2", "--max-tokens", "30")
    one, other, third = (sample(capfd, path, *options) for path in (run.path, checkpoint, tmp_path / "hf"))
    assert one[:2] == other[:2] == third[:2]
    code, _, err = sample(capfd, tmp_path / "hf", *options, "--checkpoint", "step_00000006")
    assert (code, err) == (2, f"error: {tmp_path / 'hf'} is a Hugging Face folder, which has no checkpoints\n")


def test_the_newest_checkpoint_or_the_one_that_is_named(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = run.path.parent / "mini.yaml"
    own = make_run(tmp_path / "run", recipe)
    options = (PROMPT, "--temperature", "2", "--ignore-end", "--max-tokens", "30")
    before = sample(capfd, own.path, *options)[1]
    add_checkpoint(own, run_recipe(own), 12)
    assert sample(capfd, own.path, *options)[1] != before
    assert sample(capfd, own.path, *options, "--checkpoint", "step_00000006")[1] == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the prompt is empty: give at least one character"),
        ([PROMPT, "--temperature", "-1"], "temperature -1.0: expected at least 0"),
        ([PROMPT, "--temperature", "nan"], "temperature nan: expected at least 0"),
        ([PROMPT, "--top-p", "0"], "top_p 0.0: expected more than 0 and at most 1"),
        ([PROMPT, "--top-p", "1.01"], "top_p 1.01: expected more than 0 and at most 1"),
        ([PROMPT, "--top-k", "-1"], "top_k -1: expected at least 0"),
        ([PROMPT, "--repetition-penalty", "0"], "repetition_penalty 0.0: expected more than 0"),
        ([PROMPT, "--checkpoint", "step_7"], "no checkpoint 'step_7'; there are step_00000006"),
        ([PROMPT, "--seed", "-1"], "--seed -1: expected a number from 0 to 4294967295"),
        ([PROMPT, "--seed", str(1 << 70)], "--seed 1180591620717411303424: expected a number"),
        (["从\udcff前🙂"], "the prompt is not valid UTF-8"),
    ],
)
def test_refused_in_one_line(run: RunFolder, capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = sample(capfd, run.path, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_run_or_without_a_checkpoint(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = sample(capfd, tmp_path, PROMPT)
    assert (code, err.partition(" (")[0]) == (2, f"error: {tmp_path}: no run")
    own = make_run(tmp_path / "run", run.path.parent / "mini.yaml")
    own.checkpoints.rename(tmp_path / "gone")
    code, _, err = sample(capfd, own.path, PROMPT)
    assert (code, err) == (2, f"error: {own.path}: holds no checkpoint yet\n")


def test_damaged_weights_end_with_3(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = make_run(tmp_path / "run", run.path.parent / "mini.yaml")
    path = own.checkpoints / "step_00000006" / "weights" / "blocks.0.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    code, out, err = sample(capfd, own.path, PROMPT)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}: wrong content")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = sample(capfd, run.path, PROMPT, "--device", "cuda")
    assert (code, err) == (2, "error: --device cuda: torch can use no GPU here; leave it out, or give --device cpu\n")
