"""Who is let in, before a byte of a body is read: limits, places, bytes, and the wait that is expected."""

from __future__ import annotations

import io
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from PIL import Image

from remote_vae.errors import InvalidRequest
from remote_vae.server.admission import Admission, Busy, Limits, Place
from remote_vae.server.models import LoadedVae
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, Raw, wait_until

MEGAPIXEL = 1 << 20
SMALL = (1, 4, 8, 8)
SMALL_BYTES = 1024


@pytest.fixture
def serving(loaded: LoadedVae) -> Iterator[Callable[..., ServerThread]]:
    """Makes servers with limits."""
    running: list[ServerThread] = []

    def make(**limits: Any) -> ServerThread:
        running.append(ServerThread(loaded, limits=Limits(**limits)))
        return running[-1]

    yield make
    for each in running:
        each.close()


@pytest.fixture
def guarded(serving: Callable[..., ServerThread]) -> ServerThread:
    return serving(max_pixels=64 * 64, max_batch=2, max_waiting=2)


def health(server: ServerThread) -> dict[str, Any]:
    return dict(requests.get(f"{server.url}/health", timeout=TIMEOUT).json())


def post(server: ServerThread, batch: int = 1, **params: Any) -> requests.Response:
    params = {"shape": [batch, 4, 8, 8], "dtype": "float32", "output_type": "pt", **params}
    return requests.post(f"{server.url}/decode", params=params, data=bytes(SMALL_BYTES * batch), timeout=TIMEOUT)


class Held:
    """What a VAE that is held up has been asked for: the sizes of the batches. ``release`` lets it go on."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self._gate = threading.Event()

    def release(self) -> None:
        self._gate.set()

    @contextmanager
    def of(self, server: ServerThread) -> Iterator[Held]:
        vae = server.loaded.vae
        original = vae.decode

        def wait(z: Any, **kwargs: Any) -> Any:
            self.batches.append(z.shape[0])
            self._gate.wait(20)
            return original(z, **kwargs)

        vae.decode = wait
        try:
            yield self
        finally:
            self.release()
            del vae.decode


# --- how much may be asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(81, 480, 832), (81, 720, 1280), (121, 704, 1280), (129, 720, 1280), (257, 480, 704), (49, 480, 720), (25, 576, 1024)],
)
def test_the_clips_that_video_models_make_are_within_the_limits(frames: int, height: int, width: int) -> None:
    """Wan 2.1, its 720p, Wan 2.2's 5B, HunyuanVideo, LTX, CogVideoX, SVD."""
    Limits().check(1, frames, height, width)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "said"),
    [
        (1, 1, 4097, 4096, "4096 x 4097 pixels; this server takes at most 16777216 a picture"),
        (1, 5, 4097, 4096, "4096 x 4097 pixels; this server takes at most 16777216 a frame"),
        (33, 1, 8, 8, "33 pictures; this server takes at most 32 at once"),
        (33, 5, 8, 8, "33 videos; this server takes at most 32 at once"),
        (1, 1026, 8, 8, "1026 frames; this server takes at most 1025"),
        (5, 1, 4096, 4096, "83886080 pixels in all; this server takes at most 67108864 in one request"),
        (1, 150, 720, 1280, "150 frames of 1280 x 720 are 138240000 pixels in all; this server takes at most 134217728"),
        (4, 81, 480, 832, "81 frames of 832 x 480 are 129392640"),
    ],
)
def test_what_was_too_much_is_said(batch: int, frames: int, height: int, width: int, said: str) -> None:
    limits = Limits(max_video_pixels=100_000_000) if batch == 4 else Limits()
    with pytest.raises(InvalidRequest, match=said):
        limits.check(batch, frames, height, width)


def test_the_bytes_of_an_answer_are_those_of_its_form(serving: Callable[..., ServerThread]) -> None:
    """Beside a call of 4096 pixels in 8 bits there is room for another such one, and none for one of float32."""
    server = serving(max_bytes=45_000)
    with ThreadPoolExecutor() as pool, Held().of(server) as held:
        first = pool.submit(post, server, partial_postprocess=True)
        wait_until(lambda: bool(held.batches))
        assert post(server).status_code == 503
        second = pool.submit(post, server, partial_postprocess=True)
        wait_until(lambda: health(server)["waiting"] == 1)
        held.release()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


# --- by the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("/decode", (1, 4, 9, 8), b"at most 4096"),
        ("/decode", (3, 4, 1, 1), b"at most 2"),
        ("/encode", (1, 3, 65, 64), b"at most 4096"),
    ],
)
def test_a_limit_is_kept_before_the_body_is_read(
    guarded: ServerThread, path: str, shape: tuple[int, ...], message: bytes
) -> None:
    """The body never comes: an answer shows that nobody waited for it."""
    with Raw(guarded) as connection:
        status, _, answer = connection.post(path, shape, 999_999_999, sent=0).answer()
    assert status == 400
    assert message in answer


