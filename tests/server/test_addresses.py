"""Under which addresses a server says that it is reached."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from remote_vae.server.addresses import endpoints
from remote_vae.server.run import listen


def said(host: str) -> tuple[int, list[str]]:
    """The port, and what is said of it."""
    with listen(host, 0) as listener:
        return listener.getsockname()[1], endpoints(listener, host)


def test_one_address_is_said_as_it_was_given() -> None:
    port, urls = said("127.0.0.1")
    assert urls == [f"http://127.0.0.1:{port}"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """The networks of a machine that is called studio; wlan0 is switched off."""
    networks = {
        "lo": ("127.0.0.1", "::1"),
        "eth0": ("fd00::20", "fe80::1%eth0", "192.168.1.20"),
        "docker0": ("172.17.0.1",),
        "wlan0": ("192.168.1.21",),
        "tailscale0": ("100.64.0.7",),
    }

    def addresses() -> dict[str, list[Any]]:
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return {
            name: [SimpleNamespace(family=kinds[":" in text], address=text) for text in texts]
            for name, texts in networks.items()
        }

    monkeypatch.setattr("psutil.net_if_addrs", addresses)
    monkeypatch.setattr("psutil.net_if_stats", lambda: {name: SimpleNamespace(isup=name != "wlan0") for name in networks})
    monkeypatch.setattr("socket.gethostname", lambda: "studio")
    return networks


@pytest.mark.usefixtures("machine")
def test_everywhere_is_each_address_that_another_machine_may_know_and_the_name() -> None:
    port, urls = said("0.0.0.0")
    assert urls == [f"http://192.168.1.20:{port}", f"http://100.64.0.7:{port}", f"http://studio:{port}"]


@pytest.mark.usefixtures("machine")
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no sockets for both kinds of addresses here")
def test_everywhere_of_version_6_is_also_that_of_version_4() -> None:
    port, urls = said("::")
    assert urls == [f"http://{name}:{port}" for name in ("192.168.1.20", "100.64.0.7", "[fd00::20]", "studio")]


def test_a_machine_without_a_network_is_reached_from_itself(
    machine: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    del machine["eth0"], machine["tailscale0"]
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    port, urls = said("0.0.0.0")
    assert urls == [f"http://127.0.0.1:{port}"]


def test_the_addresses_of_this_very_machine_answer() -> None:
    with listen("0.0.0.0", 0) as listener:
        for url in endpoints(listener, "0.0.0.0"):
            host, _, port = url.removeprefix("http://").rpartition(":")
            # Whether the name is known is up to the network.
            if host != socket.gethostname():
                socket.create_connection((host, int(port)), timeout=10).close()
