"""For all tests of the endpoint: one real server process and one engine here, both on the demo model in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from forked import ForkedServer

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument, random_corpus
from stemcache.engine.engine import Engine


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with ForkedServer("--dtype", "float32", "--pool-bytes", "128MiB") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=128 << 20) as loaded:
        yield loaded


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def model(server: ServerProcess) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        return client.models.list().data[0].id


@pytest.fixture
def corpus(request: pytest.FixtureRequest) -> list[FactDocument]:
    """Documents that no other test uses, so that what is cached is what the test itself asked for."""
    return random_corpus(random.Random(request.node.nodeid), 3)


@pytest.fixture
def documents(corpus: list[FactDocument]) -> list[dict[str, Any]]:
    return [document.as_template_document() for document in corpus]
