"""A run goes on in another layout as if it had never been interrupted; dropout and clipping are on."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import Ended, ForkedRuns, start_forks
from recipes import in_sections
from safetensors.torch import load_file

from megazh.model.lora_config import PART
from megazh.pipeline.state import WEIGHT
from megazh.run.metrics import read_metrics
from megazh.training.adapter import export_adapter, with_adapter
from megazh.training.checkpoint_list import checkpoint_path, list_checkpoints, read_manifest
from megazh.training.model_source import find_model
from megazh.training.weight_reader import WeightReader
from megazh.training.weights import load_decoder

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, SAVED = 8, 3
RECIPE: dict[str, Any] = {
    "model": {
        "vocab_size": 500,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "residual_dropout": 0.1,
    },
    "seq_len": 32,
    "micro_batch_size": 2,
    "global_batch_size": 12,
    "steps": STEPS,
    "warmup": 1,
    "checkpoint_every": SAVED,
    "keep_last": 0,
    "validate_every": 0,
    "validation_samples": 2,
    "sample_prompts": [],
    "max_grad_norm": 0.3,
    "dtype": "fp32",
}
# Muon rounds to bf16, so that a last bit of the gradient may become a larger difference of the update.
LEARNING_RATES = {"adamw": 1e-2, "muon": 1e-4}
# Layouts are (stages, replicas); each row: that of the save, then those of the resumes.
RESUMED = {
    (1, 1): [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)],
    (2, 1): [(1, 1), (3, 1)],
    (3, 1): [(2, 1)],
    (1, 2): [(1, 1), (1, 3)],
    (1, 3): [(1, 2)],
    (2, 2): [(2, 2)],
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    """The process that runs are forked from."""
    with start_forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


def write_recipe(path: Path, stories: Path, optimizer: str, **changes: Any) -> Path:
    """Write the recipe of an optimizer."""
    values = {**RECIPE, "optimizer": {"name": optimizer}, "learning_rate": LEARNING_RATES[optimizer], **changes}
    path.write_text(yaml.safe_dump(in_sections({**values, "data": {"manifest": str(stories)}})))
    return path


def back_to(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when the checkpoint of a step had been saved; returns its path."""
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if read_manifest(checkpoint).step > step:
            shutil.rmtree(checkpoint)
    return copy


def losses(run: Path) -> list[float]:
    """Loss of each step."""
    records = [record for record in read_metrics(run) if record["kind"] == "step"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def assert_same_bits(one: Path, other: Path) -> None:
    """Check that losses are equal, and that weights and state in the last checkpoints are."""
    assert losses(one) == losses(other)
    first, second = (checkpoint_path(run / "checkpoints", STEPS) for run in (one, other))
    names = [entry.name for entry in read_manifest(first).files]
    assert names == [entry.name for entry in read_manifest(second).files]
    for name in names:
        mine, its = load_file(first / name), load_file(second / name)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in mine), name


def assert_resumed(ended: Ended, step: int) -> None:
    """Check that a run has gone on from a step with all of its state."""
    assert f"resumed at step {step} of {STEPS}" in ended.output
    assert "starts clean" not in ended.output


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_any_layout_goes_on_as_any_other(forks: ForkedRuns, stories: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", stories, optimizer)
    wholes = {layout: tmp_path / f"whole_{layout[0]}x{layout[1]}" for layout in RESUMED}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda layout: forks.train(recipe, wholes[layout], layout), RESUMED))
        wanted = losses(wholes[1, 1])
        jobs = {}
        for first, layouts in RESUMED.items():
            for layout in layouts:
                run = back_to(wholes[first], SAVED, tmp_path / f"{first[0]}x{first[1]}_{layout[0]}x{layout[1]}")
                jobs[first, layout, run] = pool.submit(forks.train, recipe, run, layout)
        chain = back_to(wholes[2, 2], SAVED, tmp_path / "chain")
        assert_resumed(forks.train(recipe, chain, (1, 1)), SAVED)
        assert losses(chain) == pytest.approx(losses(wholes[2, 2]), rel=1e-5)
        back_to(chain, 2 * SAVED, tmp_path / "chain_2")
        assert_resumed(forks.train(recipe, tmp_path / "chain_2", (1, 3)), 2 * SAVED)
    assert losses(tmp_path / "chain_2") == pytest.approx(losses(wholes[2, 2]), rel=1e-5)
    for layout, whole in wholes.items():
        assert losses(whole) == pytest.approx(wanted, rel=1e-5), layout
    for (first, layout, run), job in jobs.items():
        assert_resumed(job.result(), SAVED)
        if layout == first:
            assert_same_bits(run, wholes[first])
        else:
            assert losses(run) == pytest.approx(losses(wholes[first]), rel=1e-5), (first, layout)


