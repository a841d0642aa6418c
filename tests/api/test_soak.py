"""A short soak over real sockets; `make soak-requests` is the long one, with a server process of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import soak
import uvicorn
from waiting import until

from stemcache import Engine
from stemcache.api.keys import Keyring
from stemcache.api.server import create_app
from stemcache.api.server_process import free_port


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    port = free_port()
    app = create_app(engine, keyring=Keyring(soak.KEYS, b"soak"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_clients_that_leave_take_everything_with_them(url: str, engine: Engine) -> None:
    result = asyncio.run(soak.soak(url, 60))
    assert result.outcomes == {"answered": 40, "left": 20}
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.store.leases, stats.store.claims, stats.store.private_chunks) == (0, 0, 0)


def test_the_rank_sum_test_tells_alike_from_different() -> None:
    alike, other = [float(i) for i in range(40)], [i + 0.5 for i in range(40)]
    assert soak.mann_whitney(alike, other) > 0.5
    assert soak.mann_whitney(alike, [x + 100 for x in other]) < 1e-6
