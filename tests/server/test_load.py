"""A crowd that misbehaves keeps nobody from being served, and takes no memory to speak of.

``bench/load.py``, of which this is a part, says how long it takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.load import CROWDS, ROOT, Server, decode, measure

# A thread, the largest picture of the test and what the allocator keeps; an upload of the crowd says that it has 400 MB.
MEMORY = 200


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    # A batch takes as much as one picture of its pixels would, which is not what this is about.
    server = Server(ROOT / "assets" / "demo_vae")
    assert decode(server).ok
    yield server
    server.close()


@pytest.mark.parametrize("crowd", CROWDS)
def test_one_who_behaves_is_served_beside(process: Server, crowd: str) -> None:
    row = measure(process, crowd, 3)
    assert row.served == 3
    assert row.memory < MEMORY
