"""What ``bench.gpu`` measures on one device: calls in time and memory, the ways to make them, and cards made small."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from remote_vae import local, tiled
from remote_vae.call import User, VaeCall
from remote_vae.local import route
from remote_vae.settings import Settings
from remote_vae.tiled.memory import free_memory, is_out_of_memory
from remote_vae.vae.at_work import Op, VaeAtWork, whole_diffusers
from remote_vae.vae.families import find_family

SCALE = 8
GB = 1 << 30
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IS_CARD = DEVICE.type == "cuda"
# Sides of tiles in pixels, and how much those of ComfyUI's ``decode_tiled_`` and ``encode_tiled_`` overlap.
TILE, _OVERLAP = (512, 128) if IS_CARD else (64, 16)


class TooLong(BaseException):
    """The call has taken as long as it may. No error of a way, after which the next one would be tried."""


@dataclass(frozen=True)
class Case:
    """One VAE call. ``side``: of the square picture in pixels."""

    op: Op
    side: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 4, self.side // SCALE, self.side // SCALE) if self.op == "decode" else (1, 3, self.side, self.side)

    def tensor(self) -> torch.Tensor:
        """The same for each device and dtype: latents as a normal distribution, pixels from -1 to 1."""
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(self.shape, generator=generator)
        return (values if self.op == "decode" else values.clamp(-1, 1)).to(DEVICE, self.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.op} {self.side}"


@dataclass
class Measured:
    """What became of a call.

    Attributes:
        seconds: median of ``times`` calls after one that is not counted, or of the first where there was time for no more; nan:
            there is none.
        first: seconds of the first.
        allocated, reserved: bytes that the allocator's peaks rose by; on a processor nan.
        result: of the last call, on the processor in float32.
        failure: why there is none.
        made_by: the way that made it.
    """

    seconds: float = math.nan
    first: float = math.nan
    times: int = 0
    allocated: float = math.nan
    reserved: float = math.nan
    result: torch.Tensor | None = field(default=None, repr=False)
    failure: str = ""
    made_by: str = ""


def measure(call: Callable[[], torch.Tensor], *, seconds: float, most: int = 5) -> Measured:
    """Call until ``seconds`` have gone or ``most`` calls are made, once at least. Never raises but for an Interrupt."""
    measured = Measured()
    free_memory()
    began = time.perf_counter()
    start = _start_of_peaks()
    try:
        measured.first, result = _timed(call)
        measured.allocated, measured.reserved = (peak - before for peak, before in zip(_peaks(), start, strict=True))
        times = []
        while not times or (len(times) < most and time.perf_counter() - began < seconds):
            if time.perf_counter() - began + measured.first > seconds:
                times.append(measured.first)
                break
            del result
            took, result = _timed(call)
            times.append(took)
        measured.seconds, measured.times = statistics.median(times), len(times)
        measured.result = result.to("cpu", torch.float32)
        if not torch.isfinite(measured.result).all():
            measured.failure = "not finite"
    except TooLong:
        measured.failure = f"longer than {time.perf_counter() - began:.0f} s"
    except Exception as error:
        measured.failure = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
    free_memory()
    return measured


def _timed(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        result = call()
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    """Until the device has done all that it was told."""
    if IS_CARD:
        torch.cuda.synchronize()


def _start_of_peaks() -> tuple[float, float]:
    if not IS_CARD:
        return math.nan, math.nan
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated()), float(torch.cuda.memory_reserved())


def _peaks() -> tuple[float, float]:
    if not IS_CARD:
        return math.nan, math.nan
    return float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())


def nearness(ours: torch.Tensor | None, true: torch.Tensor | None, op: Op) -> float:
    """PSNR in dB: of pixels against 2 from black to white, of moments against their standard deviation. nan: there is none."""
    if ours is None or true is None:
        return math.nan
    error = (ours.double() - true.double()).square().mean().sqrt().item()
    deviation = 2.0 if op == "decode" else true.double().std().item()
    return 20 * math.log10(deviation / error) if error else math.inf


# --- ways to make a call ----------------------------------------------------------------------------------------------------


def whole(vae: Any, case: Case) -> torch.Tensor:
    """The whole VAE."""
    return whole_diffusers(vae, case.op, case.tensor())


def exact(vae: Any, case: Case, limit: int | None, deadline: float) -> torch.Tensor:
    """The exact tiled VAE in ``limit`` bytes. Raises TooLong after ``deadline`` (``time.perf_counter``)."""

    def progress(_: float) -> None:
        if time.perf_counter() > deadline:
            raise TooLong

    call = tiled.decode if case.op == "decode" else tiled.encode
    return call(vae, case.tensor(), max_bytes=limit, progress=progress)


def diffusers_tiling(vae: Any, case: Case) -> torch.Tensor:
    """diffusers' own overlapping tiles, blended."""
    vae.enable_tiling()
    try:
        return whole(vae, case)
    finally:
        vae.disable_tiling()


