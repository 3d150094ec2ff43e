"""What the commands decode, encode and check do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from remote_vae import rescue
from remote_vae.call import Answer, Outcome, VaeCall
from remote_vae.errors import InvalidRequest, RemoteVaeError, RouteFailed, SettingsError
from remote_vae.remote.route import RemoteRoute, endpoint_for
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family, find_family
from remote_vae.wire import DecodeAnswer, EncodeAnswer
from remote_vae.wire.pixels import image_to_pixels, to_uint8


def decode_file(file: Path, out: Path | None, settings: Settings, *, vae: str | None = None) -> list[Path]:
    """Make PNG pictures of the latents in ``file``, remotely or, with ``vae``, on this machine.

    Returns:
        The files written: ``out``, or one for each picture of a batch.

    Raises:
        RemoteVaeError: the file is not one of ours, or nothing could decode it.
    """
    rescued = rescue.load_latents(file)
    pixels = _decode_here(rescued, vae, settings) if vae else _decode_there(rescued.latents, rescued.family, settings)
    target = out or file.with_suffix(".png")
    pictures = [Image.fromarray(levels) for levels in to_uint8(pixels).cpu().numpy()]
    if len(pictures) == 1:
        paths = [target]
    else:
        paths = [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def encode_file(file: Path, out: Path | None, family: str, settings: Settings) -> Path:
    """Encode the picture ``file`` at the endpoint of ``settings`` and save the raw latents (the posterior's mean).

    Raises:
        RemoteVaeError: not a picture, or the endpoint did not answer.
    """
    target = find_family(family)
    try:
        pixels = image_to_pixels(Image.open(file))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read as a picture: {error}") from None

    def adopt(answer: Answer) -> torch.Tensor:
        if not isinstance(answer, EncodeAnswer):
            raise TypeError("not an answer to an encode")
        return answer.latents.chunk(2, dim=1)[0] if answer.is_posterior else answer.latents

    latents = _ask("encode", pixels, target, settings, adopt).value
    folder = (out or file).resolve().parent
    path = rescue.save_latents(latents, target, folder, f"encoded from {file.name}")
    wanted = out or file.with_suffix(".safetensors")
    return path.replace(wanted)


def check(settings: Settings, family: str) -> tuple[list[str], bool]:
    """Ask the endpoint of ``settings`` for one small decode and encode.

    Returns:
        Lines for the user, and whether both worked.
    """
    target = find_family(family)
    lines, good = [], True
    latents = torch.zeros(1, target.latent_channels, 32, 32, dtype=torch.float16)
    size = 32 * target.downscale
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    pixels = torch.stack([x, y, x * y]).unsqueeze(0)
    calls: list[tuple[Op, torch.Tensor]] = [("decode", latents), ("encode", pixels)]
    for op, tensor in calls:
        url, _ = endpoint_for(op, target, settings)
        if not url:
            lines.append(f"{op}: no endpoint is set; use --endpoint http://HOST:7870")
            good = False
            continue
        started = time.perf_counter()
        try:
            outcome = _ask(op, tensor, target, settings, lambda answer: answer)
        except RouteFailed as error:
            lines.append(f"{op}: failed: {error}")
            good = False
            continue
        ms = (time.perf_counter() - started) * 1000
        lines.append(f"{op}: works, {ms:.0f} ms for {size} x {size}, {outcome.bytes_up} bytes up, {outcome.bytes_down} down")
    return lines, good


def _ask(op: Op, tensor: torch.Tensor, family: Family, settings: Settings, adopt: Any) -> Outcome[Any]:
    return RemoteRoute().run(VaeCall(op, tensor, VaeAtWork(None, family), adopt), settings)


def _pixels(answer: Answer) -> torch.Tensor:
    if not isinstance(answer, DecodeAnswer):
        raise TypeError("not an answer to a decode")
    return answer.pixels("cpu", torch.float32)


def _decode_there(latents: torch.Tensor, family: Family, settings: Settings) -> torch.Tensor:
    if not endpoint_for("decode", family, settings)[0]:
        raise SettingsError("nothing to decode with: name an --endpoint, or a VAE of this machine with --vae")
    pixels: torch.Tensor = _ask("decode", latents, family, settings, _pixels).value
    return pixels


def _decode_here(rescued: rescue.Rescued, source: str, settings: Settings) -> torch.Tensor:
    from remote_vae.local import answer
    from remote_vae.local.own import own_tiling
    from remote_vae.server.models import load_vae

    loaded = load_vae(source, family=rescued.family.key if rescued.family.is_known else None)
    if loaded.family.latent_channels != rescued.latents.shape[1]:
        raise RemoteVaeError(
            f"{source} takes {loaded.family.latent_channels} channels, the file has {rescued.latents.shape[1]}"
        )
    latents = rescued.latents.to(loaded.device, loaded.dtype)
    vae = VaeAtWork(loaded.vae, loaded.family, loaded.device, loaded.dtype)

    def by_its_own_tiling() -> torch.Tensor:
        with own_tiling(loaded.vae):
            return vae.whole(loaded.vae, "decode", latents)

    # What is here has failed to decode before, most likely for lack of memory: not the whole VAE.
    call = VaeCall("decode", latents, vae, _pixels, own_tiling=by_its_own_tiling)
    with torch.inference_mode():
        return answer(call, settings).value
