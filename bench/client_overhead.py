"""What the client costs on top of the bytes themselves: one 1024 px decode over loopback, against a bare socket.

A server in a child process always gives the same prepared answer. Four ask it, each with a connection that is kept: a bare
socket (latents' bytes behind a prepared head, the answer into the memory of a new tensor), ours, requests with nothing around
it, diffusers. Each of the others takes turns with the bare socket, call by call; a ratio is the median over the pairs. So what
else the machine does falls on both alike, and no third way empties the caches.

    python -m bench.client_overhead [rounds]
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image
from skimage import data

from remote_vae import remote_decode
from remote_vae.wire import DecodeRequest, HttpRequest, HttpResponse, Output, Scaling, decode_response
from remote_vae.wire.pixels import image_to_pixels

FLOOR_BAR = 1.9
DIFFUSERS_BAR = 1 / 3
SIDE = 1024
SCALING = 0.18215
ROUNDS = 200
SECONDS = 3.0
WARM_UP = 20

_FORMS = {"u8": Output.UINT8, "fp16": Output.TENSOR, "png": Output.PNG, "jpg": Output.JPG}


# --- the server --------------------------------------------------------------------------------------------------------


@contextmanager
def canned_server(answers: dict[str, HttpResponse]) -> Iterator[int]:
    """A server in a child process that gives the answer named by the first part of the path; yields its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    prepared = {name: whole_answer(answer) for name, answer in answers.items()}
    process = context.Process(target=_serve, args=(prepared, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def whole_answer(answer: HttpResponse) -> bytes:
    """The answer as it goes over the wire, head and body."""
    body = bytes(answer.body)
    lines = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in answer.headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _serve(answers: dict[str, bytes], pipe: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_converse, args=(connection, answers), daemon=True).start()


def _converse(connection: socket.socket, answers: dict[str, bytes]) -> None:
    # A client that leaves has had enough.
    with connection, contextlib.suppress(ConnectionError):
        while name := _take_request(connection):
            connection.sendall(answers[name])


def _take_request(connection: socket.socket) -> str:
    """Read one request to its end; the first part of its path, or "" when the client has left."""
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        if not (piece := connection.recv(65536)):
            return ""
        received += piece
    line, *headers = received[:end].decode().split("\r\n")
    length = next(int(header.split(":")[1]) for header in headers if header.lower().startswith("content-length:"))
    missing = end + 4 + length - len(received)
    while missing > 0:
        missing -= len(connection.recv(missing))
    return line.split(" ")[1].partition("?")[0].strip("/")


# --- the ways of asking ------------------------------------------------------------------------------------------------


class Floor:
    """The same bytes through a bare socket: latents in, the whole answer out as a tensor of its own (uint8, head and body)."""

    def __init__(self, port: int, name: str, latents: torch.Tensor, request: HttpRequest, answer: HttpResponse) -> None:
        self._latents = latents
        target = request.url(f"/{name}")
        lines = [f"POST {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Accept-Encoding: identity"]
        lines += [f"{key}: {value}" for key, value in request.headers.items()]
        lines += [f"Content-Length: {memoryview(request.body).nbytes}", "", ""]
        self._head = "\r\n".join(lines).encode()
        self._length = len(whole_answer(answer))
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __call__(self) -> torch.Tensor:
        self._socket.sendall(self._head + self._latents.numpy().tobytes())
        answer = torch.empty(self._length, dtype=torch.uint8)
        view = answer.numpy().data
        filled = 0
        while filled < self._length:
            filled += self._socket.recv_into(view[filled:])
        return answer


@dataclass
class Way:
    """One row of the table."""

    name: str
    ask: Callable[[], Any]
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    floor_ms: list[float] = field(default_factory=list)

    def measure(self) -> None:
        cpu, started = time.process_time(), time.perf_counter()
        self.ask()
        self.ms.append((time.perf_counter() - started) * 1000)
        self.cpu_ms.append((time.process_time() - cpu) * 1000)

    @property
    def times_the_floor(self) -> float:
        """How many times as long as the bare socket it takes."""
        return statistics.median(mine / floor for mine, floor in zip(self.ms, self.floor_ms, strict=True))


def _ways(port: int, form: str, latents: torch.Tensor, answer: HttpResponse) -> list[Way]:
    url, output = f"http://127.0.0.1:{port}/{form}", _FORMS[form]
    ways = [
        Way("bare socket", Floor(port, form, latents, DecodeRequest(latents, output).to_http(), answer)),
        Way("remote_vae", _function_call(remote_decode, url, output, latents)),
        Way("requests", _requests_call(url, output, latents)),
    ]
    if importlib.util.find_spec("diffusers"):
        from diffusers.utils import remote_utils

        ways.append(Way("diffusers", _function_call(remote_utils.remote_decode, url, output, latents)))
    return ways


def _requests_call(url: str, output: Output, latents: torch.Tensor) -> Callable[[], bytes]:
    session = requests.Session()

    def ask() -> bytes:
        request = DecodeRequest(latents, output).to_http()
        return session.post(request.url(url), data=request.body.tobytes(), headers=dict(request.headers)).content

    return ask


def _function_call(function: Callable[..., Any], url: str, output: Output, latents: torch.Tensor) -> Callable[[], Any]:
    form: dict[str, Any] = {"output_type": "pt", "return_type": "pt", "partial_postprocess": output is Output.UINT8}
    if output.is_image:
        form = {"output_type": "pil", "return_type": "pil", "image_format": output.value}
    return lambda: function(url, latents, scaling_factor=SCALING, **form)


# --- the measurement ---------------------------------------------------------------------------------------------------


def photo_pixels(side: int) -> torch.Tensor:
    """``[1, 3, side, side]`` in [-1, 1]: scikit-image's astronaut, so that PNG and JPEG have a real photo's size."""
    photo = Image.fromarray(np.asarray(data.astronaut())).resize((side, side), Image.Resampling.BICUBIC)
    return image_to_pixels(photo)


def _check(ways: list[Way], answer: HttpResponse) -> None:
    """A way that is fast and wrong counts for nothing."""
    for way in ways:
        got = way.ask()
        if isinstance(got, torch.Tensor):
            got = got.view(torch.uint8).numpy().tobytes()
        is_right = got.size == (SIDE, SIDE) if isinstance(got, Image.Image) else got.endswith(bytes(answer.body))
        if not is_right:
            raise AssertionError(f"{way.name}: other values came")


def _measure(floor: Way, way: Way, rounds: int) -> None:
    for _ in range(WARM_UP):
        floor.ask()
        way.ask()
    started = time.perf_counter()
    # Some hundred calls of a millisecond are over before the machine has left the mood it is in.
    while len(way.ms) < rounds or time.perf_counter() - started < SECONDS:
        floor.measure()
        way.measure()
        way.floor_ms.append(floor.ms[-1])


def _print_row(form: str, way: Way, ratio: float) -> None:
    ms, cpu_ms = statistics.median(way.ms), statistics.median(way.cpu_ms)
    print(f"{form:<5} {way.name:<12} {ms:>7.2f} {ratio:>14.2f} {cpu_ms:>7.2f} {len(way.ms):>7}", flush=True)


def _print_bar(what: str, ratio: float, bar: float) -> None:
    print(f"{'PASS' if ratio <= bar else 'MISS'}: u8 takes {ratio:.2f} x {what}; the bar is {bar:.2f} x.")


def main(rounds: int = ROUNDS) -> None:
    # On a busy machine a second thread makes a look through 65,000 values several times slower at random.
    torch.set_num_threads(1)
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    pixels = photo_pixels(SIDE).to(torch.float16)
    answers = {
        form: decode_response(DecodeRequest(latents, output, Scaling(SCALING)), pixels) for form, output in _FORMS.items()
    }
    with canned_server(answers) as port:
        print(f"{'one 1024 px decode':<18} {'ms':>7} {'x bare socket':>14} {'CPU ms':>7} {'rounds':>7}")
        for form, answer in answers.items():
            floor, ours, *others = ways = _ways(port, form, latents, answer)
            _check(ways, answer)
            for way in (ours, *others):
                _measure(floor, way, rounds)
            _print_row(form, floor, 1.0)
            for way in (ours, *others):
                _print_row(form, way, way.times_the_floor)
            if form == "u8":
                bars = [("the bare socket", ours.times_the_floor, FLOOR_BAR)]
                if others[-1].name == "diffusers":
                    bars.append(("diffusers", ours.times_the_floor / others[-1].times_the_floor, DIFFUSERS_BAR))
    print("\nMedians; ratios are medians over pairs; CPU is that of the whole client process.")
    for bar in bars:
        _print_bar(*bar)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
