"""POST /v1/completions through the openai client: shapes, forms of prompt, usage, answers equal to the engine's."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from stemcache import Engine, SamplingParams
from stemcache.engine.demo.facts import FactDocument

GREEDY = SamplingParams(max_tokens=24, temperature=0)


def complete(client: openai.OpenAI, model: str, prompt: Any, **fields: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, **({"temperature": 0, "max_tokens": 24} | fields))


def test_answer_is_the_engines(client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument]) -> None:
    answer = complete(client, model, corpus[0].text)
    [expected] = engine.generate([corpus[0].text], GREEDY)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason


def test_shape(http: httpx.Client, model: str) -> None:
    answer = http.post("/v1/completions", json={"model": model, "prompt": "The code", "max_tokens": 3}).json()
    assert answer.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == model
    assert answer["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    assert answer["choices"][0]["logprobs"] is None
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert isinstance(usage["prompt_tokens_details"]["cached_tokens"], int)


def test_every_form_of_prompt_gives_the_same(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument]
) -> None:
    texts = [document.text for document in corpus]
    ids = [engine.encode(text) for text in texts]
    expected = [completion.text for completion in engine.generate(texts, GREEDY)]
    assert [choice.text for choice in complete(client, model, texts).choices] == expected
    assert [choice.text for choice in complete(client, model, ids).choices] == expected
    assert complete(client, model, ids[1]).choices[0].text == expected[1]


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument]
) -> None:
    texts = [document.text for document in corpus]
    answer = complete(client, model, texts, n=2)
    expected = [completion.text for completion in engine.generate(texts, GREEDY) for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(len(engine.encode(text)) for text in texts)


def test_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str, corpus: list[FactDocument]) -> None:
    texts = [document.text for document in corpus]
    fields: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 5, "logprobs": 2}
    whole = complete(client, model, texts, **fields)
    streamed: dict[int, dict[str, Any]] = {i: {"text": "", "offsets": [], "reasons": []} for i in range(6)}
    ids = set()
    for chunk in complete(client, model, texts, stream=True, **fields):
        assert chunk.object == "text_completion"
        ids.add(chunk.id)
        [choice] = chunk.choices
        streamed[choice.index]["text"] += choice.text
        streamed[choice.index]["offsets"] += choice.logprobs.text_offset
        streamed[choice.index]["reasons"] += [choice.finish_reason] if choice.finish_reason else []
    assert len(ids) == 1
    for choice in whole.choices:
        assert streamed[choice.index] == {
            "text": choice.text,
            "offsets": choice.logprobs.text_offset,
            "reasons": [choice.finish_reason],
        }


def test_usage_of_a_stream_comes_last_and_alone(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "The", "max_tokens": 4, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert "cached_tokens" in chunks[-1]["usage"]["prompt_tokens_details"]


def test_a_prompt_read_before_is_cached(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument]
) -> None:
    text = " ".join(document.text for document in corpus)
    first, second = (complete(client, model, text).usage for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens == len(engine.encode(text))
    assert second.prompt_tokens_details.cached_tokens >= 64 > first.prompt_tokens_details.cached_tokens


def test_logprobs(client: openai.OpenAI, model: str, corpus: list[FactDocument]) -> None:
    choice = complete(client, model, corpus[0].text, logprobs=3, max_tokens=8, extra_body={"ignore_eos": True}).choices[
        0
    ]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values())  # greedy
        assert top[token] == logprob <= 0
        assert len(top) == 3


def test_text_offsets_point_at_the_tokens(client: openai.OpenAI, model: str, engine: Engine) -> None:
    special = [token for token in range(engine.vocab_size) if engine.prompts.token_text(token).startswith("<|")]
    bias = {str(token): -100 for token in special}
    choice = complete(client, model, "The code", logprobs=0, logit_bias=bias, seed=2, temperature=1).choices[0]
    assert len(choice.logprobs.tokens) == 24
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or token.startswith("bytes:")


def test_logprobs_of_zero_tell_the_chosen_token_only(client: openai.OpenAI, model: str) -> None:
    logprobs = complete(client, model, "The code", logprobs=0, max_tokens=4).choices[0].logprobs
    assert [list(top) for top in logprobs.top_logprobs] == [[token] for token in logprobs.tokens]


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_end_the_text(
    client: openai.OpenAI, model: str, corpus: list[FactDocument], as_list: bool
) -> None:
    whole = complete(client, model, corpus[0].text, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[8:12]
    choice = complete(
        client, model, corpus[0].text, stop=["\0never", stop] if as_list else stop, extra_body={"ignore_eos": True}
    ).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


def test_a_seed_repeats_and_another_does_not(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> str:
        return str(complete(client, model, "The code of", temperature=1.5, seed=seed, max_tokens=40).choices[0].text)

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_logit_bias_by_token_id(client: openai.OpenAI, model: str, engine: Engine) -> None:
    token = engine.encode("7")[0]
    answer = complete(client, model, "The code", logit_bias={str(token): 100}, max_tokens=5)
    assert answer.choices[0].text == "77777"


def test_vllm_extras(client: openai.OpenAI, model: str, engine: Engine) -> None:
    extras = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": []}
    [expected] = engine.generate(
        ["The code"], SamplingParams(max_tokens=20, temperature=0, repetition_penalty=1.2, ignore_eos=True)
    )
    answer = complete(client, model, "The code", temperature=1, max_tokens=20, extra_body=extras)
    assert answer.choices[0].text == expected.text


def test_fields_that_ask_for_nothing_are_accepted(http: httpx.Client, model: str) -> None:
    body = {
        "model": model,
        "prompt": "The code",
        "best_of": 1,
        "suffix": None,
        "echo": False,
        "logprobs": None,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
        "tools": None,
        "top_k": -1,
    }
    assert http.post("/v1/completions", json=body).status_code == 200
