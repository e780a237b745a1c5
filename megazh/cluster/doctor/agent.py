"""The part of an examination of several hosts that runs on each of them: `megazh doctor --agent`."""

import contextlib
import hmac
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megazh.cluster.doctor.examine import Wanted, examine
from megazh.cluster.doctor.messages import Hello, Order, Rate, Seen, send
from megazh.cluster.doctor.network import interfaces
from megazh.config import from_mapping
from megazh.errors import UsageError

_CONNECT_SECONDS = 5.0
_FILE_SECONDS, _FILE_SHARE = 15.0, 0.05  # of the time limit
_RATE_SECONDS = 1.0
_BLOCK = 1 << 20
_LONGEST_LINE = 1 << 20
_SPARE_SECONDS = 300


def serve() -> None:
    """Do what standard input asks for, until it ends."""
    order = from_mapping(_read(), Order, "order")
    signal.alarm(int(order.limit) + _SPARE_SECONDS)  # whatever hangs: the process does not stay
    listening = socket.create_server(("", 0))
    threading.Thread(target=_answer, args=(listening, order.secret), daemon=True).start()
    own = Hello(
        host=socket.gethostname(),
        id=secrets.token_hex(8),
        addresses=[card.address for card in interfaces()] + ["127.0.0.1"],
        port=listening.getsockname()[1],
    )
    folder = Path(order.folder)
    file = folder / _file_name(own.id)
    try:
        with contextlib.suppress(OSError):  # the other hosts will not see it, and say so
            file.write_text(own.host)
        send("hello", own.model_dump())
        peers = [from_mapping(each, Hello, "peer") for each in _read()["peers"]]
        for number, peer in enumerate(peers):
            if peer.id != own.id:
                send("seen", _look(number, peer, order, folder).model_dump())
        send("looked", {})
        while "examine" not in (message := _read()):
            first, second = message["measure"]
            if peers[first].id == own.id:
                rate = _rate(peers[second], order.secret)
                send("rate", Rate(peer=second, gb_s=rate).model_dump())
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    try:
        report = examine(Wanted(folder, order.limit, order.recipe, order.settings), quiet=True)
    except UsageError as error:
        send("failed", {"why": str(error)})
        return
    send("report", report.model_dump(mode="json"))


def _file_name(name: str) -> str:
    return f".megazh-doctor-{name}"


def _read() -> dict[str, Any]:
    """The next message. Ends the process where nobody sends any more."""
    line = sys.stdin.readline(_LONGEST_LINE)
    if not line:
        raise SystemExit(0)
    value = json.loads(line)
    if not isinstance(value, dict):
        raise UsageError("doctor --agent: expected an object of JSON; megazh doctor starts this by itself")
    return value


def _answer(listening: socket.socket, secret: str) -> None:
    """Answer the other hosts, one connection at a time."""
    while True:
        connection, _ = listening.accept()
        with contextlib.suppress(OSError), connection:
            connection.settimeout(_CONNECT_SECONDS)
            with connection.makefile("rb") as reader:
                if not hmac.compare_digest(reader.readline(200).strip(), secret.encode()):
                    continue
                connection.sendall(f"{time.time()!r}\n".encode())
                got = 0
                while block := reader.read1(_BLOCK):
                    got += len(block)
                connection.sendall(f"{got}\n".encode())


def _connect(peer: Hello, secret: str) -> tuple[socket.socket, str, float]:
    """Connect to a host; returns the connection, the address, and the seconds by which its clock is ahead.

    Raises:
        OSError: it cannot be reached at any of its addresses.
    """
    failures = []
    for address in peer.addresses:
        try:
            connection = socket.create_connection((address, peer.port), _CONNECT_SECONDS)
        except OSError as error:
            failures.append(f"{address}: {error.strerror or error}")
            continue
        try:
            begin = time.time()
            connection.sendall(f"{secret}\n".encode())
            theirs = float(connection.recv(100))
            return connection, address, theirs - (begin + time.time()) / 2
        except (OSError, ValueError):  # another program, at this port of another machine
            connection.close()
            failures.append(f"{address}: another program answers")
    raise OSError("; ".join(failures))


def _look(number: int, peer: Hello, order: Order, folder: Path) -> Seen:
    address, failure, ahead = "", "", 0.0
    try:
        connection, address, ahead = _connect(peer, order.secret)
        connection.close()
    except OSError as error:
        failure = str(error)
    begin = time.monotonic()
    file = folder / _file_name(peer.id)
    seen: float | None = None
    while seen is None and time.monotonic() - begin < min(_FILE_SECONDS, _FILE_SHARE * order.limit):
        with contextlib.suppress(OSError):
            os.listdir(folder)  # has a network file system look anew
            if file.read_text() == peer.host:
                seen = time.monotonic() - begin
                break
        time.sleep(0.1)
    return Seen(peer=number, address=address, failure=failure, ahead=ahead, file_seconds=seen)


def _rate(peer: Hello, secret: str) -> float:
    """GB/s of one TCP connection to a host; 0 where it cannot be reached."""
    try:
        connection, _, _ = _connect(peer, secret)
        with connection:
            block, begin, sent = bytes(_BLOCK), time.monotonic(), 0
            while time.monotonic() - begin < _RATE_SECONDS:
                connection.sendall(block)
                sent += len(block)
            connection.shutdown(socket.SHUT_WR)
            got = int(connection.recv(100))
            return got / (time.monotonic() - begin) / 1e9 if got == sent else 0.0
    except (OSError, ValueError):
        return 0.0
