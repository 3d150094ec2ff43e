"""``--fast``: what a server does at its start so that calls take less time.

off: nothing.
exact: the usual sizes are made once, which loads a GPU's kernels and fills its allocator. That changes no bit of any answer.
Nothing else is switched on: cudnn.benchmark and TF32 choose other kernels, whose last bits differ, and channels_last is slower
(1.56 x on an H100). A CPU has nothing to be warmed up.
compile: ``torch.compile`` over the sizes given. Other shapes and dtypes go as they always do, so that no call ever waits for a
compiler: what is compiled at the start is looked up later, and never added to. Of a batch each picture is a call.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.tiled.memory import free_memory
from remote_vae.vae.at_work import Op, VaeAtWork

log = logging.getLogger("remote_vae")

Whole = Callable[[Any, Op, torch.Tensor], torch.Tensor]
_OPS: tuple[Op, ...] = ("decode", "encode")

# What is compiled may be off by so many levels of 255 in all but a thousandth of the values.
MOST_LEVELS = 1.0
_SHARE = 0.999
# Torch keeps this many compilations of one piece of code: each VAE, shape and device is one.
_COMPILATIONS = 256


class Fast:
    """Loads VAEs and prepares them, as long as the server starts.

    Args:
        mode: "off", "exact" or "compile".
        sizes: height and width in pixels of what is prepared.
        backend: of ``torch.compile``.
    """

    def __init__(self, mode: str, sizes: Sequence[tuple[int, int]], backend: str = "inductor") -> None:
        self.mode = mode
        self.sizes = sizes
        self.backend = backend
        # A VAE that is loaded later is loaded for somebody who waits for it.
        self.is_starting = True

    def load(self, source: str, **options: Any) -> LoadedVae:
        """``load_vae``, and at the start what is to be done for it."""
        loaded = load_vae(source, **options)
        return self.prepared(loaded) if self.is_starting else loaded

    def prepared(self, loaded: LoadedVae) -> LoadedVae:
        """``loaded``, whose calls of the sizes are fast from now on."""
        if self.mode == "compile":
            return replace(loaded, whole=self._compiled(loaded))
        if self.mode == "exact" and loaded.device.type != "cpu":
            self._warm(loaded)
        return loaded

    def _warm(self, loaded: LoadedVae) -> None:
        vae = loaded.current()
        for op, example in self._examples(vae):
            try:
                with loaded.serving():
                    vae.whole(vae.module, op, example)
            except Exception as error:
                # Too large for this card, say: a call will be made in less memory.
                log.info("--fast exact: %s of %s is not warmed up: %s", _shape(example), vae.model, _line(error))
                free_memory()

    def _compiled(self, loaded: LoadedVae) -> Whole:
        vae, started = loaded.current(), time.monotonic()
        whole = Compiled(vae)
        failed: dict[str, list[str]] = {}
        for op, example in self._examples(vae):
            try:
                with loaded.serving():
                    whole.add(op, example, self.backend)
            except Exception as error:
                failed.setdefault(_line(error), []).append(f"{op} {_shape(example)}")
                log.info("--fast compile", exc_info=error)
            finally:
                free_memory()
        for why, which in failed.items():
            log.warning("--fast compile: of %s, %s goes uncompiled: %s", vae.model, ", ".join(which), why)
        log.info("--fast compile: %d shapes of %s in %.0f s", len(whole), vae.model, time.monotonic() - started)
        return whole if len(whole) else vae.whole

    def _examples(self, vae: VaeAtWork) -> Iterator[tuple[Op, torch.Tensor]]:
        """Latents and pictures of the sizes, as a trained VAE's are spread."""
        family = vae.family
        frames = (1,) if family.video else ()
        random = torch.Generator().manual_seed(0)
        for height, width in self.sizes:
            cells = height // family.downscale, width // family.downscale
            if 0 in cells or cells[0] * family.downscale != height or cells[1] * family.downscale != width:
                log.warning("--fast-sizes: %dx%d is no multiple of %d, as %s needs", width, height, family.downscale, vae.model)
                continue
            latents = torch.randn((1, family.latent_channels, *frames, *cells), generator=random)
            pixels = torch.rand((1, family.pixel_channels, *frames, height, width), generator=random) * 2 - 1
            yield "decode", (latents / (family.scaling_factor or 1.0)).to(vae.device, vae.dtype)
            yield "encode", pixels.to(vae.device, vae.dtype)


