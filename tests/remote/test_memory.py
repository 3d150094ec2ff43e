"""What a long video takes of a client's memory, in a process of its own: 81 frames of 480 x 832."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

VALUES = 81 * 480 * 832 * 3
MB = 1 << 20
# Beside the clip: pieces, threads, a frame in floating point, what the allocator keeps. Seen: 20 MB.
SLACK = 40 * MB

CLIENT = """
import json, sys
import torch
from remote_vae.call import VaeCall
from remote_vae.remote.route import RemoteRoute
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def taken(op, tensor, transfer):
    kept = []
    call = VaeCall(op, tensor, VaeAtWork(None, find_family("qwen-image")),
                   adopt=lambda answer: answer.pixels("cpu", torch.float32) if op == "decode" else answer.latents)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    value = RemoteRoute().run(call, Settings(endpoint=sys.argv[1], transfer=transfer)).value
    return peak() - before, list(value.shape)

taken("decode", torch.randn(1, 16, 1, 60, 104), "u8")
found = {"decode u8": taken("decode", torch.randn(1, 16, 21, 60, 104), "u8")}
# A quarter of the size tells as much.
found["decode raw"] = taken("decode", torch.randn(1, 16, 21, 30, 52), "raw")
pixels = torch.rand(1, 3, 81, 240, 416)
for transfer in ("u8", "raw"):
    found["encode " + transfer] = taken("encode", pixels, transfer)
print(json.dumps(found))
"""


class _Endpoint(BaseHTTPRequestHandler):
    """Answers with a pattern in the shape that was asked for, a frame at a time."""

    def do_POST(self) -> None:
        rest = int(self.headers["Content-Length"])
        while rest:
            rest -= len(self.rfile.read(min(rest, MB)))
        query = parse_qsl(urlsplit(self.path).query)
        frames, height, width = [int(value) for key, value in query if key == "shape"][2:]
        values = dict(query)
        if "output_type" not in values:
            shape = [1, 32, (frames - 1) // 4 + 1, height // 8, width // 8]
            self._answer(shape, "float32", b"\0\0\x80?\0\0\0@", {"posterior": "True"})
        elif values["partial_postprocess"] == "True":
            self._answer([(frames - 1) * 4 + 1, height * 8, width * 8, 3], "uint8", bytes(range(256)))
        else:
            self._answer([1, 3, (frames - 1) * 4 + 1, height * 8, width * 8], "float32", b"\0\0\0?\0\0\0\0")

    def _answer(self, shape: list[int], dtype: str, pattern: bytes, more: dict[str, str] | None = None) -> None:
        length = 4 if dtype == "float32" else 1
        for size in shape:
            length *= size
        self.send_response(200)
        for name, value in {"shape": json.dumps(shape), "dtype": dtype, "Content-Length": str(length), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        piece = pattern * (MB // len(pattern))
        while length:
            sent = piece[: min(length, MB)]
            self.wfile.write(sent)
            length -= len(sent)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process can be read on Linux only")
def test_a_clip_stands_in_a_clients_memory_once_as_bytes_and_once_as_the_result(endpoint: str) -> None:
    ran = subprocess.run([sys.executable, "-c", CLIENT, endpoint], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    taken = json.loads(ran.stdout)
    print({what: f"{peak / 1e6:.0f} MB" for what, (peak, _) in taken.items()})
    assert taken["decode u8"][1] == [1, 3, 81, 480, 832]
    assert taken["decode u8"][0] < VALUES + 4 * VALUES + SLACK  # levels, and float32 made of them
    assert taken["decode raw"][0] < 4 * VALUES / 4 + SLACK  # what came is the result
    assert taken["encode u8"][0] < 2 * VALUES / 4 + SLACK  # float16 goes up
    assert taken["encode raw"][0] < SLACK  # the host's own values go up
