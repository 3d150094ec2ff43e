from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from diffusers import AutoencoderKL

from remote_vae import Settings, remote_decode, remote_encode
from remote_vae.call import Answer, VaeCall
from remote_vae.router import Router
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family
from tests.cluster.conftest import Cluster, crowd_of, two

_SIDE = 32


def noise(number: int, channels: int = 4, side: int = _SIDE) -> torch.Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(number)) * 3


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        picture: torch.Tensor = vae.decode(latents).sample
    return picture


def problem(came: torch.Tensor, wanted: torch.Tensor) -> str:
    """What is wrong with a picture that was made beside others, in a batch: its last bits may be others. "": nothing is."""
    return "" if torch.allclose(came, wanted, atol=1e-3) else "another picture"


def asked(url: str, latents: torch.Tensor, *, levels: bool = False) -> torch.Tensor:
    """A picture by diffusers' function, with raw latents."""
    answer: torch.Tensor = remote_decode(
        f"{url}/decode", latents, do_scaling=False, output_type="pt", return_type="pt", partial_postprocess=levels
    )
    return answer


@pytest.fixture
def three(cluster: Cluster, vaes: dict[str, str]) -> Cluster:
    """Serving three VAEs."""
    cluster.serve(vaes=vaes, num_cpus=0.2)
    return cluster


