"""A stand-in for wandb 0.31: no API key is configured, so that it refuses to begin unless offline."""

import os
from typing import Any

from calls import called

from . import errors


class Settings:
    """The settings that are used."""

    def __init__(self, *, console: str, silent: bool, disable_git: bool, disable_code: bool) -> None:
        assert (console, silent) == ("off", True), "or it takes over the output, and asks for a key"


class Run:
    """A run."""

    offline = True

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Choose the axis of curves."""

    def log(self, data: dict[str, Any]) -> None:
        """Add a row."""
        step = data.pop("step")
        texts = [value for value in data.values() if isinstance(value, str)]
        called("text" if texts else "scalars", step=step, **({"text": texts[0]} if texts else data))

    def finish(self) -> None:
        """Close the run."""
        called("finish")


def init(*, id: str, resume: str, settings: Settings, mode: str | None = None, **arguments: Any) -> Run:
    """Open a run."""
    if (mode or os.environ.get("WANDB_MODE")) != "offline":
        raise errors.UsageError("No API key configured. Use `wandb login` to log in.")
    assert resume == "allow"
    called("start", id=id, name=arguments["name"], project=arguments["project"], config=arguments["config"])
    return Run()
