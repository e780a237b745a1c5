"""A child process of an examination: `python -m megazh.cluster.doctor.probe SUBJECT ARGUMENTS FILE`.

It appends what it finds to FILE, an object of JSON per line, at once: where it hangs, the line before says in what.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROBES = ("cuda", "copies", "pairs", "kernels")
"""Modules of `megazh.cluster.doctor.probes`, each with `probe(report, **arguments)`."""

Report = Callable[[dict[str, Any]], None]


def main(subject: str, arguments: str, path: str) -> None:
    """Run one probe."""
    if subject not in PROBES:
        raise ValueError(f"{subject}: expected one of {', '.join(PROBES)}")
    module = importlib.import_module(f"megazh.cluster.doctor.probes.{subject}")
    with open(Path(path), "a", encoding="utf-8") as file:

        def report(values: dict[str, Any]) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        module.probe(report, **json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