@pytest.mark.parametrize("levels", [True, False], ids=["u8", "raw"])
def test_a_picture_comes_through_ray_bit_by_bit(three: Cluster, here: dict[str, AutoencoderKL], levels: bool) -> None:
    latents = noise(0, side=128)
    wanted = decoded(here["sd1"], latents)
    if levels:
        wanted = (wanted / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(asked(f"{three.url}/sd1", latents, levels=levels), wanted)


def test_a_large_picture_goes_up_bit_by_bit(three: Cluster, here: dict[str, AutoencoderKL]) -> None:
    pixels = torch.rand(1, 3, 1024, 1536, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.inference_mode():
        wanted = here["flux"].encode(pixels).latent_dist.mode()
    assert torch.equal(remote_encode(f"{three.url}/flux/encode", pixels), wanted)


def test_info_lists_every_vae_and_who_names_none_gets_the_one_that_fits(three: Cluster, here: dict[str, AutoencoderKL]) -> None:
    info = three.info()
    assert [(model["name"], model["family"]) for model in info["models"]] == [
        ("sd1", "sd1"),
        ("anime", "sd1"),
        ("flux", "flux"),
    ]
    assert info["fingerprint"] == info["models"][0]["fingerprint"]
    fingerprint = info["models"][1]["fingerprint"]
    four, sixteen = noise(1), noise(1, 16)
    assert torch.equal(asked(three.url, four), decoded(here["sd1"], four))
    assert torch.equal(asked(three.url, sixteen), decoded(here["flux"], sixteen))
    by_name = f"{three.url}/decode?family=sd1&fingerprint={fingerprint}"
    answer = remote_decode(by_name, four, do_scaling=False, output_type="pt", return_type="pt")
    assert torch.equal(answer, decoded(here["anime"], four))


@pytest.mark.parametrize(
    ("path", "body", "status", "what"),
    [
        ("/decode?shape=1&shape=4&shape=9999&shape=9999&dtype=float32", b"", 400, "at most"),
        ("/decode?shape=1&shape=5&shape=8&shape=8&dtype=float32", b"", 400, "channels"),
        ("/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32", b"0" * 40_000, 413, "40000 bytes"),
        ("/sd1/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32&family=flux", b"0" * 1024, 400, "SD 1"),
        ("/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32&family=sd77", b"0" * 1024, 400, "sd77"),
        ("/nobody/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32", b"0" * 1024, 404, "sd1, anime, flux"),
    ],
)
def test_what_is_not_a_request_is_refused_in_json(three: Cluster, path: str, body: bytes, status: int, what: str) -> None:
    answer = requests.post(f"{three.url}{path}", data=body, timeout=30)
    assert answer.status_code == status
    assert what in answer.json()["error"]


def test_a_vae_for_which_there_is_no_place_costs_the_others_nothing(
    cluster: Cluster, vaes: dict[str, str], here: dict[str, AutoencoderKL]
) -> None:
    cluster.begin(vaes={"sd1": vaes["sd1"], "flux": {"source": vaes["flux"], "num_gpus": 1}}, num_cpus=0.2)
    cluster.wait(lambda: cluster.health().get("replicas") == {"sd1": 1, "flux": 0})
    latents = noise(4)
    assert torch.equal(asked(cluster.url, latents), decoded(here["sd1"], latents))
    assert [model["loaded"] for model in cluster.info()["models"]] == [True, False]


def test_the_token_of_a_file_is_asked_for(cluster: Cluster, vaes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n", encoding="utf-8")
    cluster.begin(vaes={"sd1": vaes["sd1"]}, num_cpus=0.2, token_file=str(tmp_path / "token"))

    def status(token: str) -> int:
        # While the front is exchanged nobody answers.
        return requests.get(f"{cluster.url}/info", headers={"Authorization": f"Bearer {token}"}, timeout=120).status_code

    cluster.wait(lambda: status("wrong") == 401)
    cluster.wait(lambda: status("secret") == 200)


def call_by_router(
    cluster: Cluster, vae: AutoencoderKL, path: str = "/sd1", settings: Settings | None = None
) -> Callable[[int], str]:
    """A call as a UI makes it: by the endpoint, or on this machine; the answer is looked at."""
    router = Router()
    settings = settings or Settings(
        enabled=True, endpoint=f"{cluster.url}{path}", transfer="raw", when_vae_differs="remote", cooldown=0.0
    )
    wanted = [decoded(vae, noise(number)) for number in range(8)]

    def adopt(answer: Answer) -> torch.Tensor:
        picture: torch.Tensor = answer.pixels("cpu", torch.float32)  # type: ignore[union-attr]
        return picture

    def call(number: int) -> str:
        at_work = VaeAtWork(None, find_family("sd1"))
        picture = router.run_remote(VaeCall("decode", noise(number), at_work, adopt), settings)
        return problem(picture, wanted[number])

    return call


def test_a_replica_that_is_killed_under_load_costs_nobody_a_picture(
    cluster: Cluster, vaes: dict[str, str], here: dict[str, AutoencoderKL]
) -> None:
    cluster.serve(**two(vaes))
    with crowd_of(call_by_router(cluster, here["sd1"])) as crowd:
        killed = cluster.kill("sd1")
        crowd.more(20)
        # Ray has put another in its place.
        cluster.wait(lambda: len(set(cluster.processes("sd1")) - {killed}) == 2)
        crowd.more(20)
    assert crowd.wrong == []


def test_a_plain_client_does_not_see_that_a_replica_is_killed(
    cluster: Cluster, vaes: dict[str, str], here: dict[str, AutoencoderKL]
) -> None:
    cluster.serve(**two(vaes))
    wanted = [decoded(here["sd1"], noise(number)) for number in range(4)]

    def call(number: int) -> str:
        answer = requests.post(
            f"{cluster.url}/decode",
            params={"shape": [1, 4, _SIDE, _SIDE], "dtype": "float32", "output_type": "pt"},
            data=noise(number).numpy().tobytes(),
            timeout=60,
        )
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text}"
        came = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(wanted[number].shape)
        return problem(came, wanted[number])

    with crowd_of(call) as crowd:
        cluster.kill("sd1")
        crowd.more(20)
    assert crowd.wrong == []


def test_the_front_that_is_killed_under_load_costs_nobody_a_picture(
    cluster: Cluster, vaes: dict[str, str], here: dict[str, AutoencoderKL]
) -> None:
    cluster.serve(**two(vaes))
    with crowd_of(call_by_router(cluster, here["sd1"])) as crowd:
        cluster.kill("front")
        crowd.more(20)
    assert crowd.wrong == []


def test_an_update_under_load_costs_nobody_a_picture(
    cluster: Cluster, vaes: dict[str, str], here: dict[str, AutoencoderKL], tmp_path: Path
) -> None:
    cluster.serve(**two(vaes))
    before = cluster.processes("sd1")
    with crowd_of(call_by_router(cluster, here["sd1"])) as crowd:
        # The same weights from another folder, so that every answer is to be the same.
        moved = tmp_path / "moved"
        here["sd1"].save_pretrained(moved)
        cluster.serve(**two({"sd1": str(moved)}))
        cluster.wait(lambda: not set(before) & set(cluster.processes("sd1")))
        crowd.more(20)
    assert crowd.wrong == []


def test_a_full_queue_is_a_503_in_json_that_says_when_to_come_back(cluster: Cluster, vaes: dict[str, str]) -> None:
    cluster.serve(vaes={"sd1": vaes["sd1"]}, num_cpus=0.2, max_ongoing_requests=1, max_queued_requests=1)

    def plain(number: int) -> requests.Response:
        query = {"shape": [1, 4, 64, 64], "dtype": "float32"}
        return requests.post(f"{cluster.url}/decode", params=query, data=noise(number, side=64).numpy().tobytes(), timeout=60)

    with ThreadPoolExecutor(12) as executor:
        answers = list(executor.map(plain, range(12)))
    assert {answer.status_code for answer in answers} == {200, 503}, [answer.text[:200] for answer in answers]
    for answer in answers:
        if answer.status_code == 503:
            assert "sd1" in answer.json()["error"]
            assert int(answer.headers["Retry-After"]) >= 1


def test_health_says_that_it_works_while_it_does(cluster: Cluster, vaes: dict[str, str]) -> None:
    cluster.serve(vaes={"sd1": vaes["sd1"]}, num_cpus=0.2)
    cluster.wait(lambda: not cluster.health()["running"])
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(asked, cluster.url, noise(0, side=160))
        cluster.wait(lambda: call.done() or cluster.health()["running"])
        assert not call.done()
        call.result()
    cluster.wait(lambda: not cluster.health()["running"])
    assert cluster.health()["replicas"] == {"sd1": 1}
