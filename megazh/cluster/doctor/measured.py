"""Measured links, kept in the cache for `megazh plan --measured`."""

import hashlib
import json
import socket
from pathlib import Path
from typing import NamedTuple

from megazh.caches import cache_dir, warn_not_kept
from megazh.cluster.doctor.report import Pair, Report
from megazh.config import Config, from_mapping
from megazh.errors import UsageError
from megazh.files import write_atomic

_VERSION = 1


class _Note(Config):
    version: int
    host: str
    cards: list[str]
    pairs: list[Pair]
    """Between GPUs of this host."""
    between: list[Pair]
    """Between hosts."""


class Bandwidths(NamedTuple):
    """Measured GB/s in each direction, of the slowest pair; None where nothing was measured."""

    gpus: float | None
    hosts: float | None
    host: str


def keep(report: Report, between: list[Pair]) -> None:
    """Keep the links of the host that runs this; without any, what was measured before stays."""
    before = _read(_path(report.host))
    pairs = report.pairs or (before.pairs if before else [])
    links = between or (before.between if before else [])
    if not report.pairs and not between:
        return
    note = _Note(version=_VERSION, host=report.host, cards=report.cards, pairs=pairs, between=links)
    try:
        write_atomic(_path(report.host), note.model_dump_json(indent=1).encode(), durable=False)
    except OSError as error:  # megazh plan --measured asks for another examination
        warn_not_kept(cache_dir(), error)


def measured(host: str | None = None) -> Bandwidths:
    """The bandwidths that an examination of a host, by default this one, has measured.

    Raises:
        UsageError: nothing was measured here.
    """
    host = host or socket.gethostname()
    note = _read(_path(host))
    remedy = "run 'megazh doctor' here first (two GPUs or more), or give --bandwidth and --network"
    if note is None:
        raise UsageError(f"--measured: the links of {host} are not measured; {remedy}")
    bandwidths = Bandwidths(_slowest(note.pairs), _slowest(note.between), host)
    if bandwidths.gpus is None and bandwidths.hosts is None:
        raise UsageError(f"--measured: the examination of {host} measured no link; {remedy}")
    return bandwidths


def _slowest(pairs: list[Pair]) -> float | None:
    return min((pair.send_gb_s for pair in pairs if pair.send_gb_s), default=None)


def _path(host: str) -> Path:
    return cache_dir() / "doctor" / f"{hashlib.sha256(host.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> _Note | None:
    try:
        values = json.loads(path.read_bytes())
        note = from_mapping(values, _Note, str(path)) if isinstance(values, dict) else None
    except (OSError, ValueError, UsageError):  # nothing there, or damaged: measured anew
        return None
    return note if note is not None and note.version == _VERSION else None
