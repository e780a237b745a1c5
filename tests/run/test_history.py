"""Records of a run over tokens, steps and hours."""

import math
from pathlib import Path

import numpy as np
import pytest

from megazh.errors import UsageError
from megazh.run.history import Axis, History, Mark, Measure, drawable_history, read_history
from megazh.run.metrics import Metrics
from megazh.run.records import CorpusValidation


def step(number: int, **changes: object) -> dict:
    """A record of a step, as far as it is drawn: 100 tokens and an hour for each."""
    values = {"step": number, "tokens": 100 * number, "loss": 3.0, "step_seconds": 3600.0, "skipped": False}
    return {**values, **changes}


def test_positions_on_each_axis() -> None:
    history = History(Path("run"), steps=[step(1), step(2), step(4, tokens=500, step_seconds=7200.0)])
    at = np.array([0, 1, 3, 4])
    assert history.positions(at, Axis.STEPS).tolist() == [0, 1, 3, 4]
    assert history.positions(at, Axis.TOKENS).tolist() == [0, 100, 350, 500]
    assert history.positions(at, Axis.HOURS).tolist() == [0, 1, 3, 4]


def test_bits_of_training_by_the_newest_usable_validation() -> None:
    validations = [
        {"step": 1, "loss": 4.0, "bits_per_byte": 2.0},
        {"step": 2, "loss": 3.0, "bits_per_byte": 1.2},
        {"step": 3, "loss": math.nan, "bits_per_byte": math.nan},
        {"step": 4, "loss": 3.0, "bits_per_byte": None},
    ]
    history = History(Path("run"), steps=[step(1)], validations=validations)
    assert np.allclose(history.training(Measure.BITS), [1.2])
    assert history.training(Measure.LOSS).tolist() == [3.0]
    steps, values = history.validation(Measure.BITS)
    assert steps.tolist() == [1, 2, 3, 4]
    assert values[:2].tolist() == [2.0, 1.2]


def test_validation_by_corpus_where_it_is_recorded(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.validation(0, 0, 4.0, 2.0, 5)
        metrics.validation(2, 512, 3.0, 1.2, 5, {"法律": CorpusValidation.of(2.5, 1.0, 5)})
    history = read_history(tmp_path)
    for measure, value in ((Measure.LOSS, 2.5), (Measure.BITS, 1.0)):
        ((name, (steps, values)),) = history.validation_of_corpora(measure).items()
        assert (name, steps.tolist(), values.tolist()) == ("法律", [2], [value])


def test_a_skipped_step_is_one_mark() -> None:
    events = [{"step": 2, "name": "skip"}, {"step": 1, "name": "resume"}]
    history = History(Path("run"), steps=[step(1), step(2, skipped=True)], events=events)
    assert history.marks() == [Mark(1, "resume"), Mark(2, "skip")]


def test_a_run_without_a_step_cannot_be_drawn(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.validation(0, 0, 11.9, 4.0, 3)
    with pytest.raises(UsageError, match="no step is recorded yet"):
        drawable_history(tmp_path)
