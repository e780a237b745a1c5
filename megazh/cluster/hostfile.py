"""Hostfiles in the format of DeepSpeed and MPI: one host and its number of GPUs per line."""

import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megazh.errors import UsageError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Host(NamedTuple):
    """A machine and the number of ranks that it takes, one per GPU."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts of a hostfile: lines `NAME slots=N`; blank lines and comments after `#` are skipped.

    Raises:
        UsageError: no such file, no host in it, or a line that is not a host, repeats a host, or gives no slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(f"-H {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"-H {path}: cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"{path}:{number}: expected a line such as 'gpu1 slots=6', found {line!r}")
        host = Host(match[1], int(match[2]))
        if host.slots < 1:
            raise UsageError(f"{path}:{number}: {host.name} has slots=0; give at least 1, or remove the line")
        if host.name in hosts:
            raise UsageError(f"{path}:{number}: {host.name} is named twice; give each host one line")
        hosts[host.name] = host
    if not hosts:
        raise UsageError(f"{path}: no host in it; add lines such as 'localhost slots=6'")
    return list(hosts.values())


def is_this_machine(hosts: Sequence[Host]) -> bool:
    """Whether the hosts are this machine alone, so that its ranks need no ssh."""
    return len(hosts) == 1 and (hosts[0].name in _LOCAL or hosts[0].name == socket.gethostname())
