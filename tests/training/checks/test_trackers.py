"""Packages of trackers that are not installed are refused before anything starts."""

from pathlib import Path

import pytest
from cases import make_case

from megazh.errors import SeveralErrors
from megazh.training.checks import trackers
from megazh.training.preflight import CHECKS, CHECKS_OF, warnings_of

FAKES = Path(__file__).parents[2] / "run" / "trackers" / "fakes"


def test_each_package_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SeveralErrors) as refused:
        warnings_of(make_case(tmp_path, trackers=["wandb", "mlflow"]), [trackers.packages])
    assert [str(error).partition(" (")[0] for error in refused.value.errors] == [
        f"logging.trackers: {name} is not installed; pip install 'megazh[{name}]', or leave it out"
        for name in ("wandb", "mlflow")
    ]


def test_a_package_that_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    assert warnings_of(make_case(tmp_path, trackers=["swanlab"]), [trackers.packages]) == []


def test_both_engines_check_it() -> None:
    assert trackers.packages in CHECKS
    assert all(trackers.packages in checks for checks in CHECKS_OF.values())
