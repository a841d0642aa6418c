"""What cannot be served is refused with OpenAI's error body, and the server lives on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from waiting import until

COMPLETION: dict[str, Any] = {"prompt": "The code", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 2}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}

BAD_COMPLETIONS = [
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": ["a", [1]]}, "prompt", "invalid_value"),
    ({"prompt": 5}, "prompt", "invalid_value"),
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"prompt": "\ud800"}, "prompt", "invalid_value"),
    ({"prompt": [10**9]}, "prompt", None),
    ({"prompt": [-1]}, "prompt", None),
    ({"prompt": [1] * 5000}, "prompt", "context_length_exceeded"),
    ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": "16"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"temperature": float("nan")}, "temperature", None),
    ({"temperature": -1}, "temperature", None),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"top_p": float("inf")}, "top_p", None),
    ({"top_p": 0}, "top_p", None),
    ({"min_p": float("nan")}, "min_p", None),
    ({"presence_penalty": 3}, "presence_penalty", None),
    ({"n": 0}, "n", None),
    ({"n": 10**6}, "n", None),
    ({"logprobs": -1}, "logprobs", None),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", None),
    ({"stop": ""}, "stop", None),
    ({"stop": [1]}, "stop[0]", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", None),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks", "unsupported_parameter"),
    ({"echo": "yes"}, "echo", "invalid_value"),
    ({"best_of": 0}, "best_of", "invalid_value"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value"),
    ({"cache_salt": "x" * 1025}, "cache_salt", "invalid_value"),
    ({"priority": 0.5}, "priority", "invalid_value"),
    ({"n": 100, "prompt": ["a"] * 6}, "prompt", None),
    ({"no_such_field": 1}, "no_such_field", "unsupported_parameter"),
    ({"documents": ["text"]}, "documents", "unsupported_parameter"),
    ({"\ud800": 1}, None, None),
    ({"stop": "\ud800"}, "stop[0]", "invalid_value"),
    ({"store": True}, "store", "unsupported_parameter"),
]
BAD_CHATS = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "Hello?"}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text", "invalid_value"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "critic", "content": "no"}]}, "messages", None),
    ({"messages": [{"role": "user", "content": "code " * 3000}]}, "messages", "context_length_exceeded"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logprobs": 2}, "logprobs", "invalid_value"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", None),
    ({"documents": [{"title": "without text"}]}, "documents[0].text", "missing_required_parameter"),
    ({"documents": [{"text": "a", "pin": True}]}, "documents[0].pin", "unsupported_parameter"),
    ({"stop": {"a": 1}}, "stop", "invalid_value"),
]


@pytest.fixture(autouse=True)
def server_lives_on(http: httpx.Client, model: str) -> Any:
    yield
    # Another test's chat may have its next turn read still.
    until(lambda: http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0})
    assert http.post("/v1/completions", json=COMPLETION | {"model": model}).status_code == 200


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """By hand, as httpx refuses to write NaN, which other clients do write."""
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def assert_refused(response: httpx.Response, status: int, param: str | None, code: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param", "code"), BAD_COMPLETIONS)
def test_completions(
    http: httpx.Client, change: dict[str, Any], param: str | None, code: str | None, stream: bool
) -> None:
    if "stream_options" not in change:
        change = {"stream": stream} | change
    assert_refused(post(http, "/v1/completions", COMPLETION | change), 400, param, code)


@pytest.mark.parametrize(("change", "param", "code"), BAD_CHATS)
def test_chats(http: httpx.Client, change: dict[str, Any], param: str | None, code: str | None) -> None:
    assert_refused(post(http, "/v1/chat/completions", CHAT | change), 400, param, code)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 100_000]
)
def test_bodies_that_are_no_json_objects(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_one_bad_prompt_among_good_ones_refuses_all(http: httpx.Client) -> None:
    body = COMPLETION | {"prompt": [[5, 6], [7, 8], [10**9]], "max_tokens": 500}
    assert_refused(post(http, "/v1/completions", body), 400, "prompt", None)


def test_unknown_model(http: httpx.Client) -> None:
    assert_refused(post(http, "/v1/completions", COMPLETION | {"model": "gpt"}), 404, "model", "model_not_found")
    assert_refused(post(http, "/v1/chat/completions", CHAT | {"model": "gpt"}), 404, "model", "model_not_found")
    assert_refused(post(http, "/v1/completions", COMPLETION | {"model": "\ud800"}), 404, "model", "model_not_found")
    assert_refused(http.get("/v1/models/a/b"), 404, "model", "model_not_found")


def test_unknown_route_and_method(http: httpx.Client) -> None:
    assert_refused(http.post("/v1/nothing", json={}), 404, None, None)
    response = http.get("/v1/completions")
    assert_refused(response, 405, None, None)
    assert response.headers["allow"] == "POST"


def test_the_openai_client_raises_its_own_classes(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.completions.create(model=model, prompt="a", suffix="b")
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "suffix")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=model, prompt=[1] * 5000, stream=True)
    assert too_long.value.code == "context_length_exceeded"
