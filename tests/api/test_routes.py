"""The small routes: tokens, version, liveness, HEAD, and the description that lists them all."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import openai
import pytest

from stemcache import Engine, __version__
from stemcache.api.answers import Detokenized, ErrorAnswer, Health, ModelCard, ModelList, Tokens, Version

ROOTS = pytest.mark.parametrize("root", ["", "/v1"])


@ROOTS
def test_tokens_of_a_prompt_and_back(http: httpx.Client, engine: Engine, root: str) -> None:
    text = "<|user|>The code — of é 12<|end|>"
    tokens = Tokens.model_validate(
        http.post(f"{root}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    )
    assert tokens.tokens == engine.encode(text)
    assert tokens.count == len(tokens.tokens)
    assert tokens.max_model_len == engine.max_model_len
    assert tokens.token_strs == [engine.prompts.token_text(token) for token in tokens.tokens]
    back = Detokenized.model_validate(http.post(f"{root}/detokenize", json={"tokens": tokens.tokens}).json())
    assert back.prompt == text
    assert http.post(f"{root}/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post(f"{root}/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "fields", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"documents": ["Text."]}]
)
def test_tokens_of_a_conversation_are_those_that_a_completion_reads(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello?"}], **fields}
    asked = http.post("/v1/chat/completions", json=body | {"max_tokens": 1, "return_token_ids": True}).json()
    tokenized = http.post("/tokenize", json=body).json()
    assert tokenized["tokens"] == asked["prompt_token_ids"]


def test_the_openai_client_reaches_it(client: openai.OpenAI, model: str) -> None:
    answer = client.post("/tokenize", body={"model": model, "prompt": "Hello?"}, cast_to=httpx.Response)
    assert answer.json()["count"] > 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("tokenize", {"prompt": "a", "colour": 1}, "colour"),
        ("tokenize", {"prompt": "a", "model": "gpt"}, "model"),
        ("detokenize", {"tokens": [10**9]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": "1"}, "tokens"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_bad_requests_are_refused(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = http.post(f"/{path}", json=body)
    assert response.status_code == (404 if param == "model" else 400)
    assert ErrorAnswer.model_validate(response.json()).error.param == param


def test_version_and_liveness(http: httpx.Client, model: str) -> None:
    assert Version.model_validate(http.get("/version").json()).version == __version__
    assert Health.model_validate(http.get("/ping").json()).status == "ok"
    assert ModelList.model_validate(http.get("/v1/models").json()).data == [
        ModelCard.model_validate(http.get(f"/v1/models/{model}").json())
    ]


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/v1/models", "/openapi.json"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_takes_no_get(http: httpx.Client) -> None:
    assert http.head("/v1/completions").status_code == 405
    assert http.head("/v1/models/none").status_code == 404
    assert http.head("/v1/nothing").status_code == 404


def test_the_description_names_every_answer(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for operation in methods.values():
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert schema["$ref"].startswith("#/components/schemas/"), path
            for error in ("4XX", "5XX"):
                ref = operation["responses"][error]["content"]["application/json"]["schema"]["$ref"]
                assert ref.endswith("/ErrorAnswer")
            assert "422" not in operation["responses"]


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/cache/pin", "GET, HEAD, POST"), ("/v1/completions", "POST"), ("/metrics", "GET, HEAD")]
)
def test_a_wrong_method_is_told_all_right_ones(http: httpx.Client, path: str, methods: str) -> None:
    response = http.put(path)
    assert (response.status_code, response.headers["allow"]) == (405, methods)
    assert ErrorAnswer.model_validate(response.json()).error.message == "This route does not take this method."


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"stream": None, "parallel_tool_calls": None, "stream_options": None}, True),  # null: not given
        ({"user": 5, "metadata": {"a": ["b"]}}, True),  # no-ops
        ({"store": False, "service_tier": "auto", "colour": None}, True),  # what asks for nothing
        ({"messages": [{"role": "user", "content": "Hi", "annotations": [], "refusal": None}]}, True),
        ({"store": True}, False),
        ({"store": 0}, False),
        ({"colour": "red"}, False),
        ({"messages": None}, False),
        ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, False),
        ({"stream": "yes"}, False),
    ],
)
def test_what_is_accepted_fits_the_description(http: httpx.Client, fields: dict[str, Any], fits: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1} | fields
    described = http.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": described["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == fits
    assert http.post("/v1/chat/completions", json=body).status_code == (200 if fits else 400)
