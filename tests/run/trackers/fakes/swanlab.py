"""A stand-in for swanlab 0.10 without an API key."""

from pathlib import Path
from typing import Any

from calls import called


class Settings:
    """The settings that are used."""

    api_key = None

    class Terminal:
        """What is captured of the terminal."""

        def __init__(self, *, proxy_type: str) -> None:
            assert proxy_type == "none"

    def __init__(self, *, interactive: bool, terminal: Terminal, log_dir: Path) -> None:
        assert not interactive


class Text:
    """A text."""

    def __init__(self, text: str) -> None:
        self.text = text


class Run:
    """A run."""

    mode = "offline"

    def log(self, data: dict[str, Any], step: int) -> None:
        """Add points."""
        texts = [value.text for value in data.values() if isinstance(value, Text)]
        called("text" if texts else "scalars", step=step, **({"text": texts[0]} if texts else data))

    def finish(self) -> None:
        """Close the run."""
        called("finish")


def init(*, id: str, resume: str, mode: str, settings: Settings, **arguments: Any) -> Run:
    """Open a run."""
    assert (resume, mode) == ("allow", "offline")
    called("start", id=id, name=arguments["name"], project=arguments["project"], config=arguments["config"])
    return Run()
