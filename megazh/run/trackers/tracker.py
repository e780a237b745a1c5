"""The interface of a tracker, the names of those there are, and the check for their packages."""

import importlib
import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol


class TrackerName(StrEnum):
    """Services that a run can be shown in. Each needs a package of its own: `pip install megazh[NAME]`."""

    WANDB = "wandb"
    """Weights & Biases; offline without an API key. WANDB_MODE and its other variables hold."""
    SWANLAB = "swanlab"
    """SwanLab; offline without an API key. SWANLAB_MODE and its other variables hold."""
    MLFLOW = "mlflow"
    """MLflow at MLFLOW_TRACKING_URI, else in an SQLite file in the run folder."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given of a run."""

    run_id: str
    """Id of the run, by which a tracker finds it again on resume."""
    name: str
    """Name to show."""
    project: str
    """Name of the project, or of the experiment in MLflow, that the run belongs to."""
    config: dict[str, Any]
    """The recipe, in sections, as JSON values."""
    folder: Path
    """Folder for files of the tracker; exists."""


class Tracker(Protocol):
    """One service. A call may take as long as it likes, and may raise anything: nothing waits for it."""

    def start(self, run: TrackedRun) -> str:
        """Open the run, or open it again where the service has its id; returns where it is shown."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add points to curves at a step. Numbers need not be finite."""

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text: a sample, or an event."""

    def flush(self) -> None:
        """Send what was added so far; called twice a second at most, and after each piece of a long history."""

    def finish(self) -> None:
        """Send what is left, and close the run."""


_ADAPTERS = {
    TrackerName.WANDB: ("wandb", "megazh.run.trackers.wandb_run", "WandbRun"),
    TrackerName.SWANLAB: ("swanlab", "megazh.run.trackers.swanlab_run", "SwanlabRun"),
    TrackerName.MLFLOW: ("mlflow", "megazh.run.trackers.mlflow_run", "MlflowRun"),
}
"""Of each tracker: its package, and the module and name of the class that calls it."""


def is_installed(name: TrackerName) -> bool:
    """Whether the package of a tracker is installed; it is not imported."""
    found = importlib.util.find_spec(_ADAPTERS[name][0])
    return found is not None and found.origin is not None  # without: a folder of that name, such as wandb makes


def make_tracker(name: TrackerName) -> Tracker:
    """Import the package of a tracker; raises ImportError where it is missing or broken."""
    _, module, adapter = _ADAPTERS[name]
    made: Tracker = getattr(importlib.import_module(module), adapter)()
    return made
