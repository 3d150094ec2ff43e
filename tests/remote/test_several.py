"""A server that has several VAEs: the one that is loaded here is found, and asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from remote_vae.call import VaeCall
from remote_vae.errors import SettingsError
from remote_vae.remote.client import client_for
from remote_vae.remote.same_vae import of_several
from remote_vae.remote.trial import family_there, try_out
from remote_vae.router import Router
from remote_vae.server.models import LoadedVae
from remote_vae.server.own import OwnVaes, Source
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family
from remote_vae.wire import Info
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.vaes import loaded, small_kl

NARROW: dict[str, object] = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}


def other(vae: LoadedVae, seed: int) -> LoadedVae:
    """Of the same family with other weights."""
    made = small_kl(vae.family.key, **NARROW)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return loaded(made, vae.family.key)


SD1 = loaded(small_kl("sd1", **NARROW), "sd1")
SDXL = loaded(small_kl("sdxl", **NARROW), "sdxl")
FLUX = loaded(small_kl("flux", use_quant_conv=False, use_post_quant_conv=False, **NARROW), "flux")
VAES = {"sd1": SD1, "first": SDXL, "second": other(SDXL, 1), "late": other(SDXL, 2), "flux": FLUX}


class Studio:
    """A server of five VAEs, three of them of SDXL, behind a proxy that notes what is asked; "late" is not loaded."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        sources = [Source(name, name) for name in VAES]
        self.catalogue = OwnVaes(sources, load=self._load)
        for entry in self.catalogue.entries():
            if entry.name != "late":
                self.catalogue.load(entry, self.catalogue.devices[0]).result()
        self.server = ServerThread(SD1, catalogue=self.catalogue)
        self.chaos = Chaos(self.server.url)
        self.chaos.info = "pass"
        self.router = Router()

    def _load(self, source: str, **_: Any) -> LoadedVae:
        self.loads.append(source)
        return VAES[source]

    def run(self, vae: LoadedVae, path: str = "", **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a host with ``vae`` gets for latents, and what its VAE makes of them."""
        latents = torch.randn(1, vae.family.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            own = vae.vae.decode(latents, return_dict=False)[0]
        at_work = VaeAtWork(vae.vae, vae.family, has_posterior=True)
        call: VaeCall[torch.Tensor] = VaeCall(
            "decode",
            latents,
            at_work,
            adopt=lambda answer: answer.pixels("cpu", torch.float32),
            whole=lambda: own,  # type: ignore[union-attr]
        )
        return self.router.run(call, Settings(endpoint=self.chaos.url + path, transfer="raw", **settings)), own

    @property
    def last(self) -> Any:
        return self.router.history.last

    def close(self) -> None:
        self.chaos.close()
        self.server.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Studio]:
    made = Studio()
    yield made
    made.close()


@pytest.fixture
def studio(running: Studio) -> Studio:
    running.chaos.reset("pass")
    running.router = Router()
    return running


@pytest.mark.parametrize("name", ["sd1", "first", "second", "flux"])
def test_the_vae_that_is_loaded_here_is_the_one_that_is_asked_there(studio: Studio, name: str) -> None:
    vae = VAES[name]
    made, own = studio.run(vae)
    assert studio.last.route == "remote"
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)
    # By its fingerprint, without a test picture.
    assert len(studio.chaos.queries) == 1
    assert f"fingerprint={vae.fingerprint}" in studio.chaos.queries[0]
    assert f"family={vae.family.key}" in studio.chaos.queries[0]


def test_a_vae_of_the_family_that_is_not_there_is_another_vae(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    stranger = other(SDXL, 9)
    # While one was never loaded, the test picture has to tell, and loads it.
    studio.run(stranger)
    assert studio.last.route == "local"
    assert studio.loads[-1] == "late"
    studio.router = Router()
    with caplog.at_level(logging.WARNING):
        made, own = studio.run(stranger)
    assert studio.last.route == "local"
    assert studio.last.fallback_reason == "another VAE there"
    assert made is own
    assert f"has another VAE (sdxl, fingerprint {SDXL.fingerprint}) than yours" in caplog.text


def test_whoever_wants_it_all_the_same_gets_the_family(studio: Studio) -> None:
    made, own = studio.run(other(SDXL, 9), when_vae_differs="remote")
    assert studio.last.route == "remote"
    assert studio.last.detail == "raw, another VAE"
    assert not torch.allclose(made, own, atol=1e-2)


def test_one_that_is_loaded_by_the_first_call_is_the_same_then(studio: Studio) -> None:
    made, own = studio.run(VAES["late"])
    assert studio.last.route == "remote", studio.last.fallback_reason
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)
    assert studio.loads.count("late") == 1


@pytest.mark.parametrize("path", ["/second", "/second/", "/second/decode"])
def test_a_name_behind_the_address_means_that_one(studio: Studio, path: str) -> None:
    vae = VAES["second"]
    made, own = studio.run(vae, path)
    assert studio.last.route == "remote"
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)
    assert studio.chaos.requests == ["/second/decode"]
    studio.run(VAES["first"], path)
    assert (studio.last.route, studio.last.fallback_reason) == ("local", "another VAE there")


def test_a_name_that_is_none_is_a_fallback_that_says_so(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    studio.run(VAES["first"], "/third")
    assert studio.last.route == "local"
    assert "this server has no VAE called third; it has sd1, first" in caplog.text


def test_the_test_button_finds_the_vae_among_several(studio: Studio) -> None:
    settings = Settings(endpoint=studio.chaos.url)
    for name in ("flux", "second"):
        vae = VAES[name]
        trial = try_out(settings, VaeAtWork(vae.vae, vae.family))
        assert trial.is_good
        assert "It is the VAE that was used here last" in trial.verdict
        assert " of them in the VAE." in trial.verdict
    stranger = other(FLUX, 5)
    trial = try_out(settings, VaeAtWork(stranger.vae, stranger.family))
    assert not trial.is_good
    assert "It is another VAE" in trial.verdict


def test_a_family_is_to_be_chosen_where_there_are_several(studio: Studio) -> None:
    with pytest.raises(SettingsError, match=r"has several VAEs \(sd1, first, second, late, flux\); choose the family"):
        family_there(Settings(endpoint=studio.chaos.url))
    assert family_there(Settings(endpoint=f"{studio.chaos.url}/flux")).key == "flux"


def test_what_a_server_says_of_all_is_read(studio: Studio) -> None:
    info = client_for(f"{studio.server.url}/info").info()
    assert [each.name for each in info.models] == list(VAES)
    assert info.models[2].fingerprints["float16"] == VAES["second"].fingerprint
    assert info.models[0].family == info.family == "sd1"
    assert "late" in info.extras


# --- which of them ---------------------------------------------------------------------------------------------------------


def said(name: str, family: str = "", vae: LoadedVae | None = None) -> Info:
    return Info(family=family, name=name, fingerprints={"float16": vae.fingerprint} if vae else {}, is_loaded=vae is not None)


def chosen(vae: LoadedVae, *models: Info) -> str:
    info = replace(models[0], models=models)
    return of_several(info, VaeAtWork(vae.vae, vae.family)).name


def test_the_same_weights_count_before_the_family() -> None:
    assert chosen(SDXL, said("a", "sd1", FLUX), said("b", "sdxl", VAES["second"]), said("c", "sd1", SDXL)) == "c"
    # Of two with the same weights that of the family.
    assert chosen(SDXL, said("a", "sd1", SDXL), said("b", "sdxl", SDXL)) == "b"


def test_of_the_family_one_that_is_not_known_yet_may_be_the_same() -> None:
    assert chosen(SDXL, said("a", "sd1", FLUX), said("b", "sdxl", VAES["second"]), said("c", "sdxl"), said("d")) == "c"
    assert chosen(SDXL, said("a", "sd1", FLUX), said("b", "sdxl", VAES["second"])) == "b"


def test_one_of_which_nothing_is_known_may_be_of_the_family() -> None:
    assert chosen(SDXL, said("a", "sd1", FLUX), said("b"), said("c", "sdxl", VAES["second"])) == "b"
    assert chosen(SDXL, said("a", "sd1", FLUX), said("c", "flux", FLUX)) == "a"


def test_who_has_no_vae_at_hand_gets_the_first_of_the_family() -> None:
    models = said("a", "sd1", SD1), said("b", "sdxl", SDXL)
    info = replace(models[0], models=models)
    assert of_several(info, VaeAtWork(None, find_family("sdxl"))).name == "b"


def test_of_one_nobody_says_which() -> None:
    info = Info(family="sdxl", models=(said("a", "sdxl", SDXL),))
    assert of_several(info, VaeAtWork(SDXL.vae, SDXL.family)).name == ""
