"""Runs through Hugging Face's Trainer: losses of the pipeline's, resume after a kill, and checkpoints for others."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import ForkedRuns, start_forks
from recipes import in_sections

from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import MANIFEST, OPTIMIZER, checkpoint_path, list_checkpoints, newest_good
from megazh.training.model_source import find_model
from megazh.training.recipe import run_recipe
from megazh.training.weights import load_decoder

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, SAVED = 50, 20
RECIPE: dict[str, Any] = {
    "model": {
        "vocab_size": 500,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "qkv_bias": True,
    },
    "seq_len": 48,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "steps": STEPS,
    "learning_rate": 1e-2,
    "warmup": 5,
    "weight_decay": 0.1,
    "decayed": ["matrix"],
    "max_grad_norm": 0.3,
    "checkpoint_every": SAVED,
    "keep_last": 2,
    "keep_best": False,
    "validate_every": 25,
    "validation_samples": 5,
    "sample_tokens": 4,
    "dtype": "fp32",
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    """The process that runs are forked from."""
    folder = tmp_path_factory.mktemp("forks")
    with start_forks(folder, "megazh.training.hf.loop", "torch.distributed.optim", "accelerate.utils") as started:
        yield started


@pytest.fixture(scope="module")
def recipe(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of all runs."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    return path


@pytest.fixture(scope="module")
def wholes(forks: ForkedRuns, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were never interrupted: one of the pipeline's, and some of the Trainer's."""
    folder = tmp_path_factory.mktemp("wholes")
    runs = {
        "ds_pp": (1, "ds_pp", []),
        "ds_pp bf16": (1, "ds_pp", ["dtype=bf16"]),
        "one rank": (1, "hf", []),
        "DDP": (2, "hf", ["zero_stage=0"]),
        "ZeRO-1": (2, "hf", []),
        "ZeRO-2": (2, "hf", ["zero_stage=2"]),
        "one rank bf16": (1, "hf", ["dtype=bf16"]),
        "ZeRO-1 bf16": (2, "hf", ["dtype=bf16"]),
    }

    def train(name: str) -> None:
        ranks, engine, settings = runs[name]
        forks.train(recipe, folder / name, (1, ranks), *settings, engine=engine)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, runs))
    return {name: folder / name for name in runs}


def records(run: Path, kind: str, value: str = "loss") -> list[float]:
    """A number of each step or validation of a whole run."""
    found = [record for record in read_metrics(run) if record["kind"] == kind]
    if kind == "step":
        assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    return [record[value] for record in found]


@pytest.mark.parametrize("name", ["one rank", "DDP", "ZeRO-1", "ZeRO-2"])
def test_the_curve_is_the_pipelines(wholes: dict[str, Path], name: str) -> None:
    """Samples, loss, clipping, schedule and decay are the same: only the order of additions differs."""
    run, wanted = wholes[name], wholes["ds_pp"]
    assert records(run, "step")[0] == pytest.approx(records(wanted, "step")[0], abs=1e-6)
    assert records(run, "step") == pytest.approx(records(wanted, "step"), abs=1e-4)
    assert records(run, "step", "grad_norm") == pytest.approx(records(wanted, "step", "grad_norm"), rel=1e-3)
    assert records(run, "step", "learning_rate") == records(wanted, "step", "learning_rate")
    for value in ("loss", "bits_per_byte"):
        assert records(run, "validation", value) == pytest.approx(records(wanted, "validation", value), abs=1e-4)


@pytest.mark.parametrize("name", ["one rank bf16", "ZeRO-1 bf16"])
def test_bf16_rounds_otherwise_and_no_more(wholes: dict[str, Path], name: str) -> None:
    run, wanted = records(wholes[name], "step"), records(wholes["ds_pp bf16"], "step")
    assert run[0] == pytest.approx(wanted[0], abs=1e-3)
    assert run == pytest.approx(wanted, abs=1e-2)


def test_the_newest_checkpoints_are_kept(wholes: dict[str, Path]) -> None:
    for name in ("DDP", "ZeRO-1"):
        assert [path.name for path in list_checkpoints(wholes[name] / "checkpoints")] == [
            "step_00000040",
            "step_00000050",
        ]
        newest = newest_good(wholes[name] / "checkpoints")
        assert newest is not None
        assert (newest[1].engine, newest[1].complete) == ("hf", True)


