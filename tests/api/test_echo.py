"""`echo`, `logprobs` of the prompt, `prompt_logprobs` and `best_of` over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from stemcache import Engine
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


@torch.inference_mode()
def expected_logprobs(reference: Any, ids: list[int]) -> list[float]:
    logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
    return [float(logprobs[row, token]) for row, token in enumerate(ids[1:])]


def test_what_lm_eval_asks(client: openai.OpenAI, model: str, engine: Engine, corpus: Any, reference: Any) -> None:
    """Its local-completions task: token ids, echo, one log-probability and one token; cached or not."""
    ids = [engine.encode(document.text) for document in corpus]
    for _ in range(2):
        answer = client.completions.create(model=model, prompt=ids, echo=True, logprobs=1, max_tokens=1, seed=1234)
        for prompt, choice in zip(ids, answer.choices, strict=True):
            logprobs = choice.logprobs
            assert logprobs is not None
            assert logprobs.tokens is not None
            assert logprobs.token_logprobs is not None
            assert logprobs.top_logprobs is not None
            assert logprobs.token_logprobs[0] is None
            assert logprobs.top_logprobs[0] is None
            found = [logprob for logprob in logprobs.token_logprobs[1:] if logprob is not None]
            assert len(found) == len(prompt)  # the prompt but its first token, and the generated one
            assert found[:-1] == pytest.approx(expected_logprobs(reference, prompt), abs=1e-4)
            for logprob, top in zip(found, logprobs.top_logprobs[1:], strict=True):
                assert top is not None
                assert logprob <= max(top.values()) + 1e-6
            assert choice.text.startswith(engine.decode(prompt))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_the_echoed_text_stands_where_the_offsets_say(
    client: openai.OpenAI, model: str, engine: Engine, stream: bool, max_tokens: int
) -> None:
    prompt = "<|user|>The code — of é 12<|end|>"
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 2}
    fields |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model=model, stream=stream, **fields)
    chunks = list(answer) if stream else [answer]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        text = "".join(choice.text for choice in choices)
        lists = [choice.logprobs for choice in choices]
        tokens = [token for part in lists for token in part.tokens]
        offsets = [offset for part in lists for offset in part.text_offset]
        assert text.startswith(prompt)
        assert len(tokens) == len(engine.encode(prompt)) + max_tokens
        assert choices[-1].finish_reason == "length"
        for token, offset in zip(tokens[: len(engine.encode(prompt))], offsets, strict=False):
            assert text[offset:].startswith(token) or token.startswith("bytes:")


def test_echo_without_logprobs_and_without_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["one", "two"], echo=True, max_tokens=0)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("one", "length"), ("two", "length")]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_echoed_special_tokens_of_id_prompts_are_hidden_or_shown(http: httpx.Client, engine: Engine) -> None:
    ids = engine.encode("<|user|>Hi<|end|>")
    body = {"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 0}
    hidden = http.post("/v1/completions", json=body).json()["choices"][0]
    assert hidden["text"] == "Hi"
    assert hidden["logprobs"]["text_offset"][-1] == len("Hi")
    shown = http.post("/v1/completions", json=body | {"skip_special_tokens": False}).json()["choices"][0]
    assert shown["text"] == "<|user|>Hi<|end|>"
    assert shown["logprobs"]["text_offset"][-1] == len("<|user|>Hi")


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_prompt_logprobs(http: httpx.Client, engine: Engine, reference: Any, route: str) -> None:
    messages = [{"role": "user", "content": "Hello?"}]
    given: dict[str, Any] = {"prompt": "Hello there, code"} if route == "completions" else {"messages": messages}
    body = given | {"prompt_logprobs": 2, "return_token_ids": True, "max_tokens": 2}
    answer = http.post(f"/v1/{route}", json=body).json()
    told = answer["choices"][0] if route == "completions" else answer
    ids = told["prompt_token_ids"]
    assert ids == (engine.encode(given["prompt"]) if route == "completions" else engine.encode_chat(messages))
    logprobs = told["prompt_logprobs"]
    assert logprobs[0] is None
    found = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], logprobs[1:], strict=True)]
    assert found == pytest.approx(expected_logprobs(reference, ids), abs=1e-4)
    for token, entry in zip(ids[1:], logprobs[1:], strict=True):
        assert {1, 2} <= {each["rank"] for each in entry.values()}
        assert entry[str(token)]["decoded_token"] == engine.prompts.token_text(token)
        assert entry[str(token)]["rank"] >= 1


def test_best_of_returns_the_likeliest(http: httpx.Client, corpus: list[FactDocument]) -> None:
    body = {"prompt": [document.text for document in corpus[:2]], "max_tokens": 6, "seed": 3, "logprobs": 0}
    everything = http.post("/v1/completions", json=body | {"n": 5}).json()
    best = http.post("/v1/completions", json=body | {"n": 2, "best_of": 5}).json()
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values)) / len(values)

    for prompt in range(2):
        ranked = sorted(map(mean, everything["choices"][prompt * 5 : prompt * 5 + 5]), reverse=True)
        got = [mean(choice) for choice in best["choices"][prompt * 2 : prompt * 2 + 2]]
        assert got == pytest.approx(ranked[:2], abs=1e-4)
    assert best["usage"]["completion_tokens"] == everything["usage"]["completion_tokens"]
    without = http.post("/v1/completions", json=body | {"best_of": 5, "logprobs": None}).json()
    assert [choice["logprobs"] for choice in without["choices"]] == [None, None]
    assert [choice["text"] for choice in without["choices"]] == [best["choices"][i]["text"] for i in (0, 2)]


def test_an_echo_is_one_chunk_before_the_others(http: httpx.Client) -> None:
    body = {"prompt": "The code", "echo": True, "max_tokens": 3, "stream": True, "ignore_eos": True}
    lines = http.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert (chunks[0]["text"], chunks[0]["finish_reason"]) == ("The code", None)
