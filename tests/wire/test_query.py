from __future__ import annotations

import pytest
import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family, load_families
from remote_vae.wire import Scaling


@pytest.mark.parametrize(
    "arguments",
    [
        *({"factor": factor} for factor in (0.0, -1.0, 1e-30, 9e-4, 1001.0, 1e30, float("inf"), float("nan"))),
        *({"shift": shift} for shift in (-1001.0, 1e30, float("inf"), float("nan"))),
        {"factor": 1.0, "by_model": True},
    ],
)
def test_a_scaling_that_makes_no_sense_cannot_be_made(arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Scaling(**arguments)  # type: ignore[arg-type]


def test_booleans_and_absent_factors_are_read_as_clients_write_them() -> None:
    assert Scaling.from_query({"do_scaling": "False", "shift_factor": "None"}) == Scaling()
    assert Scaling.from_query({"do_scaling": "True"}) == Scaling(by_model=True)
    assert Scaling.from_query({"do_scaling": "True", "scaling_factor": "0.5"}) == Scaling(0.5)


def test_scaling_is_that_of_the_protocol() -> None:
    z = torch.randn(1, 4, 2, 2)
    own = Family("any", "any VAE", 4, 8, 4.0, 9.0)
    assert torch.equal(Scaling(0.5, 0.25).unscale(z, own), z / 0.5 + 0.25)
    assert torch.equal(Scaling(by_model=True).unscale(z, own), z / 4.0 + 9.0)
    assert torch.equal(Scaling().unscale(z, own), z)
    assert torch.equal(Scaling(0.5, 0.25).scale(z, own), (z - 0.25) * 0.5)
    assert torch.equal(Scaling(by_model=True).scale(z, own), (z - 9.0) * 4.0)
    assert torch.equal(Scaling().scale(z, own), z)


def test_the_factors_of_every_family_are_allowed() -> None:
    for family in load_families().values():
        Scaling(family.scaling_factor, family.shift_factor)
