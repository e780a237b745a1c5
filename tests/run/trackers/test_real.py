"""The packages of trackers themselves, offline, where they are installed: a killed and resumed run, each step once."""

from pathlib import Path

import pytest
from run.test_metrics import record
from run.trackers.test_start import train

from megazh.run.trackers import start
from megazh.run.trackers.tracker import TrackerName, is_installed

pytestmark = [pytest.mark.slow]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No service is asked, and slow machines have time."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "_FINISH_SECONDS", 90.0)


def skip_without(name: TrackerName) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("name", TrackerName)
def test_a_resumed_run_is_taken(name: TrackerName, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without(name)
    train(tmp_path, name, 0, 9)
    train(tmp_path, name, 4, 13)
    out = capsys.readouterr().out
    assert "warning" not in out, (tmp_path / "run" / "trackers" / f"{name}.log").read_text()
    place = tmp_path / "run" / "trackers"
    (kept, shown) = {
        TrackerName.WANDB: ("wandb/offline-run-*/*.wandb", "offline in"),
        TrackerName.SWANLAB: ("swanlab/run-*/*.swanlab", "offline in"),
        TrackerName.MLFLOW: ("mlflow.db", "sqlite:///"),
    }[name]
    assert list(place.glob(kept))
    assert out.count(f"{name:<12}{shown}") == 2


def test_mlflow_takes_corpora_of_any_name() -> None:
    skip_without(TrackerName.MLFLOW)
    from mlflow.utils.validation import _validate_metric_name

    from megazh.run.trackers.mlflow_run import MlflowRun

    tracker = MlflowRun()
    tracker._names = {}
    odd = [
        "wiki(zh)",
        "wiki[zh]",
        "a..b",
        "../up",
        "x%y#z",
        "a//b",
        "a/b",
        "名，字",
        "n" * 300,
        "n" * 301,
        "tail/",
        "\\",
        ".",
    ]
    names = [tracker._name_of(f"validation/{name}/loss") for name in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        _validate_metric_name(name)
    assert tracker._name_of("validation/wiki[zh]/loss") == names[1] == "validation/wiki_zh_/loss_"


def test_mlflow_holds_each_step_once(tmp_path: Path) -> None:
    skip_without(TrackerName.MLFLOW)
    from mlflow import MlflowClient

    for first, last in ((0, 9), (4, 8), (6, 13)):
        train(tmp_path, "mlflow", first, last)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/trackers/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("china").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, record(step).loss) for step in range(1, 14)]
    corpus = client.get_metric_history(run.info.run_id, "validation/维基/perplexity")
    assert [point.step for point in corpus] == [4, 8, 12]
    assert "validation/C__/loss" in run.data.metrics
    assert run.data.params["batch.seq_len"] == "64"
    assert run.data.tags["event/resume"] == "step 6: begun at 6"
