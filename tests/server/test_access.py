"""Who may use the VAE that a UI shares."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from diffusers import AutoencoderKL

from remote_vae.server.shared import create_shared_app
from tests.hosts.a1111_standin import LdmVae
from tests.sharing import Sharing, ask

LAN = "192.168.1.30"
QUERY = "shape=1&shape=4&shape=2&shape=2&dtype=float32&output_type=pt"


@pytest.fixture
def provider(vae: AutoencoderKL) -> Sharing:
    return Sharing(LdmVae(vae))


@pytest.fixture
def open_app(provider: Sharing) -> Any:
    """No token is set."""
    return create_shared_app(provider, threading.Lock())


@pytest.fixture
def token_app(provider: Sharing) -> Any:
    return create_shared_app(provider, threading.Lock(), "s3cret")


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"])
def test_programs_on_this_machine_need_no_token(open_app: Any, token_app: Any, client: str, host: str) -> None:
    for app in (open_app, token_app):
        assert ask(app, "/info", client=client, headers={"Host": host}).status == 200


@pytest.mark.parametrize("client", [LAN, "::ffff:192.168.1.30", "8.8.8.8", "testclient", "", None])
@pytest.mark.parametrize(("path", "body"), [("/info", None), ("/decode", bytes(64)), ("/encode", b"x"), ("/", bytes(64))])
def test_without_a_token_other_machines_are_refused_and_told_why(
    open_app: Any, client: str | None, path: str, body: bytes | None
) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer s3cret"}):
        told = ask(open_app, path, client=client, headers=headers, body=body, query=QUERY)
        assert told.status == 403
        assert "REMOTE_VAE_TOKEN" in told.error


def test_with_a_token_other_machines_must_have_it(token_app: Any) -> None:
    for given in (None, "Bearer wrong", "Bearer ", "s3cret", "Basic s3cret", "Bearer ü"):
        headers = {"Authorization": given} if given is not None else {}
        told = ask(token_app, "/info", client=LAN, headers=headers)
        assert told.status == 401, given
        assert "REMOTE_VAE_TOKEN" in told.error
    good = {"Authorization": "Bearer s3cret", "Host": "studio:7860"}
    assert ask(token_app, "/info", client=LAN, headers=good).status == 200
    assert ask(token_app, "/decode", client=LAN, headers=good, body=bytes(64), query=QUERY).status == 200


@pytest.mark.parametrize(
    "header",
    [
        "X-Forwarded-For",
        "Forwarded",
        "X-Real-IP",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "Via",
        "CF-Connecting-IP",
        "True-Client-IP",
    ],
)
def test_a_proxy_on_this_machine_does_not_make_everyone_local(open_app: Any, token_app: Any, header: str) -> None:
    assert ask(open_app, "/info", headers={header: "127.0.0.1"}).status == 403
    assert ask(token_app, "/info", headers={header: "127.0.0.1"}).status == 401
    assert ask(token_app, "/info", headers={header: LAN, "Authorization": "Bearer s3cret"}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:7860"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_in_a_browser_on_this_machine_is_refused(open_app: Any, token_app: Any, headers: dict[str, str]) -> None:
    for app in (open_app, token_app):
        told = ask(app, "/decode", headers=headers, body=bytes(64), query=QUERY)
        assert told.status == 403
        assert "browser" in told.error


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_the_user_may_look_at_info_in_a_browser(open_app: Any, site: str) -> None:
    assert ask(open_app, "/info", headers={"Sec-Fetch-Site": site}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.5:7860", "", "[", "0.0.0.0"]
)
def test_a_name_that_was_made_to_point_here_is_refused(open_app: Any, host: str) -> None:
    assert ask(open_app, "/info", headers={"Host": host}).status == 403


def test_health_says_only_ok_to_everyone(open_app: Any, token_app: Any) -> None:
    for app in (open_app, token_app):
        told = ask(app, "/health", client=LAN)
        assert (told.status, told.body) == (200, b'{"status":"ok"}')


def test_a_host_header_that_no_url_can_be_made_of_costs_no_answer(open_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with "[" in Starlette 0.26, which A1111 has: it raises where the request's URL is asked for."""

    def url(_: Any) -> Any:
        raise ValueError("Invalid IPv6 URL")

    monkeypatch.setattr("starlette.requests.Request.url", property(url))
    assert ask(open_app, "/decode", headers={"Host": "["}, body=bytes(64), query=QUERY).status == 403
    assert ask(open_app, "/decod", headers={"Host": "["}).status == 403
    assert ask(open_app, "/a/b/c", headers={"Host": "["}).status == 404
