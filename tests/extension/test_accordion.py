"""What the accordion, the API and a pasted infotext ask for."""

from __future__ import annotations

import pytest

from remote_vae.extension.accordion import pasted_mode, pasted_transfer, request_of, transfers
from remote_vae.hosts.generation import FOLLOW, MODES, Request

HAPPENED = "decode remote (raw), encode local (503)"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_transfer_can_be_asked_for(mode: str) -> None:
    for transfer in transfers():
        assert request_of(mode, transfer) == Request(mode, transfer)


@pytest.mark.parametrize("nothing", [None, ""])
def test_nothing_is_to_follow_the_settings(nothing: str | None) -> None:
    assert request_of(nothing, nothing) == request_of() == Request(FOLLOW, FOLLOW)


@pytest.mark.parametrize("nonsense", ["Remote", 7, True, ["remote"]])
def test_nonsense_is_to_follow_the_settings_with_a_line_in_the_log(nonsense: object, caplog: pytest.LogCaptureFixture) -> None:
    assert request_of(nonsense, "raw") == Request(FOLLOW, "raw")
    assert "follow settings, off, auto, remote" in caplog.text


@pytest.mark.parametrize(
    ("pasted", "switched_on", "mode"),
    [
        ({}, False, FOLLOW),
        ({"Remote VAE": HAPPENED}, False, "auto"),
        ({"Remote VAE": HAPPENED}, True, FOLLOW),
        ({"Remote VAE": HAPPENED, "Remote VAE mode": "remote"}, True, "remote"),
        ({"Remote VAE mode": "off"}, True, "off"),
        ({"Remote VAE mode": "banana"}, False, FOLLOW),
    ],
)
def test_a_pasted_infotext_restores_the_mode(pasted: dict[str, str], switched_on: bool, mode: str) -> None:
    assert pasted_mode(pasted, switched_on=switched_on) == mode


@pytest.mark.parametrize(
    ("pasted", "usual", "transfer"),
    [
        ({}, "u8", FOLLOW),
        ({"Remote VAE": HAPPENED}, "u8", "raw"),
        ({"Remote VAE": HAPPENED}, "raw", FOLLOW),
        ({"Remote VAE": "decode remote studio (png)"}, "u8", "png"),
        ({"Remote VAE": "decode remote (png, another VAE)"}, "u8", "png"),
        ({"Remote VAE": "decode local (503)"}, "u8", FOLLOW),
        ({"Remote VAE": HAPPENED, "Remote VAE transfer": "png"}, "u8", "png"),
        ({"Remote VAE transfer": "banana"}, "u8", FOLLOW),
    ],
)
def test_a_pasted_infotext_restores_the_transfer(pasted: dict[str, str], usual: str, transfer: str) -> None:
    assert pasted_transfer(pasted, usual) == transfer