def three_passes(vae: Any, case: Case) -> torch.Tensor:
    """The mean of three tilings, in wide, in high and in square tiles, as ComfyUI makes them."""
    tensor = case.tensor()
    to_cells = SCALE if case.op == "decode" else 1
    side, overlap = TILE // to_cells, _OVERLAP // to_cells
    passes = [(side // 2, side * 2), (side * 2, side // 2), (side, side)]
    made = [_blended(lambda tile: whole_diffusers(vae, case.op, tile), tensor, tiles, overlap) for tiles in passes]
    return (made[0] + made[1] + made[2]) / 3


def _blended(
    make: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, sides: tuple[int, int], overlap: int
) -> torch.Tensor:
    """Tiles of ``sides`` that overlap, each weighed less and less towards its edges."""
    height, width = tensor.shape[-2:]
    result = weights = None
    for top in _starts(height, sides[0], overlap):
        for left in _starts(width, sides[1], overlap):
            tile = make(tensor[..., top : top + sides[0], left : left + sides[1]])
            up = tile.shape[-1] / min(sides[1], width - left)
            if result is None or weights is None:
                result = tile.new_zeros(1, tile.shape[1], round(height * up), round(width * up))
                weights = tile.new_zeros(1, 1, *result.shape[-2:])
            rows, columns = round(top * up), round(left * up)
            weight = _ramp(tile.shape[-2], overlap * up, tile)[:, None] * _ramp(tile.shape[-1], overlap * up, tile)
            place = (..., slice(rows, rows + tile.shape[-2]), slice(columns, columns + tile.shape[-1]))
            result[place] += tile * weight
            weights[place] += weight
    if result is None or weights is None:
        raise ValueError("nothing to be tiled")
    return result / weights


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length <= side:
        return [0]
    return [*range(0, length - side, side - overlap), length - side]


def _ramp(length: int, overlap: float, like: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(length, device=like.device, dtype=torch.float32)
    nearest = torch.minimum(steps + 1, length - steps)
    return (nearest / max(1.0, overlap)).clamp(max=1.0).to(like.dtype)


def answered(vae: Any, case: Case, deadline: float, settings: Settings, **more: Any) -> tuple[torch.Tensor, str]:
    """What the product makes of the call on this machine, and by which way. Raises TooLong after ``deadline``."""

    def tell(_: str) -> None:
        if time.perf_counter() > deadline:
            raise TooLong

    def values(answer: Any) -> torch.Tensor:
        made: torch.Tensor = answer.tensor if case.op == "decode" else answer.latents
        return made

    tensor = case.tensor()
    at_work = VaeAtWork(vae, find_family("sd1"), tensor.device, tensor.dtype)
    call: VaeCall[torch.Tensor] = VaeCall(
        case.op, tensor, at_work, adopt=values, whole=lambda: whole(vae, case), user=User(tell=tell), **more
    )
    outcome = local.answer(call, settings)
    return outcome.value, " ".join(filter(None, (outcome.route, outcome.detail)))


# --- small cards ------------------------------------------------------------------------------------------------------------


@contextmanager
def ballast(free: int) -> Iterator[None]:
    """Within, something else has the card but for ``free`` bytes."""
    free_memory()
    there, _ = torch.cuda.mem_get_info(DEVICE)
    weight = torch.empty(max(0, there - free), dtype=torch.uint8, device=DEVICE)
    try:
        yield
    finally:
        del weight
        free_memory()


@contextmanager
def fraction(free: int) -> Iterator[None]:
    """Within, this process may take ``free`` bytes more than it has."""
    free_memory()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(DEVICE) + free) / total), DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@contextmanager
def told(free: int) -> Iterator[None]:
    """Within, the processor is said to have so many bytes free. They are not held to."""
    with patch.object(route, "available_memory", lambda _: free):
        yield
