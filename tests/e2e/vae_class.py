"""Drives the VAE class of a host by itself, without its UI: small random VAEs, and a server that has loaded the same files.

Run with the host's own Python, in its folder, with this checkout on PYTHONPATH; --server is a Python that can serve:

    PYTHONPATH=~/remote-vae venv/bin/python -m tests.e2e.vae_class --server ~/remote-vae/.venv/bin/python

A line is a VAE, a call of it and how the endpoint does: the largest difference to the host's own call, in levels of 255 for a
decode and by value for an encode, and who answered. Ends with status 1 where that is more than a level, or another answered.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from remote_vae.call import VaeCall
from remote_vae.hosts import comfy_shaped
from remote_vae.hosts.comfy_shaped import Seam
from remote_vae.hosts.wrapping import wrap
from remote_vae.router import Router
from remote_vae.settings import Settings

PORT = 7991
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    """A VAE of a host: how it is made, what it is served as, and the latents and pixels that are given to it."""

    name: str
    family: str
    vae: Any
    latents: tuple[int, ...]
    pixels: tuple[int, ...]


# --- the hosts ---------------------------------------------------------------------------------------------------------


def neo() -> Iterator[Case]:
    from backend.nn.vae import AutoencoderKLFlux2, IntegratedAutoencoderKL
    from backend.nn.wan_vae import WanVAE
    from backend.nn.wan_vae_2d import Qwen2DVAE
    from backend.patcher.vae import VAE
    from modules_forge.packages.huggingface_guess import latent

    small = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}
    no_quant = {"use_quant_conv": False, "use_post_quant_conv": False}

    def made(module: Any, latent_format: Any, **how: bool) -> Any:
        module.latent_format = latent_format
        return VAE(model=stirred(module), device=torch.device("cpu"), dtype=torch.float32, **how)

    yield Case("SD 1", "sd1", made(IntegratedAutoencoderKL(**small), latent.SD15()), (2, 4, 6, 8), (1, 48, 64, 3))
    flux = IntegratedAutoencoderKL(**small, **no_quant, latent_channels=16)
    yield Case("Flux", "flux", made(flux, latent.Flux()), (2, 16, 6, 8), (1, 48, 64, 3))
    flux2 = AutoencoderKLFlux2(**small, latent_channels=32)
    yield Case("Flux.2", "flux2", made(flux2, latent.Flux2(), is_flux2=True), (2, 128, 3, 4), (1, 48, 64, 3))
    mugen = AutoencoderKLFlux2(**small, latent_channels=32, mugen=True)
    yield Case("Flux.2, Mugen", "flux2", made(mugen, latent.SDXL_Flux2(), is_mugen=True), (2, 32, 6, 8), (1, 48, 64, 3))
    wan = WanVAE(base_dim=8, z_dim=16, num_res_blocks=1, temporal_downsample=[False, True, True])
    yield Case("Qwen-Image, a picture", "qwen-image", made(wan, latent.Wan21(), is_wan=True), (1, 16, 1, 6, 8), (1, 48, 64, 3))
    yield Case("Wan, nine frames", "qwen-image", made(wan, latent.Wan21(), is_wan=True), (1, 16, 3, 6, 8), (9, 48, 64, 3))
    flat = Qwen2DVAE(base_dim=8, num_res_blocks=1)
    yield Case("Qwen-Image, made flat", "", made(flat, latent.Wan21(), is_wan=True), (1, 16, 1, 6, 8), (1, 48, 64, 3))


def ersatz() -> Iterator[Case]:
    from backend.args import dynamic_args
    from backend.nn.vae import AutoencoderKLFlux2, IntegratedAutoencoderKL
    from backend.nn.vae_wan import AutoencoderKLWan
    from backend.patcher.vae import VAE

    # As the UI sets it before it loads a model.
    dynamic_args["online_lora"] = False
    small = {"block_out_channels": [32, 32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 1}

    def made(module: Any) -> Any:
        return VAE(model=stirred(module), device=torch.device("cpu"), dtype=torch.float32)

    yield Case("SD 1", "sd1", made(IntegratedAutoencoderKL(**small)), (2, 4, 6, 8), (1, 48, 64, 3))
    flux2 = AutoencoderKLFlux2(**small, block_out_channels_decoder=[32, 32, 64, 64])
    yield Case("Flux.2", "flux2", made(flux2), (2, 32, 6, 8), (1, 48, 64, 3))
    wan = AutoencoderKLWan(dim=8, z_dim=16, num_res_blocks=1)
    # Its numbers for the latents come with the class, and its config with the model.
    wan.register_to_config(latent_channels=16, scale_factor_spatial=8)
    yield Case("Qwen-Image", "qwen-image", made(wan), (2, 16, 6, 8), (1, 48, 64, 3))


def comfyui() -> Iterator[Case]:
    import comfy.ldm.wan.vae
    import comfy.sd

    yield Case("SD 1", "sd1", _comfy_kl(comfy.sd.VAE, 4), (2, 4, 6, 8), (1, 50, 67, 3))
    flux2 = _comfy_kl(comfy.sd.VAE, 32, batch_norm_latent=True)
    flux2.latent_channels, flux2.downscale_ratio, flux2.upscale_ratio = 128, 16, 16
    yield Case("Flux.2", "flux2", flux2, (2, 128, 3, 4), (1, 48, 64, 3))
    wan = comfy.ldm.wan.vae.WanVAE(**_COMFY_WAN)
    vae = comfy.sd.VAE(sd=stirred(wan).state_dict(), dtype=torch.float32)
    yield Case("Qwen-Image, a picture", "qwen-image", vae, (1, 16, 1, 4, 6), (1, 32, 48, 3))
    yield Case("Wan, five frames", "qwen-image", vae, (1, 16, 2, 4, 6), (5, 32, 48, 3))


def reforge() -> Iterator[Case]:
    # The UI's options are all that the class wants of it.
    shared = ModuleType("modules.shared")
    vars(shared)["opts"] = SimpleNamespace(reflective_padding_vae_sd="Disabled")
    sys.modules.update({"modules": ModuleType("modules"), "modules.shared": shared})
    vars(sys.modules["modules"])["shared"] = shared
    from ldm_patched.modules import args_parser

    args_parser.args.always_cpu = True
    from ldm_patched.modules.sd import VAE

    yield Case("SD 1", "sd1", _comfy_kl(VAE, 4), (2, 4, 6, 8), (1, 50, 67, 3))
    yield Case("Flux", "flux", _comfy_kl(VAE, 16), (2, 16, 6, 8), (1, 48, 64, 3))


_COMFY_WAN = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def _comfy_kl(kind: Any, channels: int, **more: Any) -> Any:
    small = {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2, 2]}
    rest = {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "z_channels": channels}
    # Its own configurations are fixed in size, but for this way of making it.
    params = {"ddconfig": {**small, **rest, **more}, "embed_dim": channels}
    vae = kind(sd={}, config={"params": params}, dtype=torch.float32)
    stirred(vae.first_stage_model)
    vae.latent_channels = channels
    return vae


# By a file that only this one has of those that are still to come.
HOSTS: dict[str, tuple[Seam, Callable[[], Iterator[Case]]]] = {
    "backend/nn/_vae.py": (comfy_shaped.NEO, neo),
    "backend/nn/vae_wan.py": (comfy_shaped.ERSATZ, ersatz),
    "ldm_patched/modules/sd.py": (comfy_shaped.REFORGE, reforge),
    "comfy/sd.py": (comfy_shaped.COMFYUI, comfyui),
}
# How each is told to use the processor, and where it has its packages.
ARGUMENTS = {"backend/nn/vae_wan.py": ["--always-cpu"], "ldm_patched/modules/sd.py": []}
PACKAGES = ("modules_forge/packages", "packages")


def stirred(module: torch.nn.Module) -> Any:
    """Random weights, those of norms and the numbers of a batch norm as well."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
            around = 1.0 if tensor.ndim <= 1 or name.endswith("gamma") else 0.0
            tensor.copy_(around + torch.randn(tensor.shape) * (0.1 if around else fan**-0.5))
            if name.endswith("running_var"):
                tensor.abs_()
    return module.eval().requires_grad_(False)


