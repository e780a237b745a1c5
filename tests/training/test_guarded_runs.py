"""Runs whose data make losses jump: the guard skips or goes back, in every layout, and whatever kills the ranks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import ForkedRuns, start_forks
from recipes import TINY_RUN, in_sections
from safetensors.torch import load_file

from megazh.errors import DataError, DivergedError
from megazh.index.mixture import Mixture
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import CheckpointManifest, list_checkpoints, read_manifest

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 16
RECIPE: dict[str, Any] = {
    **TINY_RUN,
    "steps": STEPS,
    "min_lr_ratio": 1.0,
    "checkpoint_every": 5,
    "keep_last": 1,
    "guard": {"window": 4, "deviations": 50.0},
}
BATCH = RECIPE["global_batch_size"]


def in_step(step: int) -> int:
    """A sample of a step, where nothing was passed over."""
    return (step - 1) * BATCH + 1


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    """The process that runs are forked from."""
    with start_forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture
def recipe(stories: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    return path


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The records of all steps; no step may be missing or recorded twice."""
    records = [record for record in read_metrics(run) if record["kind"] == "step"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return records


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What decides whether two runs are the same, step by step."""
    names = ("step", "tokens", "loss", "grad_norm", "learning_rate", "skipped", "skipped_so_far")
    return [tuple(str(record[name]) for name in names) for record in steps_of(run)]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps_of(run)]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "event" and record["name"] == name]


def last(run: Path) -> CheckpointManifest:
    """The manifest of the newest checkpoint, which is that of the last step."""
    manifest = read_manifest(list_checkpoints(run / "checkpoints")[-1])
    assert manifest.step == STEPS
    return manifest


def assert_same(one: Path, other: Path) -> None:
    """Records, guards, weights and optimizer states are equal, bit for bit."""
    assert curve(one) == curve(other)
    first, second = last(one), last(other)
    assert (first.guard, first.samples, first.updates) == (second.guard, second.samples, second.updates)
    for entry in first.files:
        left, right = (
            load_file(list_checkpoints(run / "checkpoints")[-1] / entry.name) for run in (one, other)
        )  # fmt: skip
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[key]) for key, tensor in left.items()), entry.name


def test_a_run_that_skips_is_the_same_killed_and_in_other_layouts(
    forks: ForkedRuns, recipe: Path, tmp_path: Path
) -> None:
    poison = {in_step(8): 1e3, in_step(10): float("nan"), in_step(11): 1e3, in_step(13): float("inf")}

    def run(name: str, layout: tuple[int, int], kill_after: int | None = None) -> Path:
        forks.train(recipe, tmp_path / name, layout, kill_after=kill_after, poison=poison)
        return tmp_path / name

    def killed(name: str) -> Path:
        run(name, (1, 2), kill_after=11 * BATCH + 2)
        return run(name, (1, 2))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, "replicas", (1, 2)), pool.submit(killed, "killed")]
        jobs += [pool.submit(run, "single", (1, 1)), pool.submit(run, "stages", (2, 1))]
        whole, broken, single, stages = (job.result() for job in jobs)
    assert [record["step"] for record in steps_of(whole) if record["skipped"]] == [8, 10, 11, 13]
    assert [record["skipped_so_far"] for record in steps_of(whole)][7:] == [1, 1, 2, 3, 3, 4, 4, 4, 4]
    guard = last(whole).guard
    assert guard is not None
    assert (guard.skipped, guard.rollbacks, guard.spikes, last(whole).updates) == (4, 0, [8, 11], STEPS - 4)
    assert [event["step"] for event in events(whole, "skip")] == [8, 10, 11, 13]
    assert_same(whole, broken)
    for other in (single, stages):
        assert [record["skipped"] for record in steps_of(other)] == [record["skipped"] for record in steps_of(whole)]
        finite = [at for at in range(STEPS) if at + 1 not in (10, 13)]
        assert [losses(other)[at] for at in finite] == pytest.approx([losses(whole)[at] for at in finite], rel=1e-5)


def test_a_run_that_goes_back_is_the_same_killed_stopped_and_in_other_layouts(
    forks: ForkedRuns, recipe: Path, tmp_path: Path
) -> None:
    """Step 5 spikes before there is a checkpoint, steps 8 and 12 of the data afterwards: twice back to step 6."""
    poison = {in_step(5): 1e3, in_step(8): 1e3, in_step(12): 1e3}

    def run(name: str, layout: tuple[int, int], *settings: str, kill_after: int | None = None) -> Path:
        forks.train(
            recipe, tmp_path / name, layout, "guard.spike=rollback", *settings, kill_after=kill_after, poison=poison
        )
        return tmp_path / name

    def killed(name: str) -> Path:
        run(name, (1, 2), kill_after=8 * BATCH + 2)  # within the step after the first rollback
        assert len(events(tmp_path / name, "rollback")) == 1
        run(name, (1, 2), kill_after=6 * BATCH + 2)  # behind the first, to the second, and killed
        assert len(events(tmp_path / name, "rollback")) == 2
        return run(name, (1, 2))

    def stopped(name: str) -> Path:
        run(name, (1, 1), "steps=7")  # its last checkpoint is of no interval
        return run(name, (1, 1))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, "replicas", (1, 2)), pool.submit(killed, "killed")]
        jobs += [
            pool.submit(run, "single", (1, 1)),
            pool.submit(stopped, "stopped"),
            pool.submit(run, "stages", (2, 1)),
        ]
        whole, broken, single, parted, stages = (job.result() for job in jobs)
    assert [record["step"] for record in steps_of(whole) if record["skipped"]] == [5]
    (skip,) = events(whole, "skip")
    assert skip["step"] == 5
    assert "the last checkpoint of an interval is not there" in skip["text"]
    backs = events(whole, "rollback")
    assert [(event["step"], event["details"]["to"]) for event in backs] == [(8, 6), (10, 6)]
    manifest = last(whole)
    assert manifest.guard is not None
    assert (manifest.guard.rollbacks, manifest.guard.undone, manifest.guard.samples_passed) == (2, 6, 24)
    assert (manifest.samples, manifest.updates) == (STEPS * BATCH + 24, STEPS - 1)
    assert max(losses(whole)[:4] + losses(whole)[5:]) < 10
    assert_same(whole, broken)
    assert_same(single, parted)
    for other in (single, stages):
        assert losses(other) == pytest.approx(losses(whole), rel=1e-5)
        assert last(other).guard.samples_passed == 24  # type: ignore[union-attr]


def test_too_many_spikes_end_the_run_with_a_code_of_its_own(forks: ForkedRuns, recipe: Path, tmp_path: Path) -> None:
    poison = {in_step(8): 1e3, in_step(9): 1e3}
    for spike in ("skip", "rollback"):
        ended = forks.train(
            recipe, tmp_path / spike, (1, 1), f"guard.spike={spike}", "guard.limit=2", poison=poison,
            code=DivergedError.exit_code,
        )  # fmt: skip
        (error,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        assert "training has diverged: loss " in error
        assert "spike 2 within 1,000 steps; raise guard.deviations, now 50, or guard.limit, now 2" in error
        assert "step_00000005, from which the run goes on" in error
        assert list_checkpoints(tmp_path / spike / "checkpoints")[-1].name == "step_00000005"


def test_data_that_ends_early_since_samples_were_passed_over(
    forks: ForkedRuns, recipe: Path, stories: Path, tmp_path: Path
) -> None:
    """There is data for one step more than the run takes, and a rollback passes over that of three."""
    ending = stories.with_name("ending.yaml")
    values = yaml.safe_load(stories.read_text())
    (corpus,) = values["corpora"]
    samples = Mixture(stories, RECIPE["seq_len"]).epoch_samples(0)
    values["corpora"] = [
        {"name": corpus["name"], "prefix": corpus["prefix"], "epochs": ((STEPS + 1) * BATCH + 0.4) / samples}
    ]
    ending.write_text(yaml.safe_dump({**values, "on_exhausted": "stop"}))
    settings, run = (f"data.manifest={ending}", "guard.spike=rollback"), tmp_path / "run"
    for _ in range(2):  # the same command ends the same way
        ended = forks.train(recipe, run, (1, 1), *settings, poison={in_step(8): 1e3}, code=DataError.exit_code)
        (error,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        assert error == (
            f"error: {ending}: has no data for step 15 of 16, since rollbacks passed over 12 samples (on_exhausted: "
            "stop); set schedule.steps=14 to end the run here"
        )
    assert len(steps_of(run)) == 14
    forks.train(recipe, run, (1, 1), *settings, "steps=14")
    assert read_manifest(list_checkpoints(run / "checkpoints")[-1]).complete
    assert len(steps_of(run)) == 14
