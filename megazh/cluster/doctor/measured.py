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

    def describe(self) -> str:
        """The line of a plan that names what was measured."""
        between_gpus = f"{self.gpus:.1f} GB/s between GPUs" if self.gpus else "nothing between GPUs"
        between_hosts = f"{self.hosts:.2f} GB/s between hosts" if self.hosts else "nothing between hosts"
        return f"measured on {self.host}: {between_gpus}, {between_hosts}; the recipe's figures stand for the rest"


def keep(reports: list[Report], between: list[Pair]) -> None:
    """Keep the links of each host, and those between hosts; without new ones, what was measured before stays."""
    own = socket.gethostname()
    for host in {own, *(report.host for report in reports)}:
        report = next((each for each in reports if each.host == host), None)
        before = _read(_path(host))
        if not between and not (report and report.pairs):
            continue
        cards, pairs = (report.cards, report.pairs) if report and report.pairs else ([], [])
        if not pairs and before is not None:
            cards, pairs = before.cards, before.pairs
        links = between or (before.between if before else [])
        note = _Note(version=_VERSION, host=host, cards=cards, pairs=pairs, between=links)
        try:
            write_atomic(_path(host), note.model_dump_json(indent=1).encode(), durable=False)
        except OSError as error:  # megazh plan --measured asks for another examination
            warn_not_kept(cache_dir(), error)


def measured(between_hosts: bool = False, host: str | None = None) -> Bandwidths:
    """The bandwidths that an examination of a host, by default this one, has measured.

    Args:
        between_hosts: the plan is for several hosts, so that the network is needed as well.
        host: name of the host.

    Raises:
        UsageError: what is needed was not measured.
    """
    host = host or socket.gethostname()
    note = _read(_path(host))
    found = Bandwidths(_slowest(note.pairs), _slowest(note.between), host) if note else Bandwidths(None, None, host)
    if found.gpus is None:
        raise UsageError(
            f"--measured: no links between GPUs of {host} are measured; run 'megazh doctor' here first (it needs two "
            "GPUs), or give --bandwidth in its place"
        )
    if between_hosts and found.hosts is None:
        raise UsageError(
            f"--measured: no links from {host} to other hosts are measured; run 'megazh doctor --srun' or --hostfile "
            "first, or give --network in its place"
        )
    return found


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
