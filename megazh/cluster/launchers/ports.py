"""TCP ports for rank 0, which all ranks meet at."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port that the kernel assigns to no other program meanwhile; rank 0 can listen on it nevertheless.

    Args:
        address: IPv4 address that it is reserved at; empty: all addresses.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((address, 0))
        yield reserved.getsockname()[1]


def free_port() -> int:
    """A TCP port of this machine on which nothing listens at the moment."""
    with reserved_port() as port:
        return port
