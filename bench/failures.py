"""What an endpoint that fails costs the user: time lost before the local decode, for each way of failing.

The small trained VAE decodes 256 px with the adapter attached. A call that fails is followed by the same call switched off;
what it took longer is what was lost.

    python -m bench.failures
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from bench.client_overhead import canned_server, photo_pixels
from remote_vae import Handle, Settings, attach
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.wire import FINGERPRINT_KEYS, DecodeRequest, HttpResponse, Output, decode_response
from tests.chaos import Chaos

DEMO_VAE = Path(__file__).resolve().parent.parent / "assets" / "demo_vae"
SIDE = 256
WARM_UP = 3
QUICK_ROUNDS = 25
SLOW_ROUNDS = 5
PRESS_AFTER = 0.5

REFUSED_BAR_MS = 50.0
INTERRUPT_BAR_MS = 200.0


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds. ``worst`` is the longest of ``until_local``."""

    name: str
    rounds: int
    local: float
    lost: float
    until_local: float
    worst: float
    waited_on_purpose: float
    reason: str


class Bench:
    """One VAE with the adapter attached, and the clock."""

    def __init__(self) -> None:
        self._vae = AutoencoderKL.from_pretrained(DEMO_VAE, torch_dtype=torch.float32)
        self._latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1)) * 5
        self._local_started = 0.0
        self._pressed = threading.Event()
        self._stamp_original()
        self._handle: Handle = attach(self._vae, cancelled=self._pressed.is_set)

    def _stamp_original(self) -> None:
        original = self._vae.decode

        def decode(*args: Any, **kwargs: Any) -> Any:
            self._local_started = time.perf_counter()
            return original(*args, **kwargs)

        self._vae.decode = decode

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self._local_ms()

    def lost(self, name: str, rounds: int, settings: Settings, *, deadline: float = 0.0) -> Row:
        """Call time of failing calls less that of local ones, in turns; ``deadline`` is how long the settings let it wait."""
        self._handle.settings = settings
        local, failing, until_local = [], [], []
        for _ in range(rounds):
            local.append(self._local_ms())
            started = time.perf_counter()
            failing.append(_ms(self._decode))
            until_local.append((self._local_started - started) * 1000)
            record = self._handle.history.last
            if record is None or not record.fallback_reason:
                raise AssertionError(f"{name}: the endpoint answered")
        usual = statistics.median(local)
        lost = statistics.median(failing) - usual
        begun = statistics.median(until_local)
        return Row(name, rounds, usual, lost, begun, max(until_local), deadline * 1000, record.fallback_reason)

    def interrupted(self, name: str, rounds: int, settings: Settings) -> Row:
        """From the press of Interrupt until the local decode begins."""
        self._handle.settings = settings
        local, failing, waits = [], [], []
        for _ in range(rounds):
            local.append(self._local_ms())
            self._pressed.clear()
            presses: list[float] = []
            timer = threading.Timer(PRESS_AFTER, self._press, (presses,))
            timer.start()
            failing.append(_ms(self._decode))
            timer.join()
            waits.append((self._local_started - presses[0]) * 1000)
        self._pressed.clear()
        record = self._handle.history.last
        reason = record.fallback_reason if record else ""
        usual = statistics.median(local)
        lost = statistics.median(failing) - usual
        return Row(name, rounds, usual, lost, statistics.median(waits), max(waits), PRESS_AFTER * 1000, reason)

    def _press(self, presses: list[float]) -> None:
        presses.append(time.perf_counter())
        self._pressed.set()

    def _local_ms(self) -> float:
        self._handle.enabled = False
        took = _ms(self._decode)
        self._handle.enabled = True
        return took

    def _decode(self) -> Any:
        return self._vae.decode(self._latents)


def _ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


