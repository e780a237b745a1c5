"""Hostfiles in the format of DeepSpeed and Open MPI: one host and its number of GPUs per line."""

import re
import socket
from collections.abc import Sequence
from pathlib import Path

from megazh.errors import UsageError
from megazh.training.job import Host

_LINE = re.compile(r"(\S+)\s+slots=(\d+)", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LOCAL = {"localhost", "127.0.0.1"}
_MOST_SLOTS = 1024


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts of a hostfile: lines `NAME slots=N`; blank lines and comments after `#` are skipped.

    DeepSpeed's reader (`deepspeed.launcher.runner.fetch_hostfile`) finds the same hosts in each file that is accepted
    here. It accepts more: words after the slots, no slots, and names that ssh, pdsh or `--include` take for something
    else.

    Raises:
        UsageError: no such file, no host in it, or a line that is not a host, repeats a host, gives no slots, or names
            a host in another way than by a host name or an IPv4 address.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(_lines(path), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"{path}:{number}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"{where}: expected a line such as 'gpu1 slots=6', found {line[:80]!r}")
        name, slots = match[1], match[2].lstrip("0") or "0"
        _check_name(name, where)
        if slots == "0":
            raise UsageError(f"{where}: {name[:80]} has slots=0; give at least 1, or remove the line")
        if len(slots) > 4 or int(slots) > _MOST_SLOTS:
            raise UsageError(
                f"{where}: {name[:80]} has slots={slots[:20]}; give its number of GPUs, at most {_MOST_SLOTS}"
            )
        if name.lower() in hosts:
            raise UsageError(f"{where}: {name[:80]} is named twice; give each host one line")
        hosts[name.lower()] = Host(name, int(slots))
    if not hosts:
        raise UsageError(f"{path}: no host in it; add lines such as 'localhost slots=6'")
    return list(hosts.values())


def is_this_machine(hosts: Sequence[Host]) -> bool:
    """Whether the hosts are this machine alone, so that its ranks need no ssh."""
    return len(hosts) == 1 and (hosts[0].name in _LOCAL or hosts[0].name == socket.gethostname())


def _lines(path: Path) -> list[str]:
    """The lines of a text file, split as DeepSpeed's reader does: at line feeds and carriage returns only."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"-H {path}: cannot be read: not a regular file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"-H {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"-H {path}: cannot be read: {error}") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise UsageError(f"{path}:1: begins with a byte order mark; save it as plain UTF-8 text")
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{number}: not UTF-8 text; save it as plain UTF-8 text") from None


def _check_name(name: str, where: str) -> None:
    """Refuse a name that ssh, pdsh or DeepSpeed's `--include` would not take for a host."""
    if _NAME.fullmatch(name):
        return
    ssh = "in ~/.ssh/config, and write its name here"
    if "@" in name:
        remedy = f"set `User` for the host {ssh}"
    elif ":" in name:
        remedy = f"pdsh takes no IPv6 address and no port: give the host a name with `HostName` or `Port` {ssh}"
    else:
        remedy = "give each host a line of its own, with a host name of a-z, 0-9, '.', '-' and '_', or an IPv4 address"
    raise UsageError(f"{where}: {name[:80]!r} is not a host name; {remedy}")
