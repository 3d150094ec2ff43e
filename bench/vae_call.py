"""One VAE call to be measured: which VAE, which method, which size; and the measurements, each for a process of its own."""

from __future__ import annotations

import functools
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from bench import peer_tilevae
from bench.live_bytes import STORE, LiveBytes
from bench.vaes import SD, random_vae
from remote_vae.tiled import exact

DEMO_VAE = Path(__file__).resolve().parent.parent / "assets" / "demo_vae"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_SIDE = 64
LONG_SIZE = 2048
MAX_PAIRS, PAIRS_SECONDS = 9, 60.0


@dataclass(frozen=True)
class Call:
    """What is called.

    Attributes:
        vae: "sd", the real architecture with random weights, or "small", the trained one of the demo.
        op: "decode" or "encode".
        size: side of the square picture in pixels.
        method: "whole", "exact", "diffusers tiling", "multidiffusion" or "multidiffusion fast".
        weights: dtype of the VAE.
        dtype: what the exact method computes in; "" leaves it to the VAE.
        max_bytes: what the exact method may take; 0 is as much as it likes.
        peer: folder of multidiffusion's Tiled VAE.
    """

    vae: str
    op: str
    size: int
    method: str = "whole"
    weights: str = "float32"
    dtype: str = ""
    max_bytes: int = 0
    peer: str = ""

    @property
    def is_long(self) -> bool:
        """Whether it takes minutes on a processor, so that it is called as seldom as can be."""
        return self.vae == "sd" and self.size >= LONG_SIZE

    @property
    def input_name(self) -> str:
        return f"{self.vae}-{self.op}-{self.size}"

    def prepare(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The call on a VAE of its own: latents to pixels, or pixels to moments."""
        vae = load(self.vae).to(DEVICE)
        if self.weights != "float32":
            vae = vae.to(getattr(torch, self.weights))
        method = self._exact if self.method == "exact" else self._diffusers
        return functools.partial(method, vae)

    def _exact(self, vae: Any, batch: torch.Tensor, progress: Callable[[float], None] | None = None) -> torch.Tensor:
        return getattr(exact, self.op)(
            vae,
            batch.to(vae.dtype),
            max_bytes=self.max_bytes or None,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            progress=progress,
        )

    def _diffusers(self, vae: Any, batch: torch.Tensor) -> torch.Tensor:
        if self.method == "diffusers tiling":
            vae.enable_tiling()
        if self.method.startswith("multidiffusion") and not isinstance(vae.decoder, _Called):
            encoder, decoder = peer_tilevae.hooks(Path(self.peer), vae, fast=self.method.endswith("fast"))
            vae.encoder, vae.decoder = _Called(encoder), _Called(decoder)
        batch = batch.to(vae.dtype)
        return vae.decode(batch).sample if self.op == "decode" else vae.encode(batch).latent_dist.parameters


class _Called(nn.Module):
    """A function where a VAE has a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = lambda x, *_: function(x)


def load(name: str) -> Any:
    """The VAE in float32 on the CPU."""
    if name == "small":
        return AutoencoderKL.from_pretrained(DEMO_VAE, torch_dtype=torch.float32).eval()
    return random_vae(SD)


# --- what a child process does --------------------------------------------------------------------------------------------


def measure_memory(folder: Path, call: Call, result_name: str) -> dict[str, Any]:
    """Seconds of one call and how far memory rises during it; the result is left in ``folder``."""
    run, batch = _warm(folder, call)
    with torch.inference_mode():
        start = _reset_peak()
        seconds, result = _timed(run, batch)
        peak = _peak()
    result = result.float().cpu()
    torch.save(result, folder / result_name)
    finite = bool(torch.isfinite(result).all())
    return {"seconds": seconds, "memory": peak - start, "process": peak, "finite": finite}


def measure_ticks(folder: Path, call: Call) -> dict[str, Any]:
    """The longest time between two questions to ``cancelled``: how long an Interrupt may have to wait."""
    run, batch = _warm(folder, call)
    times = [time.perf_counter()]
    with torch.inference_mode():
        run(batch, progress=lambda _: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    return {"ticks": len(times) - 2, "longest": max(later - sooner for sooner, later in itertools.pairwise(times))}


def measure_live(folder: Path, call: Call) -> dict[str, Any]:
    """Peak of the live bytes on the compute device and of those put away from it."""
    run, batch = _warm(folder, call)
    live = LiveBytes()
    with torch.no_grad(), live.storing(), live:
        result = run(batch)
    return {"live": live.peak[str(result.device)], "stored": live.peak[STORE]}


def measure_pairs(folder: Path, base: Call, other: Call) -> dict[str, Any]:
    """Both calls in turns: median seconds of each, and the median of the pairs' ratios, other to base."""
    (run_base, batch), (run_other, _) = _warm(folder, base), _warm(folder, other)
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    with torch.inference_mode():
        while not pairs or (len(pairs) < MAX_PAIRS and time.perf_counter() - started < PAIRS_SECONDS):
            pairs.append((_timed(run_base, batch)[0], _timed(run_other, batch)[0]))
    bases, others = zip(*pairs, strict=True)
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    return {"base": statistics.median(bases), "other": statistics.median(others), "ratio": ratio, "pairs": len(pairs)}


def _warm(folder: Path, call: Call) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The call, after one on a small corner of the picture, so that libraries are loaded; and its input."""
    run = call.prepare()
    batch = torch.load(folder / f"{call.input_name}.pt").to(DEVICE)
    side = WARM_UP_SIDE // 8 if call.op == "decode" else WARM_UP_SIDE
    with torch.inference_mode():
        run(batch[:, :, :side, :side].clone())
    return run, batch


def _timed(run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> tuple[float, torch.Tensor]:
    _wait()
    started = time.perf_counter()
    result = run(batch)
    _wait()
    return time.perf_counter() - started, result


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _reset_peak() -> int:
    """Bytes in use; the peak counts from here. On a GPU its allocator's, else the process's."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        # Not Linux: the peak of the whole life of the process, in bytes on a Mac.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