# --- driving -----------------------------------------------------------------------------------------------------------


class Door:
    """The class seam with a router behind it, as an adapter has it."""

    def __init__(self, seam: Seam) -> None:
        self._seam, self._router, self._inside = seam, Router(), False
        self.settings: Settings | None = None

    def around(self, method: str, original: Callable[..., Any], vae: Any, *args: Any, **kwargs: Any) -> Any:
        if self.settings is None or self._inside:
            return original(vae, *args, **kwargs)
        call: VaeCall[Any] | None = comfy_shaped.vae_call(self._seam, method, original, vae, args, kwargs)
        if call is None:
            raise AssertionError(f"{method} of {[list(arg.shape) for arg in args]} is the host's own")
        self._inside = True
        try:
            return self._router.run(call, self.settings)
        finally:
            self._inside = False

    @property
    def answered(self) -> str:
        last = self._router.history.records()[-1]
        return f"{last.route} {last.detail}".strip() + (f" ({last.fallback_reason[:40]})" if last.fallback_reason else "")


@contextmanager
def serving(python: str, checkout: str, file: Path, family: str) -> Iterator[str]:
    """A server with the weights of ``file``, in another process."""
    command = [python, "-m", "remote_vae", "serve", "--vae", str(file), "--family", family, "--port", str(PORT)]
    log = file.with_suffix(".log")
    with log.open("w") as stream, subprocess.Popen(command, cwd=checkout, stdout=stream, stderr=stream) as server:
        try:
            for _ in range(240):
                if server.poll() is not None:
                    raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/info", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{PORT}"
        finally:
            server.terminate()


