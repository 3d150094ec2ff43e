"""The bench of a card, on a processor and with the smallest sizes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import card, gpu
from bench.card import Case
from bench.vaes import NARROW, random_vae


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> gpu.Bench:
    vae = random_vae(NARROW, card.TILE)
    sizes = gpu.Sizes((torch.float32,), (64,), ((64, 0.001),), counted=64)
    return gpu.Bench(vae, sizes, tmp_path_factory.mktemp("bench"), time.perf_counter() + 600, {"device": "processor"})


def test_every_way_is_compared_with_the_whole_vae_and_written_as_a_table_and_as_json(
    bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bench.operations")
    # One call of each; a tenth of so little is thousands of strips.
    monkeypatch.setattr(gpu, "ROW_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "SHARES", (None, 0.30))
    gpu.run(bench)
    everything = json.loads((bench.folder / "gpu.json").read_text())
    rows: dict[tuple[str, str], Any] = {(row["part"], row["what"]): row for row in everything["rows"]}
    assert everything["left_out"] == []
    assert not [row for row in everything["rows"] if row.get("failure")]
    for op in ("decode", "encode"):
        whole = rows["counts", f"{op} 64 whole"]["operations"]
        for way in ("exact", "exact in 30%"):
            assert 50 < whole < rows["counts", f"{op} 64 {way}"]["operations"]
            assert rows["rows", f"float32 {op} 64 {way}"]["dB"] >= 100
        small = rows["small", f"float32 {op} 64 in 0.001 GB by word"]
        assert (small["by"], small["dB"] >= 100) == ("tiled exact", True)
    table = (bench.folder / "gpu.md").read_text()
    assert "## counts" in table
    assert "| float32 decode 64 exact in 30% |" in table


def test_when_the_time_is_up_it_ends_with_what_it_has_and_says_what_is_missing(bench: gpu.Bench, tmp_path: Path) -> None:
    late = gpu.Bench(bench.vae, bench.sizes, tmp_path, time.perf_counter() - 1, {})
    gpu.run(late, ["rows", "small"])
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == ["the rest of rows", "the rest of small"]


def test_three_blended_passes_are_nearly_the_whole_picture_and_one_tile_is_all_of_it(bench: gpu.Bench) -> None:
    for op in ("decode", "encode"):
        # Tiles of 64 pixels, more than one in each direction.
        case = Case(op, 112, torch.float32)
        with torch.no_grad():
            whole, blended = card.whole(bench.vae, case), card.three_passes(bench.vae, case)
        assert blended.shape == whole.shape
        assert 0 < (blended - whole).abs().mean() < 0.7 * whole.std()
    tensor = torch.rand(1, 3, 40, 56)
    same = card._blended(lambda tile: tile.repeat_interleave(2, 2).repeat_interleave(2, 3), tensor, (16, 24), 8)
    assert torch.allclose(same, tensor.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)


def test_a_call_that_takes_too_long_or_runs_out_of_memory_is_a_row_and_not_the_end(bench: gpu.Bench) -> None:
    case = Case("decode", 64, torch.float32)
    long = card.measure(lambda: card.exact(bench.vae, case, None, time.perf_counter() - 1), seconds=1)
    assert long.failure.startswith("longer than")
    assert math.isnan(long.seconds)

    def oom() -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert card.measure(oom, seconds=1).failure == "out of memory"
