"""Small random models that are made once, and an engine over one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from equivalence import Reference, random_models
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stemcache import Engine
from stemcache.engine.demo import MODEL_PATH

# The models are so small that a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models() -> Callable[[str], tuple[PreTrainedModel, Reference]]:
    """A family's model to serve, and `generate` over the same weights."""
    made: dict[str, tuple[PreTrainedModel, Reference]] = {}

    def get(family: str) -> tuple[PreTrainedModel, Reference]:
        if family not in made:
            served, own = random_models(family)
            made[family] = served, Reference(own)
        return made[family]

    return get


@pytest.fixture
def llama_engine(models: Callable[[str], tuple[PreTrainedModel, Reference]]) -> Iterator[Callable[..., Engine]]:
    """Makes engines over the random Llama; each is checked and closed at the end."""
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine.from_model(models("llama")[0], **{"pool_bytes": 1 << 20, "chunk_tokens": 16, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.store.leases, stats.store.claims) == (0, 0, 0, 0)
        engine.close()


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[Engine]:
    with Engine.load(MODEL_PATH, pool_bytes=64 << 20) as engine:
        yield engine
        engine.check()
