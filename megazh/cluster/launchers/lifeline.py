"""The lifeline: one TCP connection from each rank's guard to the launcher, where another program starts the ranks.

Whatever starts them (srun, DeepSpeed's launcher, mpirun), signals, ends, exit codes and signs of progress travel here,
as lines of JSON. The launcher writes RUN/control/launch.json, which only its user can read; a guard finds addresses and
a token there. On a new connection the launcher sends `Challenge`; the guard answers with `Hello`, which proves that it
knows the token without showing it. What strangers send, or guards of another attempt, only ends their connection.
"""

import hashlib
import hmac
import socket
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megazh.config import Config
from megazh.training.control import Reason

LAUNCH = "launch.json"
"""Name of the file in RUN/control."""

LONGEST = 1 << 16
"""Most bytes of a line."""

_PIECE_BYTES = 1 << 16
_MOST_WAITING = 1 << 22  # bytes for a reader that does not read
_UNANSWERED_MS = 45_000
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 6))

_Name = Annotated[str, Field(max_length=255, pattern=r"^[A-Za-z0-9._:-]+$")]
_Port = Annotated[int, Field(ge=1, le=65535)]


class LaunchInfo(Config):
    """The contents of launch.json: what guards need to find their launcher."""

    format_version: Literal[1] = 1
    attempt: str
    """Id of the attempt; a guard of another one has nothing to do with this file."""
    token: str
    """Secret of this attempt."""
    addresses: list[str]
    """Addresses of the launcher's host, the most likely one first."""
    port: _Port
    slots: list[int]
    """Number of slots of each host."""
    ranks: list[int]
    """Rank of each slot; slots are numbered host by host."""
    device: Literal["cpu", "cuda"]
    environment: dict[str, str]
    """Variables for the ranks."""
    folder: str
    """Working folder of the launcher, and so of the ranks: paths in a recipe are relative to it."""


class Challenge(Config):
    """From the launcher, first: what a guard has to sign."""

    kind: Literal["challenge"] = "challenge"
    attempt: Annotated[str, Field(max_length=64)]
    nonce: Annotated[str, Field(max_length=64)]


class Hello(Config):
    """From a guard, first: which rank it stands for, and what the launcher has to know of its host."""

    kind: Literal["hello"] = "hello"
    slot: Annotated[int, Field(ge=0)]
    proof: Annotated[str, Field(max_length=64)]
    host: _Name
    cores: Annotated[list[int], Field(max_length=4096)]
    """Cores that it may use."""
    port: _Port | None = None
    """Port that rank 0 has reserved on its host."""


class Start(Config):
    """To a guard, once all have joined: start the rank."""

    kind: Literal["start"] = "start"
    address: _Name
    """Address of rank 0, for MASTER_ADDR."""
    port: _Port
    threads: Annotated[int, Field(ge=1)]
    """Cores for this rank, for OMP_NUM_THREADS."""


class Signal(Config):
    """To a guard: send the rank a signal."""

    kind: Literal["signal"] = "signal"
    number: Annotated[int, Field(ge=1, le=64)]


class Order(Config):
    """To a guard. `stacks`: have the rank write its stacks, and answer with `Stacks`; `kill`: kill it; `leave`: end."""

    kind: Literal["stacks", "kill", "leave"]


class Progress(Config):
    """From a guard, once a second: the rank's last sign of progress (see `megazh.run.pulse.Pulse`)."""

    kind: Literal["progress"] = "progress"
    beats: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=-1)]
    reason: Annotated[int, Field(ge=0, le=max(Reason))]
    age: Annotated[float, Field(ge=0)]
    """Seconds since that sign: hosts have clocks of their own."""
    phase: Annotated[str, Field(max_length=64)]


class Text(Config):
    """From the guard of rank 0: what the rank has written to stdout."""

    kind: Literal["text"] = "text"
    text: str


