"""A stand-in for mlflow 3: it knows the runs that are in the file of calls."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from calls import called

from .entities import Metric, Param, RunTag


class MlflowClient:
    """A client."""

    def __init__(self, tracking_uri: str) -> None:
        assert tracking_uri.startswith("sqlite:////")

    def get_experiment_by_name(self, name: str) -> Any:
        """The experiment of a name."""
        self._project = name
        return SimpleNamespace(experiment_id="1") if Path(os.environ["FAKE_CALLS"]).exists() else None

    def create_experiment(self, name: str, artifact_location: str) -> str:
        """Make an experiment."""
        assert artifact_location.startswith("file:///")
        return "1"

    def search_runs(self, experiments: list[str], wanted: str) -> list[Any]:
        """Runs with a tag."""
        assert experiments == ["1"]
        (run_id,) = re.findall("'(.*)'", wanted)
        calls = Path(os.environ["FAKE_CALLS"])
        found = [json.loads(line) for line in calls.read_text("utf-8").splitlines()] if calls.exists() else []
        for each in found:
            if each["call"] == "start" and each["id"] == run_id:
                called("start", id=run_id, name=each["name"], project=self._project, config=each["config"])
                return [SimpleNamespace(info=SimpleNamespace(run_id="ab12"))]
        return []

    def update_run(self, run_id: str, status: str) -> None:
        """Change a run."""
        assert (run_id, status) == ("ab12", "RUNNING")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        """Make a run."""
        self._id, self._name = tags["megazh.run_id"], run_name
        return SimpleNamespace(info=SimpleNamespace(run_id="ab12"))

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        """Add points, parameters and tags."""
        assert run_id == "ab12"
        if params:
            config: dict[str, Any] = {}
            for key, value in params:
                section, _, name = key.partition(".")
                config.setdefault(section, {})[name] = int(value)
            called("start", id=self._id, name=self._name, project=self._project, config=config)
        assert len(metrics) <= 1000
        for step, points in itertools.groupby(metrics, lambda metric: metric.step):
            called("scalars", step=step, **{each.key: each.value for each in points})
        for tag in tags:
            step, text = re.findall(r"step (\d+): (.*)", tag.value, re.DOTALL)[0]
            called("text", step=int(step), text=text)

    def set_terminated(self, run_id: str) -> None:
        """Close a run."""
        called("finish")
