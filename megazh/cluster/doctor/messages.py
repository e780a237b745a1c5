"""What an examination of several hosts sends over the standard input and output of the process on each host.

To a host: an object of JSON per line. From a host: an object in pieces, since srun may cut long lines, and since login
scripts may print lines of their own in between: `@KIND NUMBER COUNT TEXT`, numbered from 1.
"""

import json
import re
import sys
from typing import Any

from megazh.config import Config

_PIECE = 400
_MOST_PIECES = 4096
_LINE = re.compile(r"@([a-z]{1,20}) (\d{1,5}) (\d{1,5}) (.*)", re.ASCII)


class Order(Config):
    """First line to a host."""

    secret: str
    """Random text of this examination, which connections between hosts have to prove."""
    folder: str
    limit: float
    recipe: str
    settings: list[str]


class Hello(Config):
    """First message of a host."""

    host: str
    id: str
    """Random name of its file on the shared disk."""
    addresses: list[str]
    port: int


class Seen(Config):
    """What a host finds about another one, both by their numbers."""

    peer: int
    address: str
    """Address at which it was reached; empty if at none."""
    failure: str
    ahead: float
    """Seconds by which the other's clock is ahead."""
    file_seconds: float | None
    """Seconds until its file was seen; None: not within the time."""


class Rate(Config):
    """Speed of one TCP connection to another host."""

    peer: int
    gb_s: float


def send(kind: str, value: dict[str, Any]) -> None:
    """Print an object for the examining process."""
    text = json.dumps(value)
    pieces = [text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE)]
    for number, piece in enumerate(pieces, 1):
        print(f"@{kind} {number} {len(pieces)} {piece}", flush=True)
    sys.stdout.flush()


class Assembler:
    """Puts the pieces of one host's messages together."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, line: str) -> tuple[str, dict[str, Any]] | None:
        """Take a line; returns a kind and its object when that is complete. Lines of other programs are passed over."""
        match = _LINE.fullmatch(line.rstrip("\r\n"))
        if match is None:
            return None
        number, count = int(match[2]), int(match[3])
        if number == 1:
            self._pieces = []
        if number != len(self._pieces) + 1 or not number <= count <= _MOST_PIECES:
            self._pieces = []
            return None
        self._pieces.append(match[4])
        if number < count:
            return None
        try:
            value = json.loads("".join(self._pieces))
        except ValueError:
            return None
        finally:
            self._pieces = []
        return (match[1], value) if isinstance(value, dict) else None
