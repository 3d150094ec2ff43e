"""What the accordion, the API and a pasted infotext ask for."""

from __future__ import annotations

import pytest

from remote_vae.extension.accordion import AS_SET, EVERY, pasted_box, pasted_transfer, request_of, transfers
from remote_vae.hosts.generation import FOLLOW, MODES, Request

HAPPENED = "decode remote (raw), encode local (503)"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_transfer_can_be_asked_for(mode: str) -> None:
    for transfer in transfers():
        assert request_of(mode, transfer) == Request(mode, transfer)


@pytest.mark.parametrize("nothing", [None, ""])
def test_nothing_is_to_follow_the_settings(nothing: str | None) -> None:
    assert request_of(nothing, nothing) == request_of() == Request(FOLLOW, FOLLOW)


@pytest.mark.parametrize("nonsense", ["Remote", 7, ["remote"]])
def test_nonsense_is_to_follow_the_settings_with_a_line_in_the_log(nonsense: object, caplog: pytest.LogCaptureFixture) -> None:
    assert request_of(nonsense, "raw") == Request(FOLLOW, "raw")
    assert "follow settings, off, auto, remote" in caplog.text


@pytest.mark.parametrize(
    ("box", "seen", "scope", "mode"),
    [
        (False, False, AS_SET, FOLLOW),
        (True, True, AS_SET, FOLLOW),
        (True, False, AS_SET, "auto"),
        (False, True, AS_SET, "off"),
        (True, True, EVERY, "remote"),
        (True, False, EVERY, "remote"),
        (False, True, EVERY, "off"),
        (False, False, EVERY, FOLLOW),
    ],
)
def test_the_box_counts_where_it_was_pressed_and_the_settings_where_it_was_not(
    box: bool, seen: bool, scope: str, mode: str
) -> None:
    """Untouched, it may show what the settings said an hour ago."""
    assert request_of(box, seen, scope, "png") == Request(mode, "png")


@pytest.mark.parametrize(("box", "mode"), [(True, "auto"), (False, "off")])
def test_the_box_alone_over_the_api_is_on_or_off(box: bool, mode: str) -> None:
    assert request_of(box) == Request(mode, FOLLOW)


@pytest.mark.parametrize(
    ("pasted", "switched_on", "box"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"Remote VAE": HAPPENED}, False, True),
        ({"Remote VAE": HAPPENED, "Remote VAE mode": "remote"}, False, True),
        ({"Remote VAE mode": "off"}, True, False),
        ({"Remote VAE mode": "banana"}, False, False),
    ],
)
def test_a_pasted_infotext_sets_the_box_that_is_seen_and_nothing_hidden(
    pasted: dict[str, str], switched_on: bool, box: bool
) -> None:
    assert pasted_box(pasted, switched_on=switched_on) is box


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
