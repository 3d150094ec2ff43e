"""The command line: remote-vae serve | decode | encode | check | bench | plan | demo."""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from remote_vae import rescue
from remote_vae.call import NOBODY, Answer, User, VaeCall
from remote_vae.errors import RemoteVaeError, SettingsError
from remote_vae.history import Record
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.router import Router
from remote_vae.server.config import add_flags, config_of
from remote_vae.server.logs import set_format
from remote_vae.settings import Settings
from remote_vae.tools import bench, check, plan
from remote_vae.tools.asking import family_of
from remote_vae.tools.flags import add_options, settings_of
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op, VaeAtWork
from remote_vae.vae.families import Family
from remote_vae.vae.packed import batch_norm_of
from remote_vae.version import __version__
from remote_vae.wire import DecodeAnswer, EncodeAnswer
from remote_vae.wire.pixels import image_to_pixels, open_picture, to_uint8, write_mp4

log = logging.getLogger("remote_vae")

_MP4 = ".mp4"
# What "serve" and "decode --vae" need: one of them missing, the others are hardly there.
_SERVER = ("accelerate", "diffusers", "fastapi", "uvicorn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit status. What goes wrong is one line."""
    options = _parser().parse_args(arguments)
    _show_log(verbose=options.verbose)
    try:
        result: int = options.run(options)
        return result
    except KeyboardInterrupt:
        return 130
    except RemoteVaeError as error:
        message = str(error)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        packages = {**dict.fromkeys((*_SERVER, "starlette"), " ".join(_SERVER)), "skimage": "scikit-image"}.get(
            missing, missing
        )
        message = f"{error}; install what the command needs: {sys.executable} -m pip install {packages}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else f"{type(error).__name__}: {error}"
        log.info("", exc_info=True)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        # Where it was, for those who have asked for more.
        log.info("", exc_info=True)
    print(f"remote-vae: {' '.join(message.split())}", file=sys.stderr)
    return 1


class _Lines(logging.Formatter):
    """The text alone: where an error comes from is for those who have asked for more."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__("%(message)s")
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if self._verbose else record.getMessage()


def _show_log(*, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(verbose=verbose))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.INFO if verbose else logging.WARNING)


# --- arguments -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remote-vae", description="VAE encode and decode on another machine.")
    parser.add_argument("--version", action="version", version=__version__)
    _add_verbose(parser, default=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a VAE to other machines"))
    _add_decode(commands.add_parser("decode", help="make pictures of a file of latents"))
    _add_encode(commands.add_parser("encode", help="make a file of latents of a picture"))
    check.add_arguments(commands.add_parser("check", help="say whether an endpoint works"))
    bench.add_arguments(commands.add_parser("bench", help="measure how fast an endpoint is"))
    plan.add_arguments(commands.add_parser("plan", help="say how many cards so many UIs need"))
    report = commands.add_parser("diagnosis", help="print what a report of a problem should have in it")
    report.set_defaults(run=_diagnosis)
    demo = commands.add_parser("demo", help="show it all on one photo")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and report (demo)")
    demo.set_defaults(run=_demo)
    for command in commands.choices.values():
        # One that is not given must not undo one before the command.
        _add_verbose(command, default=argparse.SUPPRESS)
    return parser


def _add_verbose(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", default=default, help="a line for every call")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.set_defaults(run=_serve)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="latents that Remote VAE saved (.safetensors)")
    parser.add_argument(
        "--out",
        type=Path,
        help="picture to write; of several or of frames -0, -1 ...; .mp4: a video (FILE.png, or another if that is there)",
    )
    parser.add_argument("--vae", help="decode on this machine with this VAE instead of an endpoint")
    add_options(parser)
    parser.set_defaults(run=_decode)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a picture")
    parser.add_argument("--out", type=Path, help="file to write (FILE.safetensors, or another if that is there)")
    parser.add_argument("--family", help="whose VAE the endpoint has, where it does not say so itself: sd1, sdxl, flux ...")
    add_options(parser)
    parser.set_defaults(run=_encode)


# --- serve, demo ---------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    config = config_of(vars(options))
    set_format(config.log_format, verbose=options.verbose)
    from remote_vae.server.run import serve

    # Of those, also without -v.
    logging.getLogger("remote_vae.calls").setLevel(logging.INFO)
    serve(config)
    return 0


def _diagnosis(options: argparse.Namespace) -> int:
    from remote_vae.diagnosis import diagnosis

    del options
    print(diagnosis(), end="")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from remote_vae.demo import run_demo

    return run_demo(options.out)


# --- decode, encode ------------------------------------------------------------------------------------------------------


def _decode(options: argparse.Namespace) -> int:
    """Make pictures of the latents in a file, remotely or, with ``--vae``, on this machine, and print where they are."""
    if options.out:
        _check_picture_name(options.out)
    settings, rescued = settings_of(options), rescue.load_latents(options.file)
    if options.vae:
        pixels = _decode_here(rescued, options.vae, settings)
    elif endpoint_for("decode", rescued.family, settings)[0]:
        pixels = _ask("decode", rescued.latents, rescued.family, settings, _pixels)
    else:
        raise SettingsError("nothing to decode with: name an --endpoint, or a VAE of this machine with --vae")
    frames = pixels.movedim(2, 1).flatten(0, 1) if pixels.ndim == VIDEO_DIMENSIONS else pixels
    target: Path = options.out or options.file.with_suffix(".png")
    if target.suffix.lower() == _MP4:
        print(_written(target, lambda part: _write_mp4(frames, part), named=True))
        return 0
    pictures = [Image.fromarray(to_uint8(frame[None])[0].cpu().numpy()) for frame in frames]
    for number, picture in enumerate(pictures):
        path = target if len(pictures) == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        print(_written(path, picture.save, named=options.out is not None))
    return 0


def _encode(options: argparse.Namespace) -> int:
    """Encode a picture at an endpoint, save the raw latents (the posterior's mean) and print where they are."""
    if options.out:
        _check_name(options.out, options.out.suffix == ".safetensors", "name a .safetensors file")
    settings = settings_of(options)
    # Before anybody is asked.
    picture = open_picture(options.file, alpha=True)
    family = family_of("encode", options.family, settings)
    pixels = _for(family, image_to_pixels(picture, family.pixel_channels))
    latents = _ask("encode", pixels, family, settings, _mean)
    path = options.out or options.file.with_suffix(".safetensors")
    why = f"encoded from {options.file.name}"
    print(_written(path, lambda part: rescue.write(latents, family, part, why), named=options.out is not None))
    return 0


def _ask(
    op: Op, tensor: torch.Tensor, family: Family, settings: Settings, adopt: Callable[[Answer], Any], user: User = NOBODY
) -> Any:
    """What the endpoint of ``settings`` answers. Raises RouteFailed."""
    return Router().run_remote(VaeCall(op, tensor, VaeAtWork(None, family), adopt, user=user), settings)


def _write_mp4(frames: torch.Tensor, path: Path) -> None:
    with path.open("wb") as file:
        write_mp4((to_uint8(frame[None, :3])[0].cpu() for frame in frames), file)


def _for(family: Family, tensor: torch.Tensor) -> torch.Tensor:
    """A picture or its latents with the frame axis that a video VAE wants."""
    return tensor.unsqueeze(2) if family.video else tensor


def _pixels(answer: Answer) -> torch.Tensor:
    if not isinstance(answer, DecodeAnswer):
        raise TypeError("not an answer to a decode")
    return answer.pixels("cpu", torch.float32)


def _mean(answer: Answer) -> torch.Tensor:
    if not isinstance(answer, EncodeAnswer):
        raise TypeError("not an answer to an encode")
    return answer.latents.chunk(2, dim=1)[0] if answer.is_posterior else answer.latents


def _decode_here(rescued: rescue.Rescued, source: str, settings: Settings) -> torch.Tensor:
    from remote_vae import local
    from remote_vae.local.own import own_tiling
    from remote_vae.server.models import load_vae

    loaded = load_vae(source, family=rescued.family.known_key)
    latents, norm = rescued.latents.to(loaded.device, loaded.dtype), batch_norm_of(loaded.vae)
    if norm is not None and latents.shape[1] == norm.channels:
        # Of Load Remote VAE in ComfyUI, which has no numbers to undo Flux.2's norm by.
        latents = norm.raw(latents)
    if loaded.family.latent_channels != latents.shape[1] or loaded.family.video != rescued.family.video:
        raise RemoteVaeError(
            f"got latents of shape {list(rescued.latents.shape)}, and {source} takes {loaded.family.latent_channels} channels"
        )
    vae = VaeAtWork(loaded.vae, loaded.family, loaded.device, loaded.dtype)

    def by_its_own_tiling() -> torch.Tensor:
        with own_tiling(loaded.vae):
            return vae.whole(loaded.vae, "decode", latents)

    # What is here has failed to decode before, most likely for lack of memory: not the whole VAE.
    call = VaeCall("decode", latents, vae, _pixels, own_tiling=by_its_own_tiling)
    started = time.perf_counter()
    with torch.inference_mode():
        outcome = local.answer(call, settings)
    batch, height, width = call.size
    ms = (time.perf_counter() - started) * 1000
    log.info(
        "%s", Record("decode", outcome.route, outcome.detail, "", batch, height, width, 0, 0, ms, outcome.because, time.time())
    )
    return outcome.value


def _check_picture_name(path: Path) -> None:
    Image.init()
    is_picture = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
    is_video = path.suffix.lower() == _MP4
    _check_name(path, is_picture or is_video, "name a picture file, such as picture.png, or an .mp4")
    if is_video:
        # Where it is missing that is said now, and not when the pictures have been made.
        importlib.import_module("av")


def _check_name(path: Path, is_good: bool, what: str) -> None:
    """Before anything is asked for. Raises SettingsError."""
    if not is_good:
        raise SettingsError(f"--out {path}: {what}")
    if not path.parent.is_dir():
        raise SettingsError(f"--out {path}: there is no folder {path.parent}")


def _written(path: Path, write: Callable[[Path], object], *, named: bool) -> Path:
    """``path``, or the next free name beside it where the user has not named it: what is there may be a checkpoint."""
    if not named:
        others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
        path = next(free for free in itertools.chain([path], others) if not free.exists())
    try:
        rescue.replace(path, write)
    except (OSError, ValueError) as error:  # ValueError: Pillow, of what a format does not take
        why = getattr(error, "strerror", None) or str(error)
        raise RemoteVaeError(f"{path} cannot be written: {why}; name another place with --out") from None
    return path
