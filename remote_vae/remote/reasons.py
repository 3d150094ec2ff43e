"""Why a connection failed, in the words of a person."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from urllib3.exceptions import ConnectTimeoutError, LocationValueError, NewConnectionError

from remote_vae.remote.environment import CertificatesUnreadable, ProxyUnusable
from remote_vae.wire import one_line

# There was one, and it ended before the answer had.
CONNECTION_LOST = "connection lost"
_PLAIN_HTTP = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")


def reason_of(error: BaseException, url: str) -> tuple[str, str]:
    """Why ``error`` came of a request to ``url``.

    Returns:
        In short for the record, which goes out with pictures and names no machine; and what the message adds: details, advice.
    """
    chain = list(_chain(error))
    for judge in (_of_tls, _of_protocol, _of_socket):
        for link in chain:
            found = judge(link, url)
            if found is not None:
                return found
    return "connection failed", f": {one_line(str(error)) or type(error).__name__}"


def advice_for(reason: str, url: str) -> str:
    """What to do where ``reason`` tells more than that nobody was reached at ``url``; "" where it does not."""
    if "is spoken there" in reason and "HTTP/2" not in reason:
        return f"enter {_other_scheme(url)} as its address"
    if reason.startswith("TLS failed"):
        return "enter a name that its certificate is made for; of an authority of your own REQUESTS_CA_BUNDLE names the file"
    if reason == CONNECTION_LOST and url.startswith("http://"):
        return f"it hangs up: where it speaks https, enter {_other_scheme(url)}, else look at what the server prints"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and all that it was made of; urllib3 puts one error into the other."""
    seen: list[BaseException] = []
    waiting: list[BaseException] = [error]
    while waiting:
        link = waiting.pop(0)
        if link in seen:
            continue
        seen.append(link)
        yield link
        parts = (*link.args, getattr(link, "original_error", None), link.__cause__, link.__context__)
        waiting += [part for part in parts if isinstance(part, BaseException)]


def _of_tls(error: BaseException, url: str) -> tuple[str, str] | None:
    # urllib3 1.26 compares names itself, and has an error of its own for it.
    if isinstance(error, ssl.SSLCertVerificationError) or type(error).__name__ == "CertificateError":
        why = one_line(getattr(error, "verify_message", "") or str(error)).rstrip(".")
        return "TLS failed: certificate not accepted", (
            f": {why}; if it is of an authority of your own, name its file in the variable REQUESTS_CA_BUNDLE"
        )
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        if error.reason in _PLAIN_HTTP:
            return "TLS failed: http is spoken there, not https", f"; enter {_other_scheme(url)} as the address"
        return f"TLS failed: {one_line(str(error.reason or error))}", ""
    return None


def _of_protocol(error: BaseException, url: str) -> tuple[str, str] | None:
    if isinstance(error, ProxyUnusable):
        return "the proxy of the environment cannot be used", f": {error}"
    if isinstance(error, CertificatesUnreadable):
        return "certificates cannot be read", f": {error}"
    if isinstance(error, (http.client.BadStatusLine, http.client.UnknownProtocol)) and not isinstance(error, ConnectionError):
        line = str(error)
        if line.startswith("\x15\x03"):
            return "https is spoken there, not http", f"; enter {_other_scheme(url)} as the address"
        if "HTTP/2" in line or "\x04" in line[:4]:
            return "no answer in HTTP/1.1: HTTP/2 is spoken there", ""
        return "no answer in HTTP", "; is that the port of a Remote VAE server?"
    if isinstance(error, (UnicodeError, LocationValueError)):
        return "the name of the host cannot be looked up", ""
    return None


def _of_socket(error: BaseException, url: str) -> tuple[str, str] | None:
    host = urlsplit(url).hostname
    if isinstance(error, ConnectionRefusedError):
        return "connection refused", "; does the server run, and on that port?"
    if isinstance(error, socket.gaierror):
        return "unknown host", f"; is {host} written right, or is there no network?"
    if isinstance(error, (TimeoutError, ConnectTimeoutError)) and not isinstance(error, NewConnectionError):
        return "no connection in time", ""
    if isinstance(error, http.client.HTTPException) and type(error) is http.client.HTTPException:
        return f"bad answer: {one_line(str(error), 80)}", ""
    if isinstance(error, (ConnectionError, http.client.HTTPException, ssl.SSLEOFError)):
        return CONNECTION_LOST, ""
    if isinstance(error, OSError) and error.strerror:
        return one_line(error.strerror).lower(), ""
    return None


def _other_scheme(url: str) -> str:
    parts = urlsplit(url)
    scheme = "http" if parts.scheme == "https" else "https"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}"