def test_another_micro_batch_and_other_bounds(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    recipe, whole = write_recipe(tmp_path / "recipe.yaml", stories, "adamw"), tmp_path / "whole"
    forks.train(recipe, whole, (2, 1), "stage_bounds=[0, 2, 5]")
    for name, settings in {"batch": ["micro_batch_size=3"], "bounds": ["stage_bounds=[0, 4, 5]"]}.items():
        run = back_to(whole, SAVED, tmp_path / name)
        assert_resumed(forks.train(recipe, run, (2, 1), *settings), SAVED)
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
        bounds = read_manifest(checkpoint_path(run / "checkpoints", STEPS)).bounds
        assert bounds == ([0, 4, 5] if name == "bounds" else [0, 2, 5])


def test_a_lora_run_goes_on_in_another_layout(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    recipe, base = write_recipe(tmp_path / "recipe.yaml", stories, "adamw"), tmp_path / "base"
    forks.train(recipe, base, (1, 1))
    start = checkpoint_path(base / "checkpoints", STEPS)
    pairs = ["lora.rank=4", "lora.targets=[q, v, down]", "lora.dropout=0.1", f"initial_checkpoint={start}"]
    whole = tmp_path / "whole"
    forks.train(recipe, whole, (2, 1), *pairs)
    for layout in ((1, 2), (3, 1)):
        run = back_to(whole, SAVED, tmp_path / f"{layout[0]}x{layout[1]}")
        assert_resumed(forks.train(recipe, run, layout, *pairs), SAVED)
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5), layout
    assert losses(whole)[-1] < losses(base)[-1]
    last = checkpoint_path(whole / "checkpoints", STEPS)
    stored = {(entry.parameter, entry.kind): entry for entry in read_manifest(last).tensors}
    with_state = {parameter for parameter, kind in stored if kind != WEIGHT}
    assert with_state == {parameter for parameter, _ in stored if PART in parameter}, "frozen weights have no state"
    assert len(with_state) == 3 * 2 * 3
    export_adapter(find_model(whole), tmp_path / "adapter")
    merged = load_decoder(with_adapter(find_model(start), tmp_path / "adapter"), torch.device("cpu"))
    trained = load_decoder(find_model(whole), torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(merged.parameters(), trained.parameters(), strict=True))
    frozen = [{}, {}]
    for values, path in zip(frozen, (start, last), strict=True):
        with WeightReader(path, read_manifest(path), WEIGHT) as reader:
            for name in (
                "embedding.weight",
                "norm.weight",
                "blocks.1.attention_norm.weight",
                "blocks.1.mlp.up_proj.weight",
            ):
                values[name] = torch.cat(list(reader.blocks(name)))
    assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in frozen[0])