@pytest.mark.parametrize("name", ["one rank", "ZeRO-1", "ZeRO-1 bf16"])
def test_a_run_that_was_killed_goes_on_with_the_same_bits(
    forks: ForkedRuns, recipe: Path, wholes: dict[str, Path], tmp_path: Path, name: str
) -> None:
    ranks = 1 if name == "one rank" else 2
    settings = ["dtype=bf16"] if "bf16" in name else []
    batches = 4 * (SAVED + 7)  # of all ranks; some are gathered ahead
    killed = forks.train(recipe, tmp_path / "run", (1, ranks), *settings, kill_after=batches, engine="hf")
    assert killed.killed
    resumed = forks.train(recipe, tmp_path / "run", (1, ranks), *settings, engine="hf")
    assert f"resumed at step {SAVED} of {STEPS}" in resumed.output
    assert records(tmp_path / "run", "step") == records(wholes[name], "step")


def test_a_checkpoint_goes_on_in_another_layout(
    forks: ForkedRuns, recipe: Path, wholes: dict[str, Path], tmp_path: Path
) -> None:
    settings = ["zero_stage=1"]
    forks.train(recipe, tmp_path / "run", (1, 2), *settings, kill_after=4 * (SAVED + 7), engine="hf")
    resumed = forks.train(recipe, tmp_path / "run", (1, 1), *settings, engine="hf")
    assert f"resumed at step {SAVED} of {STEPS}" in resumed.output
    assert "starts clean" not in resumed.output
    assert records(tmp_path / "run", "step") == pytest.approx(records(wholes["ds_pp"], "step"), abs=1e-4)


@pytest.mark.parametrize(("first", "second"), [("hf", "ds_pp"), ("ds_pp", "hf")])
def test_weights_cross_over(
    forks: ForkedRuns, recipe: Path, wholes: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """The other engine begins with what this one ended with."""
    before = wholes["ds_pp" if first == "ds_pp" else "ZeRO-1"]
    initial = f"initial_checkpoint={checkpoint_path(before / 'checkpoints', STEPS)}"
    forks.train(recipe, tmp_path / "run", (1, 1), initial, "steps=5", engine=second)
    assert records_of_start(tmp_path / "run") == pytest.approx(records(before, "validation")[-1], abs=1e-5)


def records_of_start(run: Path) -> float:
    """Validation loss before the first step."""
    return next(record["loss"] for record in read_metrics(run) if record["kind"] == "validation")


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-1 bf16"])
def test_a_checkpoint_is_a_folder_of_transformers(wholes: dict[str, Path], tmp_path: Path, name: str) -> None:
    """It gives the logits of the same checkpoint read by megazh, which also reads it as a foreign folder."""
    run = RunFolder(wholes[name])
    checkpoint = checkpoint_path(run.checkpoints, STEPS)
    own = load_decoder(find_model(checkpoint), torch.device("cpu")).float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.arange(3, 43)[None]
    positions, boundaries = torch.arange(40)[None].int(), torch.tensor([[0, 40]]).int()
    with torch.no_grad():
        wanted = own.logits(own(tokens, own.attention(positions, boundaries)))
        torch.testing.assert_close(theirs(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    shutil.copytree(checkpoint, tmp_path / "foreign", ignore=shutil.ignore_patterns(MANIFEST, OPTIMIZER))
    foreign = find_model(tmp_path / "foreign")
    assert foreign.model == run_recipe(run).model
    read = load_decoder(foreign, torch.device("cpu")).float()
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), read.parameters(), strict=True))


def test_cuts_and_shapes_of_the_rate_are_the_pipelines(forks: ForkedRuns, recipe: Path, tmp_path: Path) -> None:
    settings = ["steps=6", "kind=wsd", "decay=3", "warmup=2", "schedule.length={0: 8, 1K: 48}", "label_at_cut=false"]
    for ranks, engine in ((1, "ds_pp"), (2, "hf")):
        forks.train(recipe, tmp_path / engine, (1, ranks), *settings, "validate_every=0", engine=engine)
    found = [
        [(each["loss"], each["learning_rate"]) for each in read_metrics(tmp_path / engine) if each["kind"] == "step"]
        for engine in ("ds_pp", "hf")
    ]
    for (loss, rate), (other, its) in zip(*found, strict=True):
        assert loss == pytest.approx(other, abs=1e-4)
        assert rate == its
    assert [rate for _, rate in found[1]] == pytest.approx([5e-3, 1e-2, 1e-2, 7e-3, 4e-3, 1e-3])
