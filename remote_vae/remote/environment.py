"""Proxies and certificates, looked for in the environment as requests does, and the pools of urllib3 that go with them."""

from __future__ import annotations

import functools
import os
import ssl
import warnings
from typing import Any

import certifi
import requests.utils
import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util.ssl_ import create_urllib3_context

from remote_vae.tokens import is_loopback

# Idle connections to one server.
_MAX_IDLE = 8


class ProxyUnusable(ValueError):
    """The environment names a proxy that cannot be used."""


class CertificatesUnreadable(OSError):
    """The environment names certificates that cannot be read."""


def new_manager(proxy: str, *, secure: bool) -> Any:
    """urllib3's pool manager for servers behind ``proxy`` ("" for none). Raises ProxyUnusable, CertificatesUnreadable."""
    options: dict[str, Any] = {"maxsize": _MAX_IDLE, "block": False}
    if secure:
        options |= {"ssl_context": tls_context(*_authorities()), "cert_reqs": "CERT_REQUIRED"}
    manager: Any
    try:
        if not proxy:
            manager = urllib3.PoolManager(**options)
        elif proxy.lower().startswith("socks"):
            manager = _socks_manager(proxy, options)
        else:
            if proxy.lower().startswith("https:"):
                options["proxy_ssl_context"] = tls_context(*_authorities())
            user, password = requests.utils.get_auth_from_url(proxy)
            headers = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}") if user else {}
            manager = urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
    except ProxyUnusable:
        raise
    except (ValueError, HTTPError):
        raise ProxyUnusable("its address is none; see the variables http_proxy, https_proxy and all_proxy") from None
    return manager


def _socks_manager(proxy: str, options: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from urllib3.contrib.socks import SOCKSProxyManager
    except ImportError:
        raise ProxyUnusable("SOCKS needs the package PySocks: pip install pysocks") from None
    return SOCKSProxyManager(proxy, **options)


def proxy_for(url: str) -> str:
    """The URL of the proxy that the environment names for ``url``, or "". None can reach this machine's own loopback."""
    if is_loopback(url):
        return ""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _authorities() -> tuple[str, str]:
    """Where requests looks for certificates, and the name of the variable that says so."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(variable):
            return os.environ[variable], variable
    return certifi.where(), "certifi"


@functools.lru_cache(maxsize=4)
def tls_context(bundle: str, named_by: str) -> ssl.SSLContext:
    """One for all connections, as loading the certificates takes 15 ms. Verification is on."""
    # urllib3's own, as the two versions differ in how a host that is a number is checked.
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
    try:
        if os.path.isdir(bundle):
            context.load_verify_locations(capath=bundle)
        else:
            context.load_verify_locations(cafile=bundle)
        return context
    except OSError as error:
        raise CertificatesUnreadable(f"those that {named_by} names: {bundle}: {error.strerror or error}") from error
