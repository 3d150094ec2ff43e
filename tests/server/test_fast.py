"""``--fast``: what is compiled at the start is used, compared, and never added to later."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from remote_vae.server.fast import Compiled, Fast, levels_off
from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import find_family
from tests.pretend_gpu import Card


class SmallVae(nn.Module):
    """A VAE of the SD kind in two layers, so that to compile it takes no time."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8)
        self.calls = 0

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.tanh(self.out(latents)),)

    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.into(pixels),)


class Backend:
    """A compiler that counts how often it is asked, and how often what it made is run. ``change``: what it does wrong."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.compiled = self.run = 0
        self.change = change

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.compiled += 1

        def run(*values: Any) -> Any:
            self.run += 1
            made = graph(*values)
            return tuple(map(self.change, made)) if self.change else made

        return run


@pytest.fixture
def small() -> LoadedVae:
    torch.manual_seed(0)
    # compiled code is kept by torch for the whole process
    torch._dynamo.reset()
    return LoadedVae(SmallVae().eval(), find_family("sd1"), "small", {})


def prepared(small: LoadedVae, backend: Any, *sizes: tuple[int, int]) -> LoadedVae:
    return Fast("compile", sizes, backend).prepared(small)


class LooksAfter(TorchFunctionMode):
    """As the server's worker looks after the client at each operation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def decoded(loaded: LoadedVae, latents: torch.Tensor) -> torch.Tensor:
    """As the server's worker calls it."""
    vae = loaded.current()
    with loaded.serving(), LooksAfter():
        return vae.whole(vae.module, "decode", latents)


def test_the_sizes_given_run_compiled_and_all_others_as_they_are(small: LoadedVae) -> None:
    backend = Backend()
    fast = prepared(small, backend, (64, 64), (32, 96))
    assert backend.compiled == 4
    for shape, runs in (((1, 4, 8, 8), 1), ((1, 4, 4, 12), 1), ((3, 4, 8, 8), 3), ((1, 4, 9, 9), 0), ((1, 4, 12, 4), 0)):
        latents, before = torch.randn(shape), backend.run
        assert torch.allclose(decoded(fast, latents), decoded(small, latents), atol=1e-6)
        assert backend.run - before == runs, shape
    # Whatever came, nobody has waited for a compiler.
    assert backend.compiled == 4


@pytest.mark.parametrize("made", ["in the call", "before it"])
def test_tensors_of_another_make_find_what_was_compiled(small: LoadedVae, made: str) -> None:
    """torch looks it up by strides, and by whether gradients could be asked for."""
    backend = Backend()
    fast = prepared(small, backend, (64, 64))
    latents = torch.randn(1, 8, 8, 4).permute(0, 3, 1, 2)
    if made == "in the call":
        with torch.inference_mode():
            latents = latents / 2
    before = backend.run
    decoded(fast, latents)
    assert backend.run == before + 1


def test_what_gives_another_picture_is_not_used_and_one_line_says_so(
    small: LoadedVae, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(lambda made: made + 3 / 127.5)
    with caplog.at_level(logging.WARNING):
        fast = prepared(small, backend, (64, 64))
    (line,) = [record.getMessage() for record in caplog.records if "decode" in record.getMessage()]
    assert "decode 8x8 goes uncompiled: compiled, it is 3.00 levels of 255 off" in line
    before = backend.run
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(decoded(fast, latents), decoded(small, latents))
    assert backend.run == before


def test_where_there_is_no_compiler_calls_go_as_they_are(small: LoadedVae, caplog: pytest.LogCaptureFixture) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("Failed to find a C++ compiler\nand much more")

    with caplog.at_level(logging.WARNING):
        fast = prepared(small, no_compiler, (64, 64), (32, 32))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "decode 8x8, encode 64x64, decode 4x4, encode 32x32 goes uncompiled" in line
    assert "Failed to find a C++ compiler" in line
    assert fast.current().whole is small.current().whole


def test_a_vae_that_is_compiled_anew_at_each_call_is_not_used(small: LoadedVae, caplog: pytest.LogCaptureFixture) -> None:
    def decode(latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        small.vae.calls += 1
        return (torch.tanh(small.vae.out(latents)) * (1 if small.vae.calls % 2 else 1.0),)

    small.vae.decode = decode
    with caplog.at_level(logging.WARNING):
        fast = prepared(small, Backend(), (64, 64))
    assert "decode 8x8 goes uncompiled" in caplog.text
    assert decoded(fast, torch.randn(1, 4, 8, 8)).shape == (1, 3, 64, 64)


def test_a_vae_of_other_weights_does_not_run_what_was_compiled_for_this_one(small: LoadedVae) -> None:
    """A copy in float32 after NaN, say."""
    fast = prepared(small, Backend(), (64, 64))
    other = SmallVae().eval()
    latents = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        assert torch.equal(fast.whole(other, "decode", latents), other.decode(latents)[0])


def test_a_size_that_the_vae_cannot_make_is_left_out(small: LoadedVae, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fast = prepared(small, Backend(), (60, 64), (64, 64))
    assert "64x60 is no multiple of 8" in caplog.text
    assert isinstance(fast.whole, Compiled)
    assert len(fast.whole) == 2


def test_levels_are_those_of_all_but_a_thousandth() -> None:
    one = torch.zeros(1, 3, 100, 100)
    other = one.clone()
    other.view(-1)[:30] = 1.0
    assert levels_off(one, other) == 0
    other.view(-1)[:31] = 1.0
    assert levels_off(one, other) == 127.5
    assert levels_off(one, one + 1 / 127.5) == pytest.approx(1.0)
    # What is cut off anyway is no difference; what is no number is one.
    assert levels_off(one + 1, one + 9) == 0
    assert not levels_off(one, one * torch.nan) <= 1


def test_exact_makes_the_usual_sizes_once_and_changes_nothing(small: LoadedVae, card: Card) -> None:
    made: list[tuple[str, tuple[int, ...]]] = []

    def whole(module: Any, op: Any, tensor: torch.Tensor) -> torch.Tensor:
        made.append((op, tuple(tensor.shape)))
        return tensor

    watched = replace(small, whole=whole)
    switches = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert Fast("exact", [(64, 64)]).prepared(watched) is watched
    assert made == []  # on a CPU there is nothing to be warmed up
    watched.vae.device = torch.device("cuda")
    assert Fast("exact", [(64, 64)]).prepared(watched) is watched
    assert made == [("decode", (1, 4, 8, 8)), ("encode", (1, 3, 64, 64))]
    assert Fast("off", [(64, 64)]).prepared(watched) is watched
    assert len(made) == 2
    assert switches == (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )


@pytest.mark.skipif("REMOTE_VAE_COMPILE" not in os.environ, reason="takes minutes: REMOTE_VAE_COMPILE=1")
def test_a_real_vae_by_the_real_compiler(loaded: LoadedVae) -> None:
    torch._dynamo.reset()
    fast = Fast("compile", [(64, 64)]).prepared(loaded)
    assert isinstance(fast.whole, Compiled)
    assert len(fast.whole) == 2
    latents = torch.randn(1, 4, 8, 8)
    assert levels_off(decoded(fast, latents), decoded(loaded, latents)) <= 1
