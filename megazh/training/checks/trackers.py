"""The packages of the trackers that a recipe names."""

from collections.abc import Iterator

from megazh.errors import Collector, UsageError
from megazh.run.trackers.tracker import is_installed
from megazh.training.job import Case


def packages(case: Case) -> Iterator[str]:
    """The package of each tracker is installed."""
    found = Collector()
    for name in case.recipe.logging.trackers:
        if not is_installed(name):
            found.add(
                UsageError(f"logging.trackers: {name} is not installed; pip install 'megazh[{name}]', or leave it out")
            )
    found.raise_all()
    yield from ()
