"""A run in SwanLab (docs.swanlab.cn)."""

import os
from typing import Any

import swanlab

from megazh.run.trackers.tracker import TrackedRun


class SwanlabRun:
    """See `Tracker`."""

    def start(self, run: TrackedRun) -> str:
        """Open the run: online where an API key is configured, else offline; SWANLAB_MODE decides otherwise."""
        place = run.folder / "swanlab"
        settings = swanlab.Settings(
            interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none"), log_dir=place
        )
        arguments: dict[str, Any] = {
            "id": run.run_id,
            "resume": "allow",
            "name": run.name,
            "project": os.environ.get("SWANLAB_PROJ_NAME", run.project),
            "config": run.config,
            "log_dir": str(place),
            "settings": settings,
        }
        offline = "SWANLAB_MODE" not in os.environ and settings.api_key is None
        self._run = swanlab.init(**arguments, mode="offline") if offline else swanlab.init(**arguments)
        if self._run.mode == "online":
            return str(self._run.url)
        return f"{self._run.mode} in {place}" + ("; 'swanlab sync' sends it" if self._run.mode == "offline" else "")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text."""
        self._run.log({name: swanlab.Text(text)}, step=step)

    def flush(self) -> None:
        """Nothing: SwanLab sends by itself."""

    def finish(self) -> None:
        """Wait until all is sent."""
        self._run.finish()
