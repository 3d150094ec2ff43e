"""Memory and time of a video that is decoded remotely: of the client, and of the server beside its VAE's own call.

A real server of a small Wan VAE with random weights, whose pixels are as many as those of a large one, and clients, each in a
process of its own. The server has a VAE's call in its peak; what the same call takes without a server is the last column's bar.

    python -m bench.video [--frames 81] [--size 480 832]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bench.load import ROOT, Server, peak_of

# Wan's layout of 16 pixels a cell with as few and as narrow blocks as it takes: a CPU does the clip in half a minute.
SMALL = {
    "base_dim": 8,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 0,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
FAMILY = "wan22-5b"
FRAMES = 81
SIZE = (480, 832)
WARM_FRAMES, WARM_SIZE = 5, (64, 64)
TRANSFERS = ("raw", "u8", "mp4", "u8 for a UI")


@dataclass(frozen=True)
class Clip:
    """How long and how large a video is, in pixel frames and pixels."""

    frames: int
    height: int
    width: int

    @property
    def latents(self) -> torch.Tensor:
        shape = (1, 48, (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @property
    def megabytes(self) -> float:
        """In 8 bits."""
        return 3e-6 * self.frames * self.height * self.width


@dataclass(frozen=True)
class Row:
    """One line of the table: MB above what there was before the call, and seconds."""

    transfer: str
    answer: float
    client: float
    server: float
    seconds: float


# --- each in a process of its own ----------------------------------------------------------------------------------------


def be_client(url: str, transfer: str, clip: Clip) -> None:
    """Say that it is ready, wait for a line, decode, and print the bytes of the result and the seconds."""
    ask(url, transfer, Clip(WARM_FRAMES, *WARM_SIZE))
    latents = clip.latents
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    result = ask(url, transfer, clip, latents)
    seconds = time.perf_counter() - started
    print(len(result) if isinstance(result, bytes) else result.nbytes, seconds, flush=True)
    sys.stdin.readline()


def ask(url: str, transfer: str, clip: Clip, latents: torch.Tensor | None = None) -> torch.Tensor | bytes:
    """The clip as the transfer brings it; for a UI as float32 pixels."""
    from remote_vae import Settings, remote_decode
    from remote_vae.call import VaeCall
    from remote_vae.router import Router
    from remote_vae.vae.at_work import VaeAtWork
    from remote_vae.vae.families import find_family

    latents = clip.latents if latents is None else latents
    made: torch.Tensor | bytes
    if transfer == "u8 for a UI":
        vae = VaeAtWork(None, find_family(FAMILY))
        call = VaeCall("decode", latents, vae, lambda answer: answer.pixels("cpu", torch.float32))  # type: ignore[union-attr]
        made = Router().run_remote(call, Settings(endpoint=url, transfer="u8"))
    elif transfer == "mp4":
        made = remote_decode(url, latents, do_scaling=False, output_type="mp4", return_type="mp4")
    else:
        levels = transfer == "u8"
        made = remote_decode(url, latents, do_scaling=False, output_type="pt", return_type="pt", partial_postprocess=levels)
    return made


def be_alone(folder: str, clip: Clip) -> None:
    """As a client, of the VAE's call alone."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder)
    with torch.inference_mode():
        vae.decode(Clip(WARM_FRAMES, *WARM_SIZE).latents)
        latents = clip.latents
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.perf_counter()
        pixels = vae.decode(latents, return_dict=False)[0]
    print(pixels.nbytes, time.perf_counter() - started, flush=True)
    sys.stdin.readline()


# --- the table -----------------------------------------------------------------------------------------------------------


class Child:
    """A process of this module's own, told when to begin."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "bench.video", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != ["ready"]:
            raise RuntimeError(f"{' '.join(arguments)} did not start")
        memory = psutil.Process(self._process.pid)
        self.megabytes = lambda: float(memory.memory_info().rss) / 1e6

    def run(self) -> tuple[float, float, float]:
        """MB of the result, MB at the peak above those at the start, and seconds."""
        before = self.megabytes()
        with peak_of(self.megabytes) as peak:
            self._go()
            size, seconds = map(float, self._line())
        self._go()
        self._process.wait()
        return size / 1e6, peak() - before, seconds

    def _go(self) -> None:
        if self._process.stdin:
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def _line(self) -> list[str]:
        return self._process.stdout.readline().split() if self._process.stdout else []


def rows(folder: str, clip: Clip) -> list[Row]:
    size = tuple(map(str, (clip.frames, clip.height, clip.width)))
    answer, peak, seconds = Child("--alone", folder, "--clip", *size).run()
    table = [Row("the VAE alone", answer, 0.0, peak, seconds)]
    for transfer in TRANSFERS:
        # Another for each, so that none has what the allocator kept of the one before.
        server = Server(Path(folder), "--dtype", "float32", "--device", "cpu")
        try:
            client = Child("--client", server.url, transfer, "--clip", *size)
            loaded = server.megabytes()
            with server.peak() as server_peak:
                answer, peak, seconds = client.run()
            table.append(Row(transfer, answer, peak, server_peak() - loaded, seconds))
        finally:
            server.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--clip", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        be_client(*options.client, Clip(*options.clip))
    elif options.alone:
        be_alone(options.alone, Clip(*options.clip))
    else:
        with tempfile.TemporaryDirectory() as folder:
            from diffusers import AutoencoderKLWan

            torch.manual_seed(7)
            AutoencoderKLWan(**SMALL).save_pretrained(folder)
            clip = Clip(options.frames, *options.size)
            print_table(rows(folder, clip), clip)


def print_table(table: list[Row], clip: Clip) -> None:
    print(f"{clip.frames} frames of {clip.width} x {clip.height}: {clip.megabytes:.0f} MB in 8 bits, "
          f"{4 * clip.megabytes:.0f} MB in float32; torch {torch.__version__}, CPU")  # fmt: skip
    print(f"{'transfer':<16} {'result, MB':>10} {'client peak, MB':>16} {'server peak, MB':>16} {'seconds':>8}")
    for row in table:
        client = f"{row.client:>16.0f}" if row.client else f"{'':>16}"
        print(f"{row.transfer:<16} {row.answer:>10.1f} {client} {row.server:>16.0f} {row.seconds:>8.1f}")
    print("\npeaks are above what the process had before the call: the client with its libraries, the server with its VAE.")


if __name__ == "__main__":
    main()
