"""A run in Weights & Biases (docs.wandb.ai)."""

import os
from typing import Any

import wandb

from megazh.run.trackers.tracker import TrackedRun

_STEP = "step"
"""Key that curves are drawn over. wandb's own step may not fall, and counts calls here."""


class WandbRun:
    """See `Tracker`."""

    def start(self, run: TrackedRun) -> str:
        """Open the run: online where an API key is configured, else offline; WANDB_MODE decides otherwise."""
        # Silent: without, wandb would ask for a key at the terminal.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        arguments: dict[str, Any] = {
            "id": run.run_id,
            "resume": "allow",
            "name": run.name,
            "project": os.environ.get("WANDB_PROJECT", run.project),
            "config": run.config,
            "dir": str(run.folder),
            "allow_val_change": True,
            "settings": settings,
        }
        try:
            self._run = wandb.init(**arguments)
        except wandb.errors.UsageError:  # no API key is configured
            if "WANDB_MODE" in os.environ:
                raise
            self._run = wandb.init(**arguments, mode="offline")
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        if not self._run.offline:
            return str(self._run.url)
        return f"offline in {run.folder}/wandb; 'wandb sync' sends it"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        self._run.log({_STEP: step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """Add a row with a text."""
        self._run.log({_STEP: step, name: text})

    def flush(self) -> None:
        """Nothing: wandb sends by itself."""

    def finish(self) -> None:
        """Wait until all is sent."""
        self._run.finish()
