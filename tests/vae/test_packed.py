from __future__ import annotations

import diffusers
import torch

from remote_vae.vae.packed import BatchNormed, batch_norm_of
from tests.versions import of_diffusers


def small_flux2() -> diffusers.AutoencoderKLFlux2:
    torch.manual_seed(3)
    vae = of_diffusers("AutoencoderKLFlux2")(
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3.0)
    return vae.eval()


def statistics(vae: diffusers.AutoencoderKLFlux2) -> BatchNormed:
    found = batch_norm_of(vae)
    assert found is not None
    return found


def test_packed_latents_become_raw_as_in_diffusers_to_the_bit() -> None:
    vae = small_flux2()
    packed = torch.randn(2, 128, 3, 5)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    expected = of_diffusers("Flux2Pipeline")._unpatchify_latents(packed * deviation + mean)
    assert torch.equal(statistics(vae).raw(packed), expected)
    assert torch.equal(
        statistics(vae).normed(expected), (of_diffusers("Flux2Pipeline")._patchify_latents(expected) - mean) / deviation
    )


def test_in_half_precision_too() -> None:
    vae = small_flux2()
    packed = torch.randn(1, 128, 2, 2).half()
    mean = vae.bn.running_mean.view(1, -1, 1, 1).half()
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).half()
    assert torch.equal(
        statistics(vae).raw(packed), of_diffusers("Flux2Pipeline")._unpatchify_latents(packed * deviation + mean)
    )


def test_a_vae_without_such_statistics_has_none() -> None:
    assert batch_norm_of(diffusers.AutoencoderKL()) is None
