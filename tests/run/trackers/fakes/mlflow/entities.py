"""Values of mlflow."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A point."""

    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    """A parameter."""

    key: str
    value: str


class RunTag(NamedTuple):
    """A tag."""

    key: str
    value: str
