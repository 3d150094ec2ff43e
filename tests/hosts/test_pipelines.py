"""Real pipelines of diffusers, one for each class of VAE, each with the real server of the same VAE.

All pipelines, with a server that is killed and with too little memory, are in ``python -m tests.e2e.models``.
"""

from __future__ import annotations

import copy

import pytest
import torch

import remote_vae
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.e2e.models import CASES, STRIDES
from tests.e2e.pipelines import Case
from tests.hosts.of_families import loaded, the_vae
from tests.vaes import SMALL_HERE
from tests.versions import before_diffusers, before_torch, skip_if

QUICK = [pytest.param(case, id=case.pipeline + "-" + case.vae) for case in CASES if case.quick]


def test_there_is_a_pipeline_for_every_class_of_vae() -> None:
    kinds = {name: type(the_vae(name)).__name__ for name in SMALL_HERE}
    every = {kinds[case.vae] for case in CASES if case.vae in kinds}
    quick = {kinds[case.vae] for case in CASES if case.vae in kinds and case.quick}
    assert every - quick <= {"AutoencoderKLHunyuanImageRefiner"}
    assert set(kinds.values()) == every


@pytest.mark.parametrize("case", QUICK)
@torch.no_grad()
def test_a_pipeline_makes_the_same_remotely_and_when_the_endpoint_dies(case: Case) -> None:
    if case.pipeline == "SanaPipeline":
        skip_if(before_diffusers(0, 33, "Sana's pipeline without a tokenizer"))
    if case.pipeline == "MochiPipeline":
        skip_if(before_torch(2, 2, "autocast to float32 on processors"))
    pipe = case.make()
    alone = case.call(pipe)
    server = ServerThread(loaded(copy.deepcopy(pipe.vae), case.vae))
    chaos = Chaos(server.url)
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url, "transfer": "raw", "cooldown": 0.0})
    torch.testing.assert_close(case.call(pipe), alone, rtol=0, atol=STRIDES)
    assert {record.route for record in handle.history.records()} == {"remote"}
    handle.history.clear()
    chaos.reset("drop")
    assert torch.equal(case.call(pipe), alone)
    assert {record.route for record in handle.history.records()} == {"local"}
    chaos.close()
    server.close()


@torch.no_grad()
def test_latents_are_handed_out_untouched() -> None:
    case = next(case for case in CASES if case.vae == "qwen-image")
    pipe = case.make()
    alone = case.call(pipe, output_type="latent")
    handle = remote_vae.attach(pipe, {"endpoint": "http://127.0.0.1:9"})
    assert torch.equal(case.call(pipe, output_type="latent"), alone)
    assert not handle.history.records()