@dataclass(frozen=True)
class Way:
    """How a call is answered: by what settings, and who should."""

    name: str
    settings: Settings | None
    answers: str = ""


def ways(endpoint: str) -> list[Way]:
    on = Settings(enabled=True, endpoint=endpoint)
    return [
        Way("off", None),
        *(Way(f"remote {transfer}", replace(on, transfer=transfer), f"remote {transfer}") for transfer in ("raw", "u8")),
        Way("refused", replace(on, endpoint="http://127.0.0.1:9"), "local (connection refused"),
        Way(OUT_OF_MEMORY, replace(on, endpoint=""), ""),
    ]


def lines_of(case: Case, door: Door, endpoint: str) -> Iterator[tuple[str, bool]]:
    """What is printed of each call of a VAE, and whether it is as it should be."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(case.latents, generator=generator)
    # The levels of a picture, as every picture has them.
    pixels = torch.randint(256, case.pixels, generator=generator) / 255.0
    for method, tensor in {"decode": latents, "encode": pixels}.items():
        local = called(case.vae, method, tensor, door, None)
        for way in ways(endpoint):
            if way.answers.startswith("remote") and not case.family:
                continue
            with out_of_memory(case.vae.first_stage_model, method) if way.name == OUT_OF_MEMORY else nullcontext():
                got = called(case.vae, method, tensor, door, way.settings)
            answered = door.answered if way.settings else ""
            apart = difference(got, local, levels=method == "decode")
            exact = way.name in ("off", "refused")
            good = apart <= (0 if exact else 1 if method == "decode" else 1e-2) and answered.startswith(way.answers)
            good = good and "own tiling" not in answered
            row = f"{case.name}, {method} {list(tensor.shape)}"
            yield f"{row:46}{way.name:14}{apart:<10.2g}{answered}{'' if good else '   WRONG'}", good


def called(vae: Any, method: str, tensor: torch.Tensor, door: Door, settings: Settings | None) -> torch.Tensor:
    door.settings = settings
    # What is drawn is drawn from the processor's generator.
    torch.manual_seed(5)
    made: torch.Tensor = getattr(vae, method)(tensor.clone())
    return made


def difference(one: torch.Tensor, other: torch.Tensor, *, levels: bool) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        raise SystemExit(f"{list(one.shape)} {one.dtype} and not {list(other.shape)} {other.dtype}")
    first, second = ((255.0 * each).to(torch.uint8).float() if levels else each for each in (one, other))
    return (first - second).abs().max().item()


@contextmanager
def out_of_memory(module: Any, method: str) -> Iterator[None]:
    """The module's own call has no memory; its layers do."""

    def call(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    vars(module)[method] = call
    try:
        yield
    finally:
        del vars(module)[method]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="a Python that can serve")
    parser.add_argument("--checkout", default=os.environ.get("PYTHONPATH", "."), help="what it serves with")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of the names of VAEs")
    options = parser.parse_args(arguments)
    own = next(own for own in HOSTS if Path(own).is_file())
    seam, cases = HOSTS[own]
    # The host reads the command line, too.
    sys.argv[1:] = ARGUMENTS.get(own, ["--cpu"])
    sys.path[:0] = [os.getcwd(), *(str(Path(folder).resolve()) for folder in PACKAGES)]
    door = Door(seam)
    good = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for case in cases():
            # Once: what the host wants before its VAE is imported has been done by now.
            for owner, name, around in comfy_shaped.class_hooks(seam, door.around):
                wrap(owner, name, around, door)
            if options.only and not case.name.startswith(tuple(options.only)):
                continue
            file = Path(folder) / f"{case.name.replace(' ', '_')}.safetensors"
            good.append(drive(case, door, file, options))
    return 0 if all(good) else 1


def drive(case: Case, door: Door, file: Path, options: argparse.Namespace) -> bool:
    """Whether all is as it should be."""
    state = case.vae.first_stage_model.state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
    served = serving(options.server, options.checkout, file, case.family) if case.family else nullcontext("http://127.0.0.1:9")
    with served as endpoint:
        lines = []
        for line, good in lines_of(case, door, endpoint):
            print(line, flush=True)
            lines.append(good)
    return all(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