def test_another_optimizer_starts_clean_and_says_so(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    recipe, whole = write_recipe(tmp_path / "recipe.yaml", stories, "adamw"), tmp_path / "whole"
    forks.train(recipe, whole, (1, 1))
    run = back_to(whole, SAVED, tmp_path / "muon")
    ended = forks.train(recipe, run, (1, 2), "optimizer.name=muon")
    line = "was saved with the optimizer adamw: weights are taken from it, and the state of muon starts clean"
    assert line in ended.output
    assert losses(run)[: SAVED + 1] == pytest.approx(losses(whole)[: SAVED + 1], rel=1e-5), "the weights are the same"
    assert losses(run)[-1] < losses(run)[0]
    last = read_manifest(checkpoint_path(run / "checkpoints", STEPS))
    assert (last.optimizer, last.updates) == ("muon", STEPS - SAVED)


def test_the_same_layout_gives_the_same_bits_in_bf16(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    for optimizer in ("adamw", "muon"):
        recipe = write_recipe(tmp_path / f"{optimizer}.yaml", stories, optimizer, dtype="bf16")
        whole = tmp_path / optimizer
        forks.train(recipe, whole, (2, 2))
        run = back_to(whole, SAVED, tmp_path / f"{optimizer}_resumed")
        assert_resumed(forks.train(recipe, run, (2, 2)), SAVED)
        assert_same_bits(run, whole)


def test_batches_and_lengths_that_change_go_on_in_any_layout(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    """Three steps of 12 samples and then of 24; segments of 8 tokens, from step 5 on of 16, from step 7 on whole."""
    course = {"schedule.batch": {0: 12, "1K": 24}, "schedule.length": {0: 8, 1200: 16, "3K": 32}, "kind": "wsd"}
    recipe = write_recipe(tmp_path / "recipe.yaml", stories, "adamw", checkpoint_every=1, decay=3, **course)
    # Of 12 samples per micro-batch, a step of two stages has one and then two.
    layouts = {(1, 1): [], (2, 1): ["micro_batch_size=12"], (1, 2): ["micro_batch_size=3"]}
    wholes = {layout: tmp_path / f"whole_{layout[0]}x{layout[1]}" for layout in layouts}
    unlabelled = {(1, 1): tmp_path / "unlabelled", (2, 1): tmp_path / "unlabelled_in_stages"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda layout: forks.train(recipe, wholes[layout], layout, *layouts[layout]), layouts))
        jobs = {}
        for layout, step in (((1, 1), 2), ((2, 1), 3)):
            run = back_to(wholes[layout], step, tmp_path / f"{layout[0]}x{layout[1]}_{step}")
            jobs[layout, run] = step, pool.submit(forks.train, recipe, run, layout, *layouts[layout])
        other = back_to(wholes[2, 1], 4, tmp_path / "other")
        moved = pool.submit(forks.train, recipe, other, (1, 3), "micro_batch_size=4")
        for layout, run in unlabelled.items():
            pool.submit(forks.train, recipe, run, layout, "label_at_cut=false", "steps=4")
    wanted = losses(wholes[1, 1])
    for layout, whole in wholes.items():
        assert losses(whole) == pytest.approx(wanted, rel=1e-5), layout
    records = [record for record in read_metrics(wholes[2, 1]) if record["kind"] == "step"]
    assert [record["tokens"] for record in records] == [384, 768, 1152, 1920, 2688, 3456, 4224, 4992]
    last = read_manifest(checkpoint_path(wholes[2, 1] / "checkpoints", STEPS))
    assert (last.samples, last.tokens) == (156, 4992)
    for (layout, run), (step, job) in jobs.items():
        assert_resumed(job.result(), step)
        assert_same_bits(run, wholes[layout])
    assert_resumed(moved.result(), 4)
    assert losses(other) == pytest.approx(wanted, rel=1e-5)
    first, second = (
        [record["loss"] for record in read_metrics(run) if record["kind"] == "step"] for run in unlabelled.values()
    )
    assert len(first) == 4
    assert first == pytest.approx(second, rel=1e-5)
    assert first[0] != pytest.approx(wanted[0], rel=1e-5), "other labels from the first step on"
