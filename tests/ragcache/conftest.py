"""The demo model in float32, and context caches over it that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT
from stemcache.engine.engine import Engine
from stemcache.ragcache.context_cache import ContextCache

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=32 << 20, chunk_tokens=16) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """An engine with an empty cache; at the end its books are right and nothing is held."""
    shared_engine.clear_cache()
    yield shared_engine
    shared_engine.check()
    stats = shared_engine.stats()
    assert (stats.running, stats.waiting, stats.store.leases, stats.store.claims) == (0, 0, 0, 0)


@pytest.fixture
def cache_of(engine: Engine) -> Iterator[Callable[..., ContextCache]]:
    """Makes context caches; each is closed at the end."""
    made: list[ContextCache] = []

    def make(**options: Any) -> ContextCache:
        made.append(ContextCache(engine, **{"system_prompt": SYSTEM_PROMPT, **options}))
        return made[-1]

    yield make
    for cache in made:
        cache.close()
