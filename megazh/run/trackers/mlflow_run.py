"""A run in MLflow (mlflow.org/docs)."""

import os
import posixpath
import re
import time
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from megazh.run.trackers.tracker import TrackedRun

_RUN_ID = "megazh.run_id"
"""Tag by which a run is found again: MLflow chooses ids itself."""
_PARAMETERS, _LONGEST, _POINTS = 100, 500, 1000
"""Parameters in one call, characters of a value, and points in one call that every server takes."""

_ODD, _LONGEST_NAME = re.compile(r"[^\w\-. :/]|\.\."), 200


class MlflowRun:
    """See `Tracker`."""

    def start(self, run: TrackedRun) -> str:
        """Open the run at MLFLOW_TRACKING_URI, else in `mlflow.db` in its folder."""
        self._points: list[Metric] = []
        self._names: dict[str, str] = {}
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve()}/mlflow.db"
        self._client = MlflowClient(tracking_uri=place)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        experiment = self._client.get_experiment_by_name(project)
        if experiment is not None:
            number = experiment.experiment_id
        else:
            artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (run.folder / "mlflow").resolve().as_uri()
            number = self._client.create_experiment(project, artifact_location=artifacts)
        found = self._client.search_runs([number], f"tags.`{_RUN_ID}` = '{run.run_id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, run_name=run.name, tags={_RUN_ID: run.run_id}).info.run_id
            parameters = [Param(key, str(value)[:_LONGEST]) for key, value in _flat(run.config)]
            for begin in range(0, len(parameters), _PARAMETERS):
                self._client.log_batch(self._id, params=parameters[begin : begin + _PARAMETERS])
        return f"{place}, run {self._id}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        now = time.time_ns() // 1_000_000
        self._points += [Metric(self._name_of(curve), value, now, step) for curve, value in values.items()]

    def text(self, step: int, name: str, text: str) -> None:
        """Set a tag: the latest text of a name, with its step. MLflow has no texts over steps."""
        self._client.log_batch(self._id, tags=[RunTag(name, f"step {step}: {text}"[:_LONGEST])])

    def flush(self) -> None:
        """Send the points: a call for each step would take longer than the step of a small model."""
        points, self._points = self._points, []
        for begin in range(0, len(points), _POINTS):
            self._client.log_batch(self._id, points[begin : begin + _POINTS])

    def finish(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)

    def _name_of(self, curve: str) -> str:
        """The name of a curve: MLflow refuses some characters, and whatever is no plain path. None is given twice."""
        if curve not in self._names:
            name = posixpath.normpath(_ODD.sub("_", curve))[:_LONGEST_NAME]
            while name in self._names.values():
                name += "_"
            self._names[curve] = name
        return self._names[curve]


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
