"""A run that is interrupted or killed, and resumed, ends with the bits of an uninterrupted one; dropout is on.

What is interrupted is the command itself; what runs to its end is forked, which spares the imports.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import ForkedRuns, start_forks
from processes import start_command, wait_until
from recipes import in_sections
from safetensors.torch import load_file

from megazh.config import from_mapping
from megazh.errors import INTERRUPTED
from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.split import best_bounds
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 24, 4
BLOCKS = 4
RECIPE = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "residual_dropout": 0.1,
    },
    "seq_len": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "steps": STEPS,
    "learning_rate": 1e-2,
    "warmup": 4,
    "checkpoint_every": EVERY,
    "validate_every": 8,
    "validation_samples": 5,
    "sample_tokens": 4,
    "max_grad_norm": 0.5,
    "dtype": "fp32",
}


@pytest.fixture
def recipe(stories: Path, tmp_path: Path) -> Path:
    """A recipe on an index of 200 stories."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the process that runs are forked from."""
    return tmp_path_factory.mktemp("forks")


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[ForkedRuns]:
    """The process that runs are forked from."""
    with start_forks(folder) as started:
        yield started


class Attempts:
    """Attempts to run one recipe in one layout; all share the cache of the forks in the folder `forks_folder`."""

    def __init__(
        self, forks: ForkedRuns, forks_folder: Path, recipe: Path, ranks: int, stages: int, settings: list[str]
    ) -> None:
        self._forks, self._recipe, self._layout = forks, recipe, (stages, ranks // stages)
        self._folder, self._settings = recipe.parent, settings
        self.cache = forks_folder / "cache"
        self._command = [sys.executable, "-m", "megazh", "pretrain", "-c", recipe, "--device", "cpu"]
        self._command += ["-n", str(ranks), "-p", str(stages), *settings]
        self._env = {
            "MEGAZH_CACHE": str(self.cache),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }

    def to_the_end(self, run: Path) -> str:
        """Run to the end, without an error; returns the output."""
        return self._forks.train(self._recipe, run, self._layout, *self._settings, limit=240).output

    def ended_by(self, number: signal.Signals, run: Path, step: int) -> int:
        """Run until `step` is done, then send a signal; returns the number of steps recorded by then."""
        with start_command([*self._command, "-r", run], self._env, self._folder) as running:
            wait_until(
                lambda: steps_of(run) >= step or running.process.poll() is not None, 240, f"step {step} of {run}"
            )
            running.process.send_signal(number)
            finished = running.wait(90)
            wait_until(lambda: not running.descendants(), 30, "the ranks end with the launcher")
        assert finished.returncode == (-number if number == signal.SIGKILL else INTERRUPTED), finished
        return steps_of(run)


def steps_of(run: Path) -> int:
    """Number of steps that a run has recorded so far; the last line may be incomplete."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def newest(run: Path) -> Path:
    """The newest checkpoint."""
    return list_checkpoints(run / "checkpoints")[-1]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """All recorded results of a run, in order, without times and without events."""
    names = ("kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "skipped", "bits_per_byte", "text")
    records = [record for record in read_metrics(run) if record["kind"] != "event"]
    return [tuple(record.get(name) for name in names) for record in records]


def events(run: Path) -> list[tuple[str, int]]:
    """Names and steps of what happened to a run."""
    return [(record["name"], record["step"]) for record in read_metrics(run) if record["kind"] == "event"]


def assert_same(one: Path, other: Path) -> None:
    """Check that records, weights and optimizer states are equal, bit for bit."""
    assert curve(one) == curve(other)
    assert newest(one).name == newest(other).name == f"step_{STEPS:08d}"
    assert read_manifest(newest(one)).bounds == read_manifest(newest(other)).bounds
    files = {entry.name for entry in read_manifest(newest(one)).files}
    assert files == {entry.name for entry in read_manifest(newest(other)).files}
    compared = 0
    for name in files:
        first, second = load_file(newest(one) / name), load_file(newest(other) / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), f"{name}: {key}"
            compared += tensor.numel()
    assert compared > 3 * 512 * 32, "weights and both moments"


@pytest.mark.parametrize(
    ("ranks", "stages", "settings"),
    [(1, 1, []), (2, 2, ["model.tie_word_embeddings=false", "activation_checkpointing=true"]), (4, 2, [])],
)
def test_the_same_bits_after_a_kill(
    forks: ForkedRuns, folder: Path, recipe: Path, tmp_path: Path, ranks: int, stages: int, settings: list[str]
) -> None:
    attempts = Attempts(forks, folder, recipe, ranks, stages, settings)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    attempts.to_the_end(whole)
    lost = attempts.ended_by(signal.SIGKILL, broken, EVERY + 2)
    kept = read_manifest(newest(broken)).step
    assert EVERY <= kept <= lost < STEPS
    assert kept % EVERY == 0
    (broken / "checkpoints" / ".step_00000099.unfinished" / "weights").mkdir(parents=True)
    assert f"resumed at step {kept} of {STEPS}" in attempts.to_the_end(broken)
    assert [path.name for path in (broken / "checkpoints").glob(".*")] == []
    assert events(broken) == [("start", 0), ("resume", kept)]
    assert_same(whole, broken)


def test_the_same_bits_after_ctrl_c_and_a_kill_in_bf16(
    forks: ForkedRuns, folder: Path, recipe: Path, tmp_path: Path
) -> None:
    """Stages are cut by measured times; a later measurement must not move the layers of a run that has begun."""
    attempts = Attempts(forks, folder, recipe, 2, 2, ["dtype=bf16", "stage_costs=measured"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    attempts.to_the_end(whole)
    attempts.ended_by(signal.SIGINT, broken, 2)
    stopped = read_manifest(newest(broken))
    assert 2 <= stopped.step < STEPS
    assert steps_of(broken) == stopped.step, "the step that was running is saved"
    (note,) = (attempts.cache / "timings").iterdir()
    values = json.loads(note.read_text())
    values["costs"]["embedding"] = values["costs"]["block"] * 100
    note.write_text(json.dumps(values))
    assert best_bounds(from_mapping(values["costs"], LayerCosts, "").parts(BLOCKS), 2) != stopped.bounds
    attempts.ended_by(signal.SIGKILL, broken, stopped.step + EVERY + 1)
    attempts.to_the_end(broken)
    assert_same(whole, broken)
