"""What an attached adapter costs when it is switched off: microseconds on every VAE call of a user who does not use it.

The VAE does nothing, so that only the way to it is measured. Blocks of calls with the hook and without it take turns.

    python -m bench.hook_overhead
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch

from remote_vae.hosts import forge_kin
from remote_vae.hosts.a1111 import A1111
from remote_vae.hosts.diffusers import attach
from remote_vae.hosts.sdnext import SdNext

BAR_US = 5.0
BLOCKS = 200
CALLS = 500


class AutoencoderKL:
    """As much of diffusers' class as the adapter looks at, its name included."""

    config = {"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": (128, 256, 512, 512)}  # noqa: RUF012

    def decode(self, tensor: torch.Tensor, return_dict: bool = True) -> torch.Tensor:  # noqa: ARG002
        return tensor

    def encode(self, tensor: torch.Tensor, return_dict: bool = True) -> torch.Tensor:  # noqa: ARG002
        return tensor


class StillModel:
    """As much of ldm's LatentDiffusion as the adapter looks at."""

    scale_factor = 0.18215

    def decode_first_stage(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def encode_first_stage(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class StillForgeVae:
    """As much of the VAE of Forge and its kin as the adapter looks at."""

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        return samples_in

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        return pixel_samples


class HookedForgeVae(StillForgeVae):
    """In the place of the class that their adapter hooks."""


class HookedClassVae(AutoencoderKL):
    """In the place of the class that SD.Next's adapter hooks."""

    def decode(self, tensor: torch.Tensor, return_dict: bool = True) -> torch.Tensor:  # noqa: ARG002
        return tensor

    def encode(self, tensor: torch.Tensor, return_dict: bool = True) -> torch.Tensor:  # noqa: ARG002
        return tensor


class Opts:
    """A1111's ``shared.opts``: reads what is set, then the default, then the attribute, as its modules/options.py does."""

    builtin = frozenset({"data_labels", "data", "restricted_opts", "typemap"})

    def __init__(self, data: dict[str, Any], data_labels: dict[str, Any]) -> None:
        self.data = data
        self.data_labels = data_labels

    def __getattr__(self, item: str) -> Any:
        if item in self.builtin:
            return super().__getattribute__(item)
        if self.data is not None and item in self.data:
            return self.data[item]
        if item in self.data_labels:
            return self.data_labels[item].default
        return super().__getattribute__(item)


@dataclass
class Pair:
    """The same call with and without the hook."""

    name: str
    with_hook: Callable[[], Any]
    without: Callable[[], Any]
    hooked_us: list[float] = field(default_factory=list)
    bare_us: list[float] = field(default_factory=list)

    def measure(self) -> None:
        self.bare_us.append(_us_a_call(self.without))
        self.hooked_us.append(_us_a_call(self.with_hook))

    @property
    def cost(self) -> float:
        """Microseconds: median over the blocks of hooked less bare."""
        return statistics.median(hooked - bare for hooked, bare in zip(self.hooked_us, self.bare_us, strict=True))


def _us_a_call(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - started) * 1e6 / CALLS


def diffusers_pairs() -> list[Pair]:
    hooked, bare = AutoencoderKL(), AutoencoderKL()
    handle = attach(hooked)
    handle.enabled = False
    latents, pixels = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    return [
        Pair("diffusers, vae.decode", lambda: hooked.decode(latents), lambda: bare.decode(latents)),
        Pair("diffusers, vae.encode", lambda: hooked.encode(pixels), lambda: bare.encode(pixels)),
    ]


def webui_pairs() -> list[Pair]:
    """The adapters of the web UIs, with the option set to off and never touched."""
    model, bare_model = StillModel(), StillModel()
    forge_vae, bare_forge_vae = HookedForgeVae(), StillForgeVae()
    class_vae, bare_class_vae = HookedClassVae(), AutoencoderKL()
    modules = _fake_host(model)
    original_batch, original_preview = modules.processing.decode_latent_batch, modules.sd_samplers_common.single_sample_to_image
    diffusers.AutoencoderKL = HookedClassVae
    for adapter in (A1111(), forge_kin.forge, SdNext()):
        adapter.install()
    batch, preview = modules.processing.decode_latent_batch, modules.sd_samplers_common.single_sample_to_image
    latents, pixels = torch.zeros(2, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    pairs = [
        Pair(
            "A1111, decode_first_stage",
            lambda: model.decode_first_stage(latents),
            lambda: bare_model.decode_first_stage(latents),
        ),
        Pair(
            "A1111, encode_first_stage", lambda: model.encode_first_stage(pixels), lambda: bare_model.encode_first_stage(pixels)
        ),
        Pair("A1111, decode_latent_batch", lambda: batch(model, latents), lambda: original_batch(model, latents)),
        Pair("any, single_sample_to_image", lambda: preview(latents), lambda: original_preview(latents)),
        Pair("Forge, vae.decode", lambda: forge_vae.decode(latents), lambda: bare_forge_vae.decode(latents)),
        Pair("Forge, vae.encode", lambda: forge_vae.encode(pixels), lambda: bare_forge_vae.encode(pixels)),
        Pair("SD.Next, vae.decode", lambda: class_vae.decode(latents), lambda: bare_class_vae.decode(latents)),
        Pair("SD.Next, vae.encode", lambda: class_vae.encode(pixels), lambda: bare_class_vae.encode(pixels)),
    ]
    hooked = (batch is not original_batch, preview is not original_preview, "decode_first_stage" in vars(model))
    if not all(hooked) or not all(hasattr(vae.decode, "__wrapped__") for vae in (HookedForgeVae, HookedClassVae)):
        raise AssertionError("an adapter did not get in the way of its stand-in")
    # Never asked for: the option's default is what a user who has not touched the panel runs with.
    set_off = Opts({"remotevae_enabled": False}, {})
    unset = Opts({}, {"remotevae_enabled": SimpleNamespace(default=False)})
    return [
        _under(modules.shared, opts, label, pair)
        for label, opts in (("set off", set_off), ("default", unset))
        for pair in pairs
    ]


def _under(shared: ModuleType, opts: Opts, label: str, pair: Pair) -> Pair:
    """``pair`` measured while the host has these ``opts``."""

    class Under(Pair):
        def measure(self) -> None:
            shared.opts = opts  # type: ignore[attr-defined]
            super().measure()

    return Under(f"{pair.name} ({label})", pair.with_hook, pair.without)


def _fake_host(model: StillModel) -> Any:
    """The host's modules that the adapters' ``install`` touches, where Python finds them."""
    package = ModuleType("modules")
    package.__path__ = []
    sys.modules["modules"] = package
    contents: dict[str, dict[str, Any]] = {
        "shared": {"opts": Opts({}, {}), "state": SimpleNamespace(interrupted=False, skipped=False, interrupt=list, skip=list)},
        "errors": {"display": lambda *_args, **_kwargs: None},
        "paths": {"data_path": "."},
        "processing": {
            "decode_latent_batch": lambda _model, batch, *_args, **_kwargs: batch,
            "process_images_inner": lambda p: p,
        },
        "sd_samplers_common": {"single_sample_to_image": lambda sample, _approximation=None: sample},
        "processing_diffusers": {"process_diffusers": lambda p: p},
        "processing_vae": {"vae_decode": lambda latents: latents},
        "modeldata": {"model_data": SimpleNamespace(sd_model=model, sd_refiner=None)},
        "sd_models": {"model_data": SimpleNamespace(sd_model=model, loaded_sd_models=[model])},
    }
    for name, attributes in contents.items():
        module = ModuleType(f"modules.{name}")
        vars(module).update(attributes)
        sys.modules[module.__name__] = module
        setattr(package, name, module)
    backend = ModuleType("backend.patcher.vae")
    backend.VAE = HookedForgeVae  # type: ignore[attr-defined]
    sys.modules[backend.__name__] = backend
    return package


def main() -> None:
    pairs = diffusers_pairs() + webui_pairs()
    for pair in pairs:
        pair.measure()
        pair.hooked_us.clear()
        pair.bare_us.clear()
    for _ in range(BLOCKS):
        for pair in pairs:
            pair.measure()
    print(f"{'switched off, microseconds a call':<46} {'bare':>7} {'hooked':>7} {'cost':>7}")
    for pair in pairs:
        bare, hooked = statistics.median(pair.bare_us), statistics.median(pair.hooked_us)
        print(f"{pair.name:<46} {bare:>7.2f} {hooked:>7.2f} {pair.cost:>7.2f}")
    worst = max(pairs, key=lambda pair: pair.cost)
    verdict = "PASS" if worst.cost < BAR_US else "MISS"
    print(f"\n{BLOCKS} blocks of {CALLS} calls each way, medians.")
    print(f"{verdict}: at most {worst.cost:.2f} microseconds a call ({worst.name}); the bar is {BAR_US:g}.")


if __name__ == "__main__":
    main()
