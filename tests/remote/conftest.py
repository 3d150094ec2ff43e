"""A host that makes calls with one VAE through an endpoint that misbehaves on demand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.call import VaeCall
from remote_vae.history import Record
from remote_vae.remote.route import RemoteRoute
from remote_vae.remote.same_vae import SameVae
from remote_vae.router import Router
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import Family
from tests.chaos import Chaos


class Clock:
    """Says the time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Caller:
    """Makes calls with one VAE, and answers them here where they do not go remote."""

    def __init__(self, vae: Any, family: Family, latents: torch.Tensor) -> None:
        self.vae = vae
        self.family = family
        self.latents = latents
        self.clock = Clock()
        self.same_vae = SameVae(self.clock)
        self.router = Router()
        self.route = self.router._remote = RemoteRoute(same_vae=self.same_vae)

    def call(self, picked: str = "", family: Family | None = None, **changes: Any) -> VaeCall[str]:
        vae = VaeAtWork(self.vae, family or self.family, picked=picked, has_posterior="Tiny" not in type(self.vae).__name__)
        call: VaeCall[str] = VaeCall(
            op="decode", tensor=self.latents, vae=vae, adopt=lambda answer: "remote", whole=lambda: "local"
        )
        return replace(call, **changes)

    def run(self, settings: Settings, picked: str = "", **changes: Any) -> str:
        return self.router.run(self.call(picked, **changes), settings)

    def ask(self, settings: Settings, picked: str = "", **changes: Any) -> str:
        """The remote route alone."""
        return self.route.run(self.call(picked, **changes), settings).value

    @property
    def last(self) -> Record:
        assert self.router.history.last is not None
        return self.router.history.last

    @property
    def reason(self) -> str:
        return self.last.fallback_reason


@pytest.fixture
def caller(vae: AutoencoderKL, loaded: LoadedVae, latents: torch.Tensor) -> Caller:
    return Caller(vae, loaded.family, latents)


@pytest.fixture
def settings(chaos: Chaos) -> Settings:
    return Settings(endpoint=chaos.url)
