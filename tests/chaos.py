"""An endpoint that misbehaves on demand: a loopback proxy before a real server, or a server of nothing but failures."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from weakref import WeakSet


class Chaos:
    """Listens on the loopback, on a free port unless one is named.

    Attributes:
        mode: "pass" (to ``target``), "hang", "late" (passes after half a second), "working" (says that it works), "503", "400",
            "404 html", "200 html", "nan", "short", "cut" (dies in mid-body), "drop" (closes without a word), "slow" (a byte now
            and then, for ever), "redirect".
        fail_at: number of the request, from 0, that ``mode`` is for; the others pass. None: for all.
        drops: keys of the query that do not reach the target, which makes a plain endpoint of our own server.
        strips: names of headers of a request that do not reach the target.
        extras: what GET /info says that the target knows beyond the protocol; None: as it says itself.
        headers: of every VAE call that came.
        info: "mode" (GET /info is treated as a VAE call is), or a mode of its own: "pass", "hang", "503", "404 html" ...
        requests, queries: path and query of every VAE call that came.
        infos: path of every GET that came.
    """

    def __init__(self, target: str = "", port: int = 0) -> None:
        self.target = target
        self.mode = "pass"
        self.fail_at: int | None = None
        self.drops: tuple[str, ...] = ()
        self.info = "mode"
        self.strips: tuple[str, ...] = ()
        self.extras: list[str] | None = None
        self.headers: list[dict[str, str]] = []
        self.infos: list[str] = []
        self.requests: list[str] = []
        self.queries: list[str] = []
        self.released = threading.Event()
        chaos = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                # A client that gives up half-way is what these tests are about.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    chaos._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def get_request(self) -> Any:
                connection, address = super().get_request()
                chaos._connections.add(connection)
                return connection, address

        self._connections: WeakSet[socket.socket] = WeakSet()
        self._server = Server(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        # Else a kept one would be answered from here when another listens at the address.
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def reset(self, mode: str, fail_at: int | None = None) -> None:
        self.mode, self.fail_at = mode, fail_at
        self.infos.clear()
        self.requests.clear()
        self.queries.clear()
        self.headers.clear()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        mode = self._note(handler)
        if mode == "hang":
            # Takes the request in and never answers.
            self.released.wait(60)
            handler.close_connection = True
            return
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if mode == "late":
            self.released.wait(0.5)
        if mode == "drop":
            handler.close_connection = True
        elif mode == "working":
            self._send(handler, 200, {"Content-Type": "application/json"}, b'{"status": "ok", "running": true, "waiting": 0}')
        elif mode == "503":
            self._send(handler, 503, {"Content-Type": "application/json"}, b'{"error": "no replica is ready"}')
        elif mode == "400":
            self._send(handler, 400, {"Content-Type": "application/json"}, b'{"error": "the picture is too small"}')
        elif mode == "404 html":
            self._send(handler, 404, {"Content-Type": "text/html"}, b"<html><h1>404</h1> Not&nbsp;Found</html>")
        elif mode == "200 html":
            self._send(handler, 200, {"Content-Type": "text/html"}, b"<html>Sign in to the hotel's network</html>")
        elif mode == "redirect":
            self._send(handler, 302, {"Location": "http://127.0.0.1:9/"}, b"")
        else:
            self._forward(handler, mode, body)

    def _note(self, handler: BaseHTTPRequestHandler) -> str:
        """Put the request on its list; returns the mode for it."""
        parts = urlsplit(handler.path)
        if handler.command == "GET":
            self.infos.append(parts.path)
            mode = self.mode if self.fail_at is None else "pass"
            return mode if self.info == "mode" else self.info
        number = len(self.requests)
        self.requests.append(parts.path)
        self.queries.append(parts.query)
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        return self.mode if self.fail_at in (None, number) else "pass"

    def _forward(self, handler: BaseHTTPRequestHandler, mode: str, body: bytes) -> None:
        parts = urlsplit(self.target)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        path = urlsplit(handler.path)
        kept = [(key, value) for key, value in parse_qsl(path.query) if key not in self.drops]
        passed = {name: value for name, value in handler.headers.items() if name.lower() not in self.strips}
        connection.request(handler.command, f"{path.path}?{urlencode(kept)}", body, passed)
        answer = connection.getresponse()
        data = answer.read()
        headers = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("server", "date", "content-length")
        }
        connection.close()
        if path.path.endswith("/info") and self.extras is not None:
            data = json.dumps({**json.loads(data), "extras": self.extras}).encode()
        if mode == "nan":
            data = b"\xff" * len(data)
        if mode == "short":
            data = data[:-2]
        if mode in ("cut", "slow"):
            handler.send_response(answer.status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.close_connection = True
            if mode == "cut":
                handler.wfile.write(data[: len(data) // 2])
                return
            for index in range(len(data)):
                if self.released.is_set():
                    return
                handler.wfile.write(data[index : index + 1])
                time.sleep(0.05)
            return
        self._send(handler, answer.status, headers, data)

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