def _canned_answers() -> dict[str, HttpResponse]:
    """What a server with the same VAE says that has nothing to do."""
    request = DecodeRequest(torch.zeros(1, 4, SIDE // 8, SIDE // 8), Output.TENSOR)
    found = fingerprint_of(AutoencoderKL.from_pretrained(DEMO_VAE, torch_dtype=torch.float32))
    if found is None:
        raise AssertionError("the small VAE has no fingerprint")
    documents = {
        "info": {FINGERPRINT_KEYS[found[0]]: found[1]},
        "health": {"status": "ok", "running": False, "waiting": 0},
    }
    answers = {"decode": decode_response(request, photo_pixels(SIDE))}
    for name, document in documents.items():
        answers[name] = HttpResponse(200, {"Content-Type": "application/json"}, json.dumps(document).encode())
    return answers


def _refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _deaf_url() -> Iterator[str]:
    """A port whose queue of connections is full, so that the next one is neither taken nor refused; "" if that fails."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        probe = stack.enter_context(socket.socket())
        probe.settimeout(0.3)
        try:
            probe.connect(address)
        except TimeoutError:
            yield f"http://127.0.0.1:{address[1]}"
        else:
            yield ""


def _rows(bench: Bench, chaos: Chaos) -> Iterator[Row]:
    def settings(**values: Any) -> Settings:
        return Settings(**{"endpoint": chaos.url, "transfer": "raw", "cooldown": 0.0, **values})

    yield bench.lost("refused", QUICK_ROUNDS, settings(endpoint=_refused_url()))
    yield bench.lost("in its pause after a failure", QUICK_ROUNDS, settings(endpoint=_refused_url(), cooldown=30.0))
    chaos.reset("503")
    yield bench.lost("answers 503", QUICK_ROUNDS, settings())
    chaos.info = "pass"
    chaos.reset("nan")
    yield bench.lost("answers NaN", QUICK_ROUNDS, settings())
    chaos.reset("hang")
    yield bench.lost("hangs, first byte in 1.0 s", SLOW_ROUNDS, settings(first_byte_timeout=1.0), deadline=1.0)
    yield bench.interrupted(f"hangs, Interrupt after {PRESS_AFTER} s *", SLOW_ROUNDS * 3, settings())
    with _deaf_url() as url:
        if url:
            deaf = settings(endpoint=url, connect_timeout=1.0)
            yield bench.lost("no connection in 1.0 s", SLOW_ROUNDS, deaf, deadline=1.0)
            yield bench.interrupted("no connection, Interrupt *", SLOW_ROUNDS, settings(endpoint=url, connect_timeout=30.0))
    chaos.reset("slow")
    yield bench.lost("a byte every 50 ms, total 1.5 s", SLOW_ROUNDS, settings(total_timeout=1.5), deadline=1.5)


def _print_table(rows: list[Row]) -> None:
    print(
        f"{'the endpoint, ms':<38} {'rounds':>6} {'local':>7} {'lost':>8} {'meant':>6} {'begins':>8} {'worst':>8}  recorded as"
    )
    for row in rows:
        meant = f"{row.waited_on_purpose:>6.0f}" if row.waited_on_purpose else f"{'':>6}"
        print(
            f"{row.name:<38} {row.rounds:>6} {row.local:>7.1f} {row.lost:>8.1f} {meant} "
            f"{row.until_local:>8.1f} {row.worst:>8.1f}  {row.reason[:60]}"
        )
    print("\nlost: the call's time less that of the same call locally, medians. meant: as long as it was told to wait.")
    print("begins, worst: from the call (*: from the press) until the local decode begins, median and longest.")
    refused = next(row for row in rows if row.name == "refused")
    pressed = [row for row in rows if row.name.endswith("*")]
    _print_bar("refused, lost", refused.lost, REFUSED_BAR_MS)
    _print_bar("refused, longest until the local decode begins", refused.worst, REFUSED_BAR_MS)
    _print_bar(
        "Interrupt, longest from the press until the local decode begins", max(row.worst for row in pressed), INTERRUPT_BAR_MS
    )


def _print_bar(what: str, took: float, bar: float) -> None:
    print(f"{'PASS' if took < bar else 'MISS'}: {what}: {took:.1f} ms; the bar is {bar:g} ms.")


def main() -> None:
    # Each failure would be a warning on the screen; the table says it.
    import logging

    logging.getLogger("remote_vae").setLevel(logging.ERROR)
    # On a busy machine a second thread makes the local decode several times slower at random.
    torch.set_num_threads(1)
    with torch.inference_mode(), canned_server(_canned_answers()) as port:
        bench = Bench()
        bench.warm_up()
        chaos = Chaos(f"http://127.0.0.1:{port}")
        try:
            _print_table(list(_rows(bench, chaos)))
        finally:
            chaos.close()


if __name__ == "__main__":
    main()
