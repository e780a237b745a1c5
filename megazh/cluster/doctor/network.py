"""The network of this host: its name, its addresses, a port that can be reached, and the interface to use."""

import contextlib
import socket
from typing import NamedTuple

import psutil

from megazh.cluster.doctor.report import Found, Verdict

_VIRTUAL = ("docker", "virbr", "veth", "br-", "cni", "flannel", "cali", "tun", "tap", "vmnet", "podman")
_SECONDS = 2.0


class Interface(NamedTuple):
    """A network interface that is up, other than loopback."""

    name: str
    address: str
    """Its first IPv4 address."""
    mbit_s: int
    """Its speed; 0 where the driver does not say."""


def interfaces() -> list[Interface]:
    """The interfaces of this host that are up and have an IPv4 address, loopback left out."""
    states, found = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        address = next((each.address for each in addresses if each.family == socket.AF_INET), "")
        state = states.get(name)
        if address and not address.startswith("127.") and state is not None and state.isup:
            found.append(Interface(name, address, state.speed))
    return found


def check(found: Found) -> None:
    """Check names, addresses and ports of this host."""
    cards = interfaces()
    real = [card for card in cards if not card.name.startswith(_VIRTUAL)]
    if cards:
        listed = ", ".join(
            f"{card.name} {card.address}{f' at {card.mbit_s / 1000:g} Gbit/s' if card.mbit_s > 0 else ''}"
            for card in cards
        )
        found.add("network", Verdict.OK, f"interfaces: {listed}")
    else:
        found.add("network", Verdict.SKIPPED, "interfaces: only loopback is up, which is enough for one host")
    if len(cards) > 1 and real:
        name = default_interface(real)
        found.use(
            f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}", "on several hosts: one of several interfaces"
        )
    _name(found)
    _port(found, real[0].address if real else "127.0.0.1")


def default_interface(cards: list[Interface]) -> str:
    """The interface of the default route; the fastest where there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737); a datagram socket sends nothing
        own = asking.getsockname()[0]
        for card in cards:
            if card.address == own:
                return card.name
    return max(cards, key=lambda card: card.mbit_s).name


def _name(found: Found) -> None:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError) as error:
        remedy = f"add it to /etc/hosts ('127.0.1.1 {name}'); runs on one host do without"
        found.add("network", Verdict.WARNING, f"this host's own name {name} does not resolve ({error})", remedy)
        return
    local = " (this machine only; megazh hands ranks an address, not the name)" if address.startswith("127.") else ""
    found.add("network", Verdict.OK, f"name {name} is {address}{local}")


def _port(found: Found, address: str) -> None:
    try:
        with socket.socket() as listening:
            listening.bind((address, 0))
            listening.listen()
            port = listening.getsockname()[1]
            with socket.create_connection((address, port), _SECONDS):
                pass
    except OSError as error:
        remedy = "a firewall between the host and itself; ranks talk over TCP ports that the system chooses"
        found.add("network", Verdict.BAD, f"no connection to a port of {address}: {error.strerror or error}", remedy)
        return
    found.add("network", Verdict.OK, f"a free port of {address} can be reached (port {port})")
