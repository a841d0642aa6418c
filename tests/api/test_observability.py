"""Metrics, logs, request ids and traces: what they say is what happened, and never what was written."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from stemcache import Engine
from stemcache.api.keys import Keyring
from stemcache.api.logs import JsonFormatter, TextFormatter
from stemcache.api.server import create_app
from stemcache.api.tracing import Spans

KEY = "alice-key-0123456789"
ID = "x-request-id"


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
        async with httpx.AsyncClient(transport=transport, base_url="http://app", headers=headers) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def complete(app: FastAPI, prompt: Any, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
    return call(app, "POST", "/v1/completions", json=body, headers=headers)


def values(app: FastAPI) -> dict[str, float]:
    """All samples by name and labels, as Prometheus writes them."""
    samples = [sample for family in parse_text(call(app, "GET", "/metrics").text) for sample in family.samples]
    return {
        s.name + "".join(f"{{{k}={v}}}" for k, v in sorted(s.labels.items()) if k != "le"): s.value for s in samples
    }


@pytest.fixture
def app(engine: Engine) -> FastAPI:
    return create_app(engine, keyring=Keyring({KEY: "alice"}, b"secret"))


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Gives the log's lines so far, as the server writes them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    ours = logging.getLogger("stemcache")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    ours.removeHandler(handler)
    ours.setLevel(before)


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_counters_say_what_the_answers_said(app: FastAPI) -> None:
    prompt = [11 + i % 60 for i in range(150)]
    before = values(app)
    usages = [complete(app, prompt).json()["usage"] for _ in range(2)]
    assert complete(app, [[5], [6]], n=2, stream=True).status_code == 200
    assert complete(app, [10**9]).status_code == 400
    grown = {name: value - before.get(name, 0.0) for name, value in values(app).items()}
    assert grown["stemcache_prompt_tokens_total"] == 302
    assert grown["stemcache_prefix_cache_queries_tokens_total"] == 302
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert grown["stemcache_cached_tokens_total{tier=device}"] == cached == 128
    assert grown["stemcache_generation_tokens_total"] == 2 * 4 + 4 * 4
    completions = "{route=/v1/completions}"
    assert grown["stemcache_requests_total{outcome=completed}" + completions] == 3
    assert grown["stemcache_requests_total{outcome=refused}" + completions] == 1
    assert grown["stemcache_request_success_total{finished_reason=length}"] == 6
    assert grown["stemcache_time_to_first_token_seconds_count{prompt=cached}"] == 1
    assert grown["stemcache_time_to_first_token_seconds_count{prompt=computed}"] == 3
    assert grown["stemcache_inter_token_latency_seconds_count"] == 6 * 3
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert grown[f"stemcache_{name}_seconds_count"] == 4


def test_gauges_are_the_engines(app: FastAPI, engine: Engine) -> None:
    now, pool = values(app), engine.stats().store
    assert now["stemcache_num_requests_running"] == now["stemcache_num_requests_waiting"] == 0
    states = [now[f"stemcache_pool_chunks{{state={state}}}"] for state in ("free", "cached", "private")]
    assert states == [pool.free_chunks, pool.cached_chunks, pool.private_chunks]
    assert sum(states) == pool.total_chunks
    assert now["stemcache_evicted_tokens_total{tier=device}"] == 64 * pool.evicted_chunks


def test_no_rate_no_name_and_no_text_in_metrics(app: FastAPI) -> None:
    complete(app, "Zanzibar is the secret", cache_salt="pepper")
    call(app, "GET", "/v1/models/Zanzibar")
    call(app, "GET", "/Zanzibar")
    text = call(app, "GET", "/metrics").text
    assert "rate" not in text.replace("generate", "")
    assert not any(word in text for word in ("Zanzibar", "pepper", "alice", KEY))


def test_head_and_openmetrics(app: FastAPI) -> None:
    head = call(app, "HEAD", "/metrics")
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/plain")
    asked = call(app, "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    assert len(list(parse_openmetrics(asked.text))) > 10


def test_two_applications_count_apart(engine: Engine) -> None:
    one, two = create_app(engine), create_app(engine)
    complete(one, [5, 6])
    assert "stemcache_requests_total{outcome=completed}{route=/v1/completions}" in values(one)
    assert "stemcache_requests_total{outcome=completed}{route=/v1/completions}" not in values(two)


# -- request ids and logs --------------------------------------------------------------------------------------------


def test_every_answer_has_the_requests_id(app: FastAPI) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("on purpose")

    for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("HEAD", "/metrics"), ("GET", "/broken")):
        assert call(app, method, path, headers={ID: "abc-1:2.3_Z"}).headers[ID] == "abc-1:2.3_Z"
    for path, status in (("/v1/models", 200), ("/no", 404), ("/broken", 500)):
        response = call(app, "GET", path)
        assert response.status_code == status
        assert len(response.headers[ID]) == 32
    assert call(app, "GET", "/v1/models", headers={"Authorization": ""}).headers[ID]
    assert complete(app, [10**9]).headers[ID]
    assert complete(app, [5], stream=True, headers={ID: "stream"}).headers[ID] == "stream"


@pytest.mark.parametrize("bad", ["", " ", "a b", "x" * 129, "a\tb", "<script>", '"', "a\u00e9"])
def test_an_id_that_could_do_harm_is_replaced(app: FastAPI, bad: str) -> None:
    given = bad.encode("latin-1")
    assert call(app, "GET", "/health", headers={ID: given}).headers[ID] != bad


def test_one_line_a_request(app: FastAPI, lines: Callable[[], list[dict[str, Any]]]) -> None:
    complete(app, [7] * 70, headers={ID: "first"})
    complete(app, [7] * 70, stream=True, headers={ID: "second"})
    call(app, "GET", "/v1/models", headers={"Authorization": "Bearer nothing", ID: "third"})
    call(app, "GET", "/health")
    first, second, third = lines()
    assert first.pop("time").endswith("Z")
    assert first.pop("seconds") > 0
    assert first == {
        "level": "INFO",
        "logger": "stemcache.access",
        "message": "POST /v1/completions 200",
        "request_id": "first",
        "tenant": "alice",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "outcome": "completed",
        "prompt_tokens": 70,
        "cached_tokens": 0,
        "completion_tokens": 4,
    }
    assert (second["request_id"], second["cached_tokens"]) == ("second", 64)
    assert (third["request_id"], third["status"], third["outcome"]) == ("third", 401, "refused")
    assert "tenant" not in third


def test_a_failure_is_logged_under_its_id(app: FastAPI, lines: Callable[[], list[dict[str, Any]]]) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("on purpose")

    answer = call(app, "GET", "/broken", headers={ID: "it"})
    assert "on purpose" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    failure, access = lines()
    assert failure["request_id"] == access["request_id"] == "it"
    assert "RuntimeError: on purpose" in failure["exception"]
    assert (access["status"], access["outcome"]) == (500, "failed")


def test_prompts_are_not_logged_unless_asked_for(engine: Engine, lines: Callable[[], list[dict[str, Any]]]) -> None:
    word = "Zanzibar"
    for log_prompts in (False, True):
        app = create_app(engine, log_prompts=log_prompts)
        complete(app, f"{word} is", cache_salt=word)
        complete(app, f"{word} is", stop=[word], stream=True)
        complete(app, f"{word} is", model=word)
        complete(app, {word: 1})
        call(app, "POST", "/v1/completions", content=f'{{"{word}"', headers={"Content-Type": "application/json"})
        message = {"role": "user", "content": word}
        call(app, "POST", "/v1/chat/completions", json={"messages": [message], "max_tokens": 1, word: 1})
        call(app, "POST", "/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
        call(app, "GET", f"/v1/models?{word}")
        logged = [line for line in lines() if word in json.dumps(line)]
        if not log_prompts:
            assert logged == []
            assert len(lines()) == 8
    assert [list(line["prompt"]) for line in logged] == [["prompt"], ["prompt"], ["messages"]]


def test_lines_for_terminals_cannot_be_forged() -> None:
    record = logging.LogRecord("stemcache.access", logging.INFO, "", 0, "GET /a\n12:00:00 INFO\x1b[2J 200", (), None)
    record.fields = {"path": "/a\n", "outcome": "line\nbreak"}
    line = TextFormatter().format(record)
    assert line.isprintable()
    assert 'outcome="line\\nbreak"' in line
    assert len(JsonFormatter().format(record).splitlines()) == 1


# -- traces ----------------------------------------------------------------------------------------------------------


def test_a_span_a_generation(engine: Engine) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(engine, spans=Spans(provider.get_tracer("test"), "demo"))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    complete(app, "Zanzibar is", headers={"traceparent": parent, ID: "it"})
    call(app, "GET", "/v1/models")
    call(
        app,
        "POST",
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Zanzibar"}], "max_tokens": 1},
    )
    completion, chat = exporter.get_finished_spans()
    assert completion.name == "text_completion demo"
    assert format(completion.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert completion.attributes["gen_ai.usage.output_tokens"] == 4
    assert completion.attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    assert completion.attributes["stemcache.request_id"] == "it"
    assert completion.end_time > completion.start_time
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.parent is None
    assert "Zanzibar" not in completion.to_json() + chat.to_json()
