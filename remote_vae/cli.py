"""The command line: remote-vae serve | decode | encode | check | demo."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from remote_vae.errors import RemoteVaeError
from remote_vae.settings import Option, Settings, load_options
from remote_vae.version import __version__

# Of the panel's options, those that make no sense in a command that does one call and ends.
_PANEL_ONLY = frozenset(
    {"enabled", "decode", "encode", "when_vae_differs", "cooldown", "rescue_folder", "share", "name_endpoint"}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    try:
        result: int = options.run(options)
    except RemoteVaeError as error:
        print(f"remote-vae: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f'remote-vae: {error}. Install what the command needs: pip install "sd-webui-remote-vae[server]"', file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remote-vae", description="VAE encode and decode on another machine.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every call")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a VAE to other machines"))
    _add_decode(commands.add_parser("decode", help="make pictures of a file of latents"))
    _add_encode(commands.add_parser("encode", help="make a file of latents of a picture"))
    _add_check(commands.add_parser("check", help="say whether an endpoint works"))
    demo = commands.add_parser("demo", help="show it all on one photo")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and report (demo)")
    demo.set_defaults(run=_run_demo)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from remote_vae.vae.families import load_families

    parser.add_argument("--vae", required=True, help="diffusers folder, .safetensors file or Hugging Face id")
    parser.add_argument("--family", help=f"needed for a .safetensors file: {', '.join(load_families())}")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (auto: float16 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=7870, help="7870; 0 for any free one")
    parser.add_argument("--max-pixels", type=int, default=4096 * 4096, help="largest picture, width x height")
    parser.set_defaults(run=_run_serve)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="latents that Remote VAE saved (.safetensors)")
    parser.add_argument("--out", type=Path, help="picture to write; a batch gets -0, -1 ... (FILE.png)")
    parser.add_argument("--vae", help="decode on this machine with this VAE instead of an endpoint")
    _add_options(parser)
    parser.set_defaults(run=_run_decode)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a picture")
    parser.add_argument("--out", type=Path, help="file to write (FILE.safetensors)")
    parser.add_argument("--family", required=True, help="whose VAE the endpoint has: sd1, sdxl, flux ...")
    _add_options(parser)
    parser.set_defaults(run=_run_encode)


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_options(parser)
    parser.add_argument("--family", default="sd1", help="whose VAE the endpoint has, where it does not say itself (sd1)")
    parser.set_defaults(run=_run_check)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """The options of options.toml, each as a flag."""
    group = parser.add_argument_group("options (those of the settings panel)")
    for option in load_options().values():
        if option.key not in _PANEL_ONLY:
            _add_option(group, option)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    flag = "--" + option.key.replace("_", "-")
    text = f"{option.label}. {option.help}".replace("%", "%%")
    if isinstance(option.default, bool):
        group.add_argument(flag, dest=option.key, action="store_const", const=True, help=text)
    else:
        unit = option.unit or ("URL" if option.key.endswith("endpoint") else "TEXT")
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else unit.upper()
        group.add_argument(flag, dest=option.key, metavar=metavar, help=text)


def _settings(options: argparse.Namespace) -> Settings:
    given = {key: getattr(options, key, None) for key in load_options() if key not in _PANEL_ONLY}
    return Settings.from_mapping({key: value for key, value in given.items() if value is not None})


def _run_serve(options: argparse.Namespace) -> int:
    from remote_vae.server.engine import Limits
    from remote_vae.server.run import serve

    serve(
        options.vae,
        family=options.family,
        dtype=options.dtype,
        device=options.device,
        host=options.host,
        port=options.port,
        limits=Limits(max_pixels=options.max_pixels),
    )
    return 0


def _run_decode(options: argparse.Namespace) -> int:
    from remote_vae.commands import decode_file

    for path in decode_file(options.file, options.out, _settings(options), vae=options.vae):
        print(path)
    return 0


def _run_encode(options: argparse.Namespace) -> int:
    from remote_vae.commands import encode_file

    print(encode_file(options.file, options.out, options.family, _settings(options)))
    return 0


def _run_check(options: argparse.Namespace) -> int:
    from remote_vae.commands import check

    lines, good = check(_settings(options), options.family)
    print("\n".join(lines))
    return 0 if good else 1


def _run_demo(options: argparse.Namespace) -> int:
    from remote_vae.demo import run_demo

    return run_demo(options.out)
