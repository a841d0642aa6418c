"""Who is let in, and that two tenants never find each other's chunks."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from stemcache import Engine
from stemcache.api.keys import Keyring
from stemcache.api.live_page import PATHS
from stemcache.api.server import create_app

KEYS = {"alice-key-0123456789": "alice", "alice-next-0123456789": "alice", "bob-key-0123456789ab": "bob"}
ALICE, ALICES_NEXT, BOB = KEYS
PROMPT = [5 + i % 100 for i in range(200)]
WHOLE_CHUNKS = 192


@pytest.fixture(scope="module")
def app(engine: Engine) -> FastAPI:
    return create_app(engine, keyring=Keyring(KEYS, b"secret"))


def call(app: FastAPI, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(send())


def cached(app: FastAPI, key: str, prompt: list[int], **fields: Any) -> int:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0} | fields
    response = call(app, "POST", "/v1/completions", key, json=body)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_everything_but_health_and_the_live_page_needs_a_key(app: FastAPI) -> None:
    routes = {(method, route.path) for route in app.routes for method in getattr(route, "methods", ())}
    routes |= {("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("HEAD", "/metrics"), ("POST", "/no")}
    assert len(routes) > 10
    for method, path in routes - {
        (method, path) for method in ("GET", "HEAD") for path in {"/health", "/ping"} | PATHS
    }:
        for key in (None, "", "wrong", ALICE[:-1]):
            response = call(app, method, path, key)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                error = response.json()["error"]
                assert (error["type"], error["code"], error["param"]) == (
                    "invalid_request_error",
                    "invalid_api_key",
                    None,
                )
    assert call(app, "GET", "/health").json()["status"] == "ok"
    assert any(isinstance(route, APIRoute) for route in app.routes)


def test_a_key_opens_everything(app: FastAPI) -> None:
    for path in ("/v1/models", "/docs", "/openapi.json", "/metrics"):
        assert call(app, "GET", path, BOB).status_code == 200
    assert call(app, "POST", "/v1/no", BOB).status_code == 404


@pytest.mark.parametrize("value", ["Basic {}", "{}", "Bearer", "Bearer  ", "Token {}"])
def test_other_ways_to_bring_a_key_are_refused(app: FastAPI, value: str) -> None:
    response = call(app, "GET", "/v1/models", json=None)
    assert response.status_code == 401

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return await client.get("/v1/models", headers={"Authorization": value.format(ALICE)})

    assert asyncio.run(send()).status_code == 401


def test_a_body_is_not_even_read_without_a_key(app: FastAPI) -> None:
    async def endless() -> Any:
        raise AssertionError("the body was asked for")
        yield b""

    assert call(app, "POST", "/v1/completions", "wrong", content=endless()).status_code == 401


def test_a_tenant_never_finds_anothers_chunks(app: FastAPI, engine: Engine) -> None:
    assert cached(app, ALICE, PROMPT) == 0
    assert cached(app, BOB, PROMPT) == 0
    assert cached(app, ALICE, PROMPT) == cached(app, BOB, PROMPT) == WHOLE_CHUNKS
    assert cached(app, ALICES_NEXT, PROMPT) == WHOLE_CHUNKS  # another key of the same tenant
    engine.check()


def test_a_salt_separates_within_a_tenant_and_opens_no_other(app: FastAPI) -> None:
    prompt = PROMPT[50:]
    assert cached(app, ALICE, prompt, cache_salt="x") == 0
    assert cached(app, ALICE, prompt, cache_salt="y") == 0
    assert cached(app, ALICE, prompt) == 0
    assert cached(app, BOB, prompt, cache_salt="x") == 0
    assert cached(app, ALICE, prompt, cache_salt="x") == 128


def test_a_server_with_keys_and_one_without_share_nothing(app: FastAPI, engine: Engine) -> None:
    prompt = PROMPT[80:]
    assert cached(app, ALICE, prompt) == 0
    open_app = create_app(engine, secret=b"secret")
    assert cached(open_app, "anything", prompt) == 0
    assert cached(open_app, "", prompt) == 64