@pytest.mark.parametrize("length", [20_000, 10**12, 10**19])
def test_a_body_that_is_too_long_is_a_413_by_its_head_and_ends_the_connection(guarded: ServerThread, length: int) -> None:
    with Raw(guarded) as connection:
        status, headers, answer = connection.post("/decode", SMALL, length, sent=0).answer()
        assert status == 413
        assert headers["connection"] == "close"
        assert b"at most" in answer


def test_a_body_of_no_announced_length_is_cut_off_where_it_gets_too_long(guarded: ServerThread) -> None:
    params = {"shape": list(SMALL), "dtype": "float32"}
    endless = iter(lambda: bytes(1000), b"")
    answer = requests.post(f"{guarded.url}/decode", params=params, data=(next(endless) for _ in range(100)), timeout=TIMEOUT)
    assert answer.status_code == 413


def test_who_is_refused_while_he_still_sends_reads_why(guarded: ServerThread) -> None:
    """Ten times what fits into the buffers of a connection."""
    params = {"shape": [9, 4, 1, 1], "dtype": "float32"}
    answer = requests.post(f"{guarded.url}/decode", params=params, data=bytes(40_000_000), timeout=TIMEOUT)
    assert answer.status_code == 400
    assert "at most 2" in answer.json()["error"]


def test_a_png_larger_than_the_limit_is_refused(guarded: ServerThread) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (65, 64)).save(buffer, "PNG")
    answer = requests.post(f"{guarded.url}/encode", data=buffer.getvalue(), timeout=TIMEOUT)
    assert answer.status_code == 400
    assert "at most 4096" in answer.json()["error"]


# --- bodies that do not come ---------------------------------------------------------------------------------------------


def test_a_body_that_stops_coming_is_a_408_and_its_place_free(serving: Callable[..., ServerThread]) -> None:
    server = serving(stall=0.2, max_waiting=1)
    for sent in (0, 100):
        with Raw(server) as connection:
            status, headers, _ = connection.post("/decode", SMALL, SMALL_BYTES, sent=sent).answer()
            assert (status, headers["connection"]) == (408, "close")
    assert post(server).status_code == 200


def test_a_body_that_drips_is_a_408_too(serving: Callable[..., ServerThread]) -> None:
    with Raw(serving(stall=0.3)) as connection:
        connection.post("/decode", SMALL, SMALL_BYTES, sent=0)
        drips = threading.Event()

        def drip() -> None:
            try:
                while not drips.wait(0.02):
                    connection.send(b"\0")
            except OSError:
                pass  # as the server ends it

        thread = threading.Thread(target=drip)
        thread.start()
        assert connection.answer()[0] == 408
        drips.set()
        thread.join()


def test_bytes_are_taken_before_a_body_comes_and_given_back_with_its_connection(serving: Callable[..., ServerThread]) -> None:
    """Five uploads that nobody finishes: two have room, and the others hear it before they send."""
    server = serving(max_bytes=2_500_000, patience=60)
    uploads = [Raw(server).post("/decode", (1, 4, 32, 32), 16_384, sent=1000) for _ in range(5)]

    def answered() -> list[Raw]:
        ready = select.select([each.socket for each in uploads], [], [], 0)[0]
        return [each for each in uploads if each.socket in ready]

    wait_until(lambda: len(answered()) == 3)
    for each in answered():
        status, headers, _ = each.answer()
        assert (status, int(headers["retry-after"]) >= 1) == (503, True)
    for each in uploads:
        each.socket.close()
    with Raw(server) as another:
        wait_until(lambda: another.post("/decode", (1, 4, 32, 32), 16_384).answer()[0] == 200)


def test_what_is_made_of_levels_is_counted_before_they_come(serving: Callable[..., ServerThread]) -> None:
    """They wait as float32: five times what was sent."""
    nbytes = 3 * 64 * 64
    server = serving(max_bytes=6 * nbytes, patience=60)
    head = f"POST /encode?shape=1&shape=3&shape=64&shape=64&dtype=uint8 HTTP/1.1\r\nHost: x\r\nContent-Length: {nbytes}\r\n\r\n"
    with Raw(server) as first, Raw(server) as second:
        first.send(head.encode() + bytes(1))
        wait_until(lambda: health(server)["waiting"] == 0 and not server.engine.admission.is_empty)
        assert second.send(head.encode()).answer()[0] == 503
        assert first.send(bytes(nbytes - 1)).answer()[0] == 200


