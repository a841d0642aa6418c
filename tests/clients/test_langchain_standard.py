"""LangChain's own standard tests, over the real server and the demo model."""

from __future__ import annotations

from typing import Any

import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH

pytest.importorskip("langchain_tests", reason="make test-clients installs it")

from langchain_core.documents import Document
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from stemcache.ragcache.plugins.langchain import ChatStemcache, StemcacheRetriever


class TestUnits(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatStemcache]:
        return ChatStemcache

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL_PATH.name}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        key = "a key of the environment"
        return {"STEMCACHE_API_KEY": key}, self.chat_model_params, {"openai_api_key": key}


class TestServer(ChatModelIntegrationTests):
    url: str

    @pytest.fixture(scope="class", autouse=True)
    def address(self, request: pytest.FixtureRequest, tool_server: ServerProcess) -> None:
        request.cls.url = f"{tool_server.url}/v1"

    @property
    def chat_model_class(self) -> type[ChatStemcache]:
        return ChatStemcache

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "caller", "base_url": self.url, "temperature": 0, "max_tokens": 200, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "caller"


class TestRetriever(RetrieversIntegrationTests):
    url: str

    @pytest.fixture(scope="class", autouse=True)
    def address(self, request: pytest.FixtureRequest, server: ServerProcess) -> None:
        request.cls.url = server.url
        towers = [Document(f"The code of tower {n} is {n * 1111}.", id=f"tower-{n}") for n in range(5)]
        StemcacheRetriever(base_url=server.url).add_documents(towers)

    @property
    def retriever_constructor(self) -> type[StemcacheRetriever]:
        return StemcacheRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"base_url": self.url}

    @property
    def retriever_query_example(self) -> str:
        return "What is the code of tower 3?"
