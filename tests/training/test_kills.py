"""A run that is killed again and again, at random points and while it saves, is the run that nobody interrupted."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked_runs import Ended, ForkedRuns, start_forks
from recipes import TINY_RUN, in_sections

from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, newest_good
from megazh.training.checkpoint_report import verify

KILLS = int(os.environ.get("MEGAZH_TEST_KILLS", "24"))
"""Number of kills; 100 take several minutes."""
pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(240 + 6 * KILLS)]

SEED = 20261128
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
STEPS = 40 + 8 * KILLS
RECIPE: dict[str, Any] = {**TINY_RUN, "steps": STEPS, "checkpoint_every": 1, "keep_last": 2, "max_grad_norm": 0.5}
BATCH = RECIPE["global_batch_size"]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    """The process that runs are forked from."""
    with start_forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


def samples_of(ended: Ended) -> dict[tuple[int, int], str]:
    """Hash of each sample that was consumed, by step and number; the number must be one of that step's."""
    found = {}
    for batch in ended.fed:
        for number, digest in batch["samples"]:
            assert (number // BATCH) + 1 == batch["step"]
            assert found.setdefault((batch["step"], number), digest) == digest, "all stages get the same"
    return found


def losses(run: Path) -> dict[int, float]:
    """Loss of each step; no step may be missing or recorded twice."""
    records = [record for record in read_metrics(run) if record["kind"] == "step"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: record["loss"] for record in records}


def test_a_run_killed_at_random_points_is_the_whole_run(forks: ForkedRuns, stories: Path, tmp_path: Path) -> None:
    recipe, whole, run = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    wanted = samples_of(forks.train(recipe, whole, (1, 1), "checkpoint_every=0"))
    assert sorted(wanted) == [(number // BATCH + 1, number) for number in range(STEPS * BATCH)]
    choose, kept, consumed = random.Random(SEED), 0, set[tuple[int, int]]()
    for kill in range(KILLS + 1):
        layout = choose.choice(LAYOUTS)
        after, delay = choose.choice([0, *range(1, 30)]), choose.random()
        what = f"kill {kill} of seed {SEED}: {layout}, after {after} micro-batches, delay {delay:.4f}"
        newest = newest_good(run / "checkpoints")
        begin = newest[1].step if newest else 0
        assert begin >= kept, f"{what}: a finished checkpoint is gone"
        kept = begin
        if kill == KILLS:
            ended = forks.train(recipe, run, layout, "checkpoint_every=50")  # nobody interrupts it
        else:
            ended = forks.train(recipe, run, layout, kill_after=after, delay=delay * (0.05 if after else 1.5))
            assert ended.killed, f"{what}: {ended.output}"
        found = samples_of(ended)
        assert all(wanted[place] == digest for place, digest in found.items()), what
        if found:
            assert min(found) == (begin + 1, begin * BATCH), f"{what}: it does not go on at step {begin}"
        consumed |= found.keys()
        if list_checkpoints(run / "checkpoints"):
            assert all(line.endswith(": whole") for line in verify(run, [])), what
    assert consumed == wanted.keys()
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(run)) == STEPS
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []
    assert len(list_checkpoints(run / "checkpoints")) <= RECIPE["keep_last"] + 1
