"""vLLM's extra fields over HTTP: each one does what it says, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from stemcache import Engine, SamplingParams
from stemcache.api.answers import ChatAnswer, TextAnswer

MESSAGES = [{"role": "user", "content": "Hello?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The code", "max_tokens": 12, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 12, "temperature": 0},
}
BOTH = pytest.mark.parametrize("route", BODIES)


def ask(http: httpx.Client, route: str, **fields: Any) -> dict[str, Any]:
    response = http.post(route, json=BODIES[route] | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    (TextAnswer if route == "/v1/completions" else ChatAnswer).model_validate(answer)
    return answer


def stream(http: httpx.Client, route: str, **fields: Any) -> list[dict[str, Any]]:
    text = http.post(route, json=BODIES[route] | fields | {"stream": True}).text
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


def prompt_ids(engine: Engine, route: str) -> list[int]:
    return engine.encode("The code") if route == "/v1/completions" else engine.encode_chat(MESSAGES)


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@BOTH
def test_token_ids(http: httpx.Client, engine: Engine, route: str) -> None:
    answer = ask(http, route, return_token_ids=True, ignore_eos=True, n=2)
    prompt = prompt_ids(engine, route)
    [expected] = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    for choice in answer["choices"]:
        assert choice["token_ids"] == list(expected.token_ids)
        assert (choice if route == "/v1/completions" else answer)["prompt_token_ids"] == prompt
    chunks = stream(http, route, return_token_ids=True, ignore_eos=True, n=2)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [token for choice in choices for token in choice.get("token_ids", ())] == list(expected.token_ids)
    if route == "/v1/completions":
        assert [c["prompt_token_ids"] for chunk in chunks for c in chunk["choices"] if "prompt_token_ids" in c] == [
            prompt,
            prompt,
        ]
    else:
        assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [prompt]


@BOTH
def test_tokens_are_named_by_their_ids(http: httpx.Client, route: str) -> None:
    logprobs = {"logprobs": 2} if route == "/v1/completions" else {"logprobs": True, "top_logprobs": 2}
    answer = ask(http, route, return_tokens_as_token_ids=True, return_token_ids=True, **logprobs)
    choice = answer["choices"][0]
    expected = [f"token_id:{token}" for token in choice["token_ids"]]
    if route == "/v1/completions":
        assert choice["logprobs"]["tokens"] == expected
        assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
    else:
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == expected


@BOTH
def test_min_tokens_and_allowed_tokens(http: httpx.Client, engine: Engine, route: str) -> None:
    end = engine.encode("<|end|>")[0]
    bias = {"logit_bias": {str(end): 100}, "return_token_ids": True}
    assert ask(http, route, **bias)["choices"][0]["token_ids"] == [end]
    assert ask(http, route, min_tokens=5, **bias)["choices"][0]["token_ids"][5:] == [end]
    tokens = ask(http, route, allowed_token_ids=[300, 301], return_token_ids=True)["choices"][0]["token_ids"]
    assert set(tokens) <= {300, 301}


@BOTH
def test_special_tokens_and_stop_strings_can_be_shown(http: httpx.Client, engine: Engine, route: str) -> None:
    end = engine.encode("<|end|>")[0]
    fields: dict[str, Any] = {"logit_bias": {str(end): 100}, "ignore_eos": True, "max_tokens": 2}
    assert text_of(ask(http, route, **fields)["choices"][0]) == ""
    assert text_of(ask(http, route, skip_special_tokens=False, **fields)["choices"][0]) == "<|end|>" * 2
    fields = {"ignore_eos": True, "logit_bias": {str(end): -100}}
    whole = text_of(ask(http, route, **fields)["choices"][0])
    stop = whole[3:6]
    assert stop
    cut = text_of(ask(http, route, stop=stop, **fields)["choices"][0])
    kept = text_of(ask(http, route, stop=stop, include_stop_str_in_output=True, **fields)["choices"][0])
    assert kept == cut + stop


@BOTH
def test_bad_words_do_not_come(http: httpx.Client, engine: Engine, route: str) -> None:
    token = ask(http, route, return_token_ids=True, ignore_eos=True)["choices"][0]["token_ids"][0]
    word = engine.prompts.token_text(token)
    if engine.encode(word) != [token]:
        word = engine.prompts.token_text(engine.encode(word)[0])
    text = text_of(ask(http, route, ignore_eos=True, bad_words=[word])["choices"][0])
    assert not text.startswith(word) or engine.encode(text)[:1] != engine.encode(word)


@BOTH
def test_the_end_of_a_prompt_can_be_kept(http: httpx.Client, engine: Engine, route: str) -> None:
    answer = ask(http, route, truncate_prompt_tokens=2, return_token_ids=True)
    told = answer["choices"][0] if route == "/v1/completions" else answer
    assert told["prompt_token_ids"] == prompt_ids(engine, route)[-2:]
    assert answer["usage"]["prompt_tokens"] == 2


@BOTH
@pytest.mark.parametrize("last", [False, True])
def test_usage_in_every_chunk_is_of_what_was_told(http: httpx.Client, route: str, last: bool) -> None:
    options = {"include_usage": last, "continuous_usage_stats": True}
    chunks = stream(http, route, ignore_eos=True, stream_options=options, return_token_ids=True)
    told = 0
    for chunk in chunks:
        told += sum(len(choice.get("token_ids", ())) for choice in chunk["choices"])
        assert chunk["usage"]["completion_tokens"] in (told, told + 1)  # a chat's first chunk has the role alone
        assert chunk["usage"]["prompt_tokens"] == chunks[0]["usage"]["prompt_tokens"]
        assert chunk["usage"]["total_tokens"] == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert (chunks[-1]["choices"] == []) == last


def test_a_conversation_can_end_in_the_middle_of_an_answer(http: httpx.Client, engine: Engine) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The code is"}]
    answer = ask(http, "/v1/chat/completions", messages=messages, continue_final_message=True, return_token_ids=True)
    assert engine.decode(answer["prompt_token_ids"], skip_special_tokens=False).endswith("<|assistant|>The code is")
    plain = ask(http, "/v1/chat/completions", add_generation_prompt=False, return_token_ids=True)
    assert engine.decode(plain["prompt_token_ids"], skip_special_tokens=False).endswith("Hello?<|end|>")


def test_hints_about_caching_change_nothing(http: httpx.Client) -> None:
    part = {"type": "text", "text": "Hello?"}
    marks: list[dict[str, Any]] = [
        {},
        {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ]
    hints = {"prompt_cache_options": {"mode": "implicit", "ttl": "12h"}, "prompt_cache_key": "k"}
    texts = []
    for mark in marks:
        messages = [{"role": "user", "content": [part | mark]}]
        texts.append(text_of(ask(http, "/v1/chat/completions", messages=messages, **hints)["choices"][0]))
    assert len(set(texts)) == 1


@BOTH
def test_written_tokens_are_counted_once(http: httpx.Client, engine: Engine, route: str) -> None:
    text = f"Seven {route} towers " * 20
    body: dict[str, Any] = (
        {"prompt": text} if "chat" not in route else {"messages": [{"role": "user", "content": text}]}
    )
    first, second = (ask(http, route, **body)["usage"] for _ in range(2))
    details = first["prompt_tokens_details"]
    full = first["prompt_tokens"] // 64 * 64
    assert details["cached_tokens"] + details["cache_write_tokens"] == full > 64
    assert second["prompt_tokens_details"] == {"cached_tokens": first["prompt_tokens"] - 1, "cache_write_tokens": 0}


REFUSED: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("both", {"min_tokens": 13}, "min_tokens", None),
    ("both", {"allowed_token_ids": []}, "allowed_token_ids", None),
    ("both", {"allowed_token_ids": [10**6]}, "allowed_token_ids", None),
    ("both", {"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids", None),
    ("both", {"bad_words": [""]}, "bad_words", None),
    ("both", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
    ("both", {"prompt_logprobs": 21}, "prompt_logprobs", None),
    ("both", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", None),
    ("both", {"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options.mode", "unsupported_parameter"),
    ("both", {"prompt_cache_options": {"mode": "often"}}, "prompt_cache_options.mode", "invalid_value"),
    ("both", {"max_tokens": 0}, "max_tokens", None),
    ("text", {"best_of": 2, "stream": True}, "best_of", None),
    ("text", {"best_of": 1, "n": 2}, "best_of", None),
    ("text", {"best_of": 129}, "best_of", "invalid_value"),
    ("text", {"suffix": "end"}, "suffix", "unsupported_parameter"),
    ("chat", {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking", "unsupported_parameter"),
    ("chat", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "unsupported_parameter"),
    ("chat", {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", None),
    ("chat", {"chat_template": "{{ messages }}"}, "chat_template", "unsupported_parameter"),
    ("chat", {"echo": True}, "echo", "unsupported_parameter"),
    ("chat", {"best_of": 2}, "best_of", "unsupported_parameter"),
    ("chat", {"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
]


@pytest.mark.parametrize(("where", "change", "param", "code"), REFUSED)
def test_what_cannot_be_done_is_refused(
    http: httpx.Client, where: str, change: dict[str, Any], param: str, code: str | None
) -> None:
    routes = {"both": list(BODIES), "text": ["/v1/completions"], "chat": ["/v1/chat/completions"]}[where]
    for route in routes:
        response = http.post(route, json=BODIES[route] | change)
        assert response.status_code == 400, response.text
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)