class Stacks(Config):
    """From a guard: what the rank is found doing (see `megazh.cluster.launchers.hang.Stack`)."""

    kind: Literal["stacks"] = "stacks"
    state: Annotated[str, Field(max_length=1)]
    place: Annotated[str, Field(max_length=1000)]
    waits: bool


class Goodbye(Config):
    """From a guard, last: the rank has ended."""

    kind: Literal["goodbye"] = "goodbye"
    code: Annotated[int, Field(ge=-64, le=255)]
    """Exit code; the negative number of a signal where one ended the rank."""
    words: str = ""
    """Its own reason."""


FromGuard = Hello | Progress | Text | Stacks | Goodbye
FromLauncher = Challenge | Start | Signal | Order
_FROM_GUARD: TypeAdapter[FromGuard] = TypeAdapter(Annotated[FromGuard, Field(discriminator="kind")])
_FROM_LAUNCHER: TypeAdapter[FromLauncher] = TypeAdapter(Annotated[FromLauncher, Field(discriminator="kind")])


class Broken(Exception):
    """The connection has ended, or what came is no message."""


def proof(token: str, nonce: str, slot: int) -> str:
    """What a guard answers to a challenge: HMAC-SHA256 of nonce and slot under the token, in hexadecimal digits."""
    return hmac.new(token.encode(), f"{nonce} {slot}".encode(), hashlib.sha256).hexdigest()


def from_guard(line: bytes) -> FromGuard:
    """Read a message of a guard. Raises Broken where it is none."""
    try:
        return _FROM_GUARD.validate_json(line)
    except ValidationError as error:
        raise Broken(f"sent no message: {error.errors()[0]['msg']}") from None


def from_launcher(line: bytes) -> FromLauncher:
    """Read a message of the launcher. Raises Broken where it is none."""
    try:
        return _FROM_LAUNCHER.validate_json(line)
    except ValidationError as error:
        raise Broken(f"sent no message: {error.errors()[0]['msg']}") from None


class Link:
    """One end of a connection. Nothing here waits.

    A host that is switched off is noticed within a minute at either end.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # While something is on its way, keepalive is silent, and TCP alone would try for a quarter of an hour.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection = connection
        self._arrived, self._waiting = b"", b""

    def fileno(self) -> int:
        """Descriptor of the connection, for select."""
        return self._connection.fileno()

    @property
    def waiting(self) -> bool:
        """Whether something is still to be sent, for which `flush` has to be called."""
        return bool(self._waiting)

    @property
    def peer(self) -> str:
        """Address of the other end."""
        return str(self._connection.getpeername()[0]).removeprefix("::ffff:")

    @property
    def own(self) -> str:
        """Address of this end."""
        return str(self._connection.getsockname()[0]).removeprefix("::ffff:")

    def send(self, message: Config) -> None:
        """Send a message, or keep what the connection does not take at the moment. Raises Broken."""
        line = message.model_dump_json().encode() + b"\n"
        if len(self._waiting) + len(line) > _MOST_WAITING:
            raise Broken("does not read")
        self._waiting += line
        self.flush()

    def flush(self) -> None:
        """Send what is kept, as far as the connection takes it. Raises Broken."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._connection.send(self._waiting) :]
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(error.strerror or str(error)) from None

    def receive(self) -> list[bytes]:
        """The lines that have arrived.

        Raises:
            Broken: the connection has ended, and no line is left; or a line is longer than `LONGEST`.
        """
        lines: list[bytes] = []
        ended = ""
        try:
            while len(lines) < 1000:
                data = self._connection.recv(_PIECE_BYTES)
                if not data:
                    ended = "its connection was closed"
                    break
                *whole, self._arrived = (self._arrived + data).split(b"\n")
                lines += whole
                if max(map(len, [*whole, self._arrived])) > LONGEST:
                    raise Broken("sent a line that is too long")
        except BlockingIOError:
            pass
        except OSError as error:
            ended = error.strerror or str(error)
        if ended and not lines:
            raise Broken(ended)
        return lines

    def close(self) -> None:
        """End the connection."""
        self._connection.close()
