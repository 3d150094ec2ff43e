"""Under which addresses a server is reached, as they are typed into a UI."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

# Networks of containers and virtual machines on this machine, in which no other machine is.
_INSIDE = ("docker", "br-", "veth", "virbr", "vmnet", "vboxnet")


def endpoints(listener: socket.socket, host: str, scheme: str = "http") -> list[str]:
    """URLs that lead to ``listener``, the one that most machines can use first.

    Args:
        listener: listens on ``host``.
        host: a name or an address. For 0.0.0.0 and ::, those of all networks that this machine is in, and then its name.
        scheme: what it speaks there.
    """
    port = listener.getsockname()[1]
    wildcard = host in ("0.0.0.0", "::")  # noqa: S104  # compared, not listened on
    names = [*_of_this_machine(_versions(listener)), *_own_name()] if wildcard else [host]
    return [f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" for name in names or ["127.0.0.1"]]


def _versions(listener: socket.socket) -> tuple[int, ...]:
    """Of the Internet Protocol, that come in here."""
    if listener.family == socket.AF_INET:
        return (4,)
    only = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return (6,) if only else (4, 6)


def _of_this_machine(versions: tuple[int, ...]) -> list[str]:
    """Its addresses in networks with others."""
    found = [each for each in _addresses() if each.version in versions and not each.is_loopback and not each.is_link_local]
    # One of version 4 is shorter to type, and known to every router.
    return [str(each) for each in sorted(found, key=lambda each: each.version)]


def _addresses() -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    # accelerate brings it, which loads the VAE.
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, entries in psutil.net_if_addrs().items():
        if name in up and not name.startswith(_INSIDE):
            for entry in entries:
                if entry.family in (socket.AF_INET, socket.AF_INET6):
                    yield ipaddress.ip_address(entry.address.partition("%")[0])


def _own_name() -> list[str]:
    name = socket.gethostname()
    return [] if name.startswith("localhost") else [name]
