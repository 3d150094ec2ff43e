"""What the client costs on top of the bytes themselves: one 1024 px decode over loopback, against a bare socket.

A server in a child process always gives the same prepared answer. The floor is a bare keep-alive socket, tensor in, tensor out:
it sends the latents' bytes behind a prepared head and receives the answer into the memory of a new tensor, as every caller gets
a tensor of his own. Each way of asking takes turns with the floor, call by call: at least ``rounds`` pairs, and for three
seconds or more. The ratio is the median over the pairs.

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
import torch
from PIL import Image
from skimage import data

from remote_vae import remote_decode
from remote_vae.remote.client import client_for
from remote_vae.wire import DecodeRequest, HttpRequest, HttpResponse, Output, Scaling, decode_response
from remote_vae.wire.pixels import image_from_bytes, image_to_pixels

BAR = 1.3
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
    floor: str
    ask: Callable[[], Any]
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def measure(self) -> float:
        cpu, started = time.process_time(), time.perf_counter()
        self.ask()
        ms = (time.perf_counter() - started) * 1000
        self.ms.append(ms)
        self.cpu_ms.append((time.process_time() - cpu) * 1000)
        return ms

    def measure_against(self, floor: Way, rounds: int) -> None:
        for _ in range(WARM_UP):
            floor.ask(), self.ask()
        started = time.perf_counter()
        # Some hundred calls of a millisecond are over before the machine has left the mood it is in.
        while len(self.ratios) < rounds or time.perf_counter() - started < SECONDS:
            bare = floor.measure()
            self.ratios.append(self.measure() / bare)


def _ways(port: int, latents: torch.Tensor, answers: dict[str, HttpResponse]) -> list[Way]:
    ways = []
    for name, output in _FORMS.items():
        url = f"http://127.0.0.1:{port}/{name}"
        floor = Floor(port, name, latents, DecodeRequest(latents, output).to_http(), answers[name])
        ways += [Way(f"floor {name}: bare socket", name, floor)]
        if output.is_image:
            ways.append(Way(f"floor {name}: and PIL to an image", name, _floor_and_pil(floor, len(answers[name].body))))
        ways += _our_ways(url, name, output, latents)
        if importlib.util.find_spec("diffusers"):
            ways.append(_diffusers_way(url, name, output, latents))
    return ways


def _floor_and_pil(floor: Floor, length: int) -> Callable[[], Image.Image]:
    return lambda: image_from_bytes(floor().numpy().data[-length:], max_pixels=SIDE * SIDE)


def _our_ways(url: str, name: str, output: Output, latents: torch.Tensor) -> list[Way]:
    client = client_for(url)

    def decode() -> Any:
        return client.decode(DecodeRequest(latents, output)).answer

    result = "image" if output.is_image else "tensor"
    ways = [
        Way(f"remote_vae {name}: client, {result}", name, decode),
        Way(f"remote_vae {name}: remote_decode, {result}", name, _function_call(remote_decode, url, output, latents)),
    ]
    if output is not Output.TENSOR:
        ways.append(
            Way(f"remote_vae {name}: client, pixels for a host (fp16)", name, lambda: decode().pixels("cpu", torch.float16))
        )
    return ways


def _diffusers_way(url: str, name: str, output: Output, latents: torch.Tensor) -> Way:
    from diffusers.utils import remote_utils

    result = "image" if output.is_image else "tensor"
    return Way(
        f"diffusers {name}: remote_decode, {result}", name, _function_call(remote_utils.remote_decode, url, output, latents)
    )


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


def _check(ways: list[Way], answers: dict[str, HttpResponse]) -> None:
    """A way that is fast and wrong counts for nothing."""
    bodies = {name: bytes(answer.body) for name, answer in answers.items()}
    for way in ways:
        got = way.ask()
        got = getattr(got, "payload", got)
        if "tensor" in way.name and got.view(torch.uint8).numpy().tobytes() != bodies[way.floor]:
            raise AssertionError(f"{way.name}: other values came")
        if "image" in way.name and np.array(got).shape != (SIDE, SIDE, 3):
            raise AssertionError(f"{way.name}: another picture came")


def _print_table(ways: list[Way]) -> None:
    floors = {way.floor: way for way in reversed(ways) if way.name.endswith("bare socket")}
    print(f"{'one 1024 px decode, loopback':<48} {'ms':>7} {'x floor':>8} {'CPU ms':>7} {'bytes down':>11}")
    for way in ways:
        size = len(floors[way.floor].ask())
        ratio = statistics.median(way.ratios) if way.ratios else 1.0
        ms, cpu_ms = statistics.median(way.ms), statistics.median(way.cpu_ms)
        print(f"{way.name:<48} {ms:>7.2f} {ratio:>8.2f} {cpu_ms:>7.2f} {size:>11}")
    bar = next(way for way in ways if way.name == "remote_vae u8: client, tensor")
    ratio = statistics.median(bar.ratios)
    verdict = "PASS" if ratio <= BAR else "MISS"
    print(f"\nMedians over pairs, {len(bar.ratios)} in the row with the bar; CPU of the whole client process.")
    print(f"{verdict}: u8, tensor in, tensor out takes {ratio:.2f} x the floor; the bar is {BAR} x.")


def main(rounds: int = ROUNDS) -> None:
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    pixels = photo_pixels(SIDE).to(torch.float16)
    answers = {
        name: decode_response(DecodeRequest(latents, output, Scaling(SCALING)), pixels) for name, output in _FORMS.items()
    }
    with canned_server(answers) as port:
        ways = _ways(port, latents, answers)
        _check(ways, answers)
        floors = {way.floor: way for way in ways if way.name.endswith("bare socket")}
        for way in ways:
            if way is not floors[way.floor]:
                way.measure_against(floors[way.floor], rounds)
        _print_table(ways)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