@dataclass(frozen=True)
class _Key:
    """What a compilation is for: one picture, or one frame, of this shape."""

    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, op: Op, tensor: torch.Tensor) -> _Key:
        return cls(op, tuple(tensor.shape[1:]), tensor.dtype)


class Compiled:
    """A VAE's whole call: compiled for the shapes that were added, for all others as it was."""

    def __init__(self, vae: VaeAtWork) -> None:
        self._vae = vae
        self._runs: dict[_Key, Callable[[torch.Tensor], torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __call__(self, module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
        run = self._runs.get(_Key.of(op, tensor))
        if run is None or module is not self._vae.module:
            return self._vae.whole(module, op, tensor)
        with _no_modes():
            made = [run(_plain(tensor[index : index + 1])) for index in range(len(tensor))]
        return made[0] if len(made) == 1 else torch.cat(made)

    def add(self, op: Op, example: torch.Tensor, backend: str) -> None:
        """Compile for the shape of ``example`` ``[1, C, (1,) H, W]``, and compare.

        Raises:
            ValueError: what is compiled gives something else. And what the compiler raises.
        """
        example = _plain(example)
        expected = self._vae.whole(self._vae.module, op, example)
        compiled = torch.compile(_alone(self._vae, op), dynamic=False, backend=backend)
        with _dynamo().config.patch(cache_size_limit=_COMPILATIONS):
            compiled(example)
        # What keeps something between calls would be compiled anew at each of them.
        with _dynamo().config.patch(error_on_recompile=True):
            made = compiled(_plain(example))
        off = self._levels_off(op, made, expected)
        if not off <= MOST_LEVELS:
            raise ValueError(f"compiled, it is {off:.2f} levels of 255 off at the 99.9th percentile")
        self._runs[_Key.of(op, example)] = _dynamo().run(compiled)

    def _levels_off(self, op: Op, made: torch.Tensor, expected: torch.Tensor) -> float:
        """Of latents: the levels of the pictures that they become."""
        if op == "encode":
            made, expected = (self._decoded(each) for each in (made, expected))
        return levels_off(made, expected)

    def _decoded(self, encoded: torch.Tensor) -> torch.Tensor:
        vae = self._vae
        mean = encoded.chunk(2, dim=1)[0] if vae.has_posterior else encoded
        return vae.whole(vae.module, "decode", mean.contiguous())


def levels_off(made: torch.Tensor, expected: torch.Tensor) -> float:
    """By how many levels of 255 pixels in [-1, 1] differ at the 99.9th percentile; NaN: more of them are not finite."""
    one, other = (each.float().clamp(-1, 1).flatten() for each in (made, expected))
    differences = (one - other).abs()
    return float(differences.kthvalue(math.ceil(_SHARE * len(differences))).values) * 127.5


def _alone(vae: VaeAtWork, op: Op) -> Callable[[torch.Tensor], torch.Tensor]:
    """One call as a function of one tensor, with code of its own, as torch keeps compilations by code."""

    def call(tensor: torch.Tensor) -> torch.Tensor:
        return vae.whole(vae.module, op, tensor)

    return FunctionType(call.__code__.replace(co_name=op), call.__globals__, op, call.__defaults__, call.__closure__)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as every other call has them: torch looks up what it compiled by strides, and by where they were made."""
    return tensor.contiguous() if tensor.is_inference() else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _no_modes() -> Iterator[None]:
    """Without what looks after the client at each operation: under it torch would not know what it compiled without it."""
    if not _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        yield
        return
    with _pop_mode_temporarily(), _no_modes():
        yield


def _dynamo() -> Any:
    # Importing it takes seconds.
    import torch._dynamo

    return torch._dynamo  # noqa: SLF001  # torch.compiler has no "run what is compiled, and nothing else" before 2.6


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, reversed(tensor.shape[-2:])))


def _line(error: Exception) -> str:
    """What it says in one line: its first, or where torch says there only who failed, the next."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)
