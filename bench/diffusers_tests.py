"""diffusers' own tests of remote VAEs (its tests/remote), run against our server.

They are read from a checkout of diffusers and not kept here. Their endpoints are servers of small random VAEs, float32 on the
CPU; the slices of pixels that they expect are those that the same VAE gives when it is called directly; their photo is a
picture made here.

    python -m bench.diffusers_tests PATH_TO_DIFFUSERS [more arguments of pytest]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import constants
from PIL import Image

from bench.vaes import of_the_public_endpoints
from remote_vae.wire import DecodeRequest
from tests.conftest import ServerThread

# diffusers' name of each endpoint, less DECODE_ENDPOINT_ or ENCODE_ENDPOINT_.
VAES = dict(zip(("SD_V1", "SD_XL", "FLUX", "HUNYUAN_VIDEO"), of_the_public_endpoints().values(), strict=True))


class AgainstOurs:
    """A plugin of pytest: the endpoints are ours before the tests are imported, and so is what they expect."""

    def __init__(self) -> None:
        self.servers = {name: ServerThread(vae) for name, vae in VAES.items()}
        self.levels: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, server in self.servers.items():
            for op in ("decode", "encode"):
                if hasattr(constants, f"{op.upper()}_ENDPOINT_{name}"):
                    setattr(constants, f"{op.upper()}_ENDPOINT_{name}", f"{server.url}/{op}")

    def pytest_collection_modifyitems(self, items: Iterable[Any]) -> None:
        for kind in {item.cls for item in items if item.cls is not None}:
            if getattr(kind, "shape", None) is not None:
                self._expect(kind)
            elif hasattr(kind, "image"):
                kind.image = _photo()

    def _expect(self, kind: Any) -> None:
        """Put what the VAE itself gives in the place of what the public endpoint gave."""
        name = next(name for name, server in self.servers.items() if kind.endpoint.startswith(f"{server.url}/"))
        vae = VAES[name]
        generator = torch.Generator("cpu").manual_seed(13)
        latents = torch.randn(kind.shape, dtype=kind.dtype, generator=generator)
        raw = DecodeRequest(latents, height=kind.height, width=kind.width).unpacked(vae.family).float()
        with torch.inference_mode():
            pixels = vae.vae.decode(raw / kind.scaling_factor + (kind.shift_factor or 0.0), return_dict=False)[0]
        # A clip's first frame.
        picture = pixels if pixels.ndim == len("BCHW") else pixels[:, :, 0]
        made_there = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)[0].movedim(0, -1)
        # Their processor computes in the dtype of the answer: up to a level beside, in bfloat16.
        answer = picture.to(kind.dtype)
        made_here = torch.from_numpy(np.array(VaeImageProcessor().postprocess(answer, output_type="pil")[0]))
        kind.return_pt_slice = answer[0, 0, -3:, -3:].flatten()
        kind.partial_postprocess_return_pt_slice = made_there[-3:, -3:, 0].flatten()
        self.levels[kind] = made_there, made_here

    def pytest_runtest_setup(self, item: Any) -> None:
        """One of their slices is of levels that either side makes; each test gets those of the side that makes them for it."""
        if item.cls in self.levels:
            is_there = "partial_postprocess" in item.name or "image_format" in item.name
            item.cls.output_pt_slice = self.levels[item.cls][0 if is_there else 1][0, -3:, -3:].flatten()


def _photo() -> Image.Image:
    """512 x 512, as theirs."""
    y, x = np.mgrid[0:512, 0:512]
    waves = [127.5 + 127.5 * np.sin(x / (9.0 + 7 * index) + y / (13.0 + 5 * index)) for index in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    # Their package has the name of ours.
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    sys.exit(pytest.main(["-p", "no:cacheprovider", "tests/remote", *sys.argv[2:]], plugins=[AgainstOurs()]))