def test_a_hang_up_is_one_line_and_no_error(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        with Raw(server) as connection:
            connection.post("/decode", SMALL, SMALL_BYTES, sent=100)
            connection.socket.shutdown(1)
            connection.is_closed()
        wait_until(lambda: "hung up" in caplog.text)
    (line,) = [record for record in caplog.records if record.name.startswith("remote_vae")]
    assert (line.levelname, line.exc_info) == ("INFO", None)
    assert ": 499, the client hung up after 100 bytes" in line.getMessage()


# --- the queue -----------------------------------------------------------------------------------------------------------


def test_calls_wait_their_turn_a_full_queue_says_503_and_a_client_that_left_is_not_served(guarded: ServerThread) -> None:
    with ThreadPoolExecutor() as pool, Held().of(guarded) as held:
        first = pool.submit(post, guarded)
        wait_until(lambda: bool(held.batches))
        # A second client takes the last place in the queue and leaves before its turn.
        leaver = Raw(guarded).post("/decode", (2, 4, 8, 8), 2 * SMALL_BYTES)
        wait_until(lambda: health(guarded) == {"status": "ok", "running": True, "waiting": 1})
        third = post(guarded)
        assert third.status_code == 503
        assert int(third.headers["Retry-After"]) >= 1
        leaver.socket.close()
        # Its place is free at once; the first call still runs.
        wait_until(lambda: health(guarded) == {"status": "ok", "running": True, "waiting": 0})
        held.release()
        assert first.result().status_code == 200
        assert post(guarded).status_code == 200
        assert held.batches == [1, 1]


def place(admission: Admission, pixels: int = MEGAPIXEL, nbytes: int = 1) -> Place:
    """One whose body has come."""
    entered = admission.enter("decode", pixels, nbytes)
    entered.moved = None
    return entered


def work(admission: Admission, seconds: float, pixels: int = MEGAPIXEL) -> None:
    """A call that took so long."""
    done = place(admission, pixels)
    done.begun, done.ended = 0.0, seconds
    admission.measure([done])
    admission.leave(done)


def test_a_call_is_refused_when_it_would_wait_for_too_long_and_told_when_to_come_back() -> None:
    admission = Admission(Limits(max_wait=15))
    work(admission, 4.0)
    waiting = [place(admission) for _ in range(4)]
    assert admission.expected_wait() == pytest.approx(16)
    with pytest.raises(Busy, match="about 16 s") as refused:
        admission.enter("decode", MEGAPIXEL, 1)
    assert refused.value.retry_after == 8
    admission.leave(waiting[0])
    assert place(admission)


def test_what_a_call_takes_is_measured_by_the_pixel_and_what_was_last_counts_most() -> None:
    admission = Admission(Limits())
    # The first one also starts the GPU.
    work(admission, 9.0, MEGAPIXEL // 4)
    for _ in range(8):
        work(admission, 2.0)
    place(admission, 2 * MEGAPIXEL)
    assert admission.expected_wait() == pytest.approx(4, rel=0.1)


def test_before_anything_was_measured_only_a_few_may_wait() -> None:
    admission = Admission(Limits())
    for _ in range(8):
        place(admission)
    place(admission)
    with pytest.raises(Busy):
        place(admission)


def test_a_large_request_is_let_in_when_it_is_alone() -> None:
    admission = Admission(Limits(max_bytes=1000))
    first = place(admission, nbytes=5000)
    with pytest.raises(Busy):
        admission.enter("decode", 1, 1)
    admission.leave(first)
    assert place(admission, nbytes=900)
    assert place(admission, nbytes=100)
    with pytest.raises(Busy):
        admission.enter("decode", 1, 1)


def test_who_does_not_send_gives_up_his_place_for_who_does() -> None:
    admission = Admission(Limits(max_waiting=2, max_bytes=100))
    stalled, sending = (admission.enter("decode", 1, 50) for _ in range(2))
    with pytest.raises(Busy):
        admission.enter("decode", 1, 50)
    assert stalled.moved is not None
    stalled.moved -= 3.0
    assert admission.enter("decode", 1, 50)
    assert stalled.dropped.is_set()
    assert not sending.dropped.is_set()


def test_who_does_not_send_keeps_his_place_where_it_would_not_be_enough() -> None:
    admission = Admission(Limits(max_bytes=100))
    stalled, _ = admission.enter("decode", 1, 10), admission.enter("decode", 1, 80)
    assert stalled.moved is not None
    stalled.moved -= 3.0
    with pytest.raises(Busy):
        admission.enter("decode", 1, 50)
    assert not stalled.dropped.is_set()
    assert admission.enter("decode", 1, 20)
    assert stalled.dropped.is_set()


def test_nobody_waits_for_an_upload_that_takes_its_time() -> None:
    """It comes on, piece by piece, and the VAE has nothing to do."""
    admission = Admission(Limits(max_wait=15))
    work(admission, 20.0)
    upload = admission.enter("decode", MEGAPIXEL, 1)
    with pytest.raises(Busy, match="about 20 s"):
        admission.enter("decode", 1, 1)
    upload.entered -= 3.0
    assert admission.enter("decode", 1, 1)
    # Here it is, and the next ones come after it.
    upload.moved = None
    with pytest.raises(Busy, match="about 20 s"):
        admission.enter("decode", 1, 1)
