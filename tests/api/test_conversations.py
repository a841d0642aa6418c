"""Every turn of a conversation finds what was said before, the model's own answers included."""

from __future__ import annotations

import random
from typing import Any

import httpx
import openai
import pytest

from stemcache import Engine
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument, random_corpus

CHUNK = 64


def talk(client: openai.OpenAI, model: str, messages: list[Any], stream: bool, **fields: Any) -> tuple[str, Any]:
    """One turn: the answer's text and the usage."""
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.chat.completions.create(model=model, messages=messages, **options, **fields)
    if not stream:
        return answer.choices[0].message.content, answer.usage
    chunks = list(answer)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks[-1].usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_turn_finds_all_earlier_ones(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument], temperature: float, stream: bool
) -> None:
    """At temperature 1 the answers are such that their text is spelt in other tokens than those generated."""
    documents = [document.as_template_document() for document in corpus]
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM_PROMPT}]
    rng = random.Random(str((temperature, stream)))
    said = 0
    for turn in range(5):
        question = rng.choice(rng.choice(corpus).facts).question
        messages.append({"role": "user", "content": f"{rng.random()} {question}"})
        fields: dict[str, Any] = {"max_tokens": rng.choice([33, 64, 97]), "seed": turn, "temperature": temperature}
        text, usage = talk(client, model, messages, stream, extra_body={"documents": documents}, **fields)
        # What was said up to the last turn, as this turn spells it, but for less than one chunk.
        assert usage.prompt_tokens_details.cached_tokens > said - CHUNK
        messages.append({"role": "assistant", "content": text})
        said = len(engine.encode_chat(messages, documents=documents, add_generation_prompt=False))
    assert said > 5 * 33


def test_an_answer_in_its_own_tokens_is_found_without_further_reading(
    client: openai.OpenAI, model: str, engine: Engine, http: httpx.Client
) -> None:
    """Clients that go on with token ids find prompt and answer, but for the last token and less than one chunk."""
    prompt = engine.encode(f"{SYSTEM_PROMPT} {random_corpus(random.Random(77), 1)[0].text}")
    for turn in range(4):
        fields = {"max_tokens": 50, "ignore_eos": True, "return_token_ids": True, "seed": turn}
        answer = http.post("/v1/completions", json={"prompt": prompt, **fields}).json()
        if turn:
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= (said - 1) // CHUNK * CHUNK  # noqa: F821
        prompt = prompt + answer["choices"][0]["token_ids"]
        said = len(prompt)  # noqa: F841
        prompt += engine.encode(" And then?")


def test_the_answer_to_a_conversation_does_not_depend_on_what_is_cached(
    client: openai.OpenAI, model: str, engine: Engine
) -> None:
    messages: list[dict[str, str]] = [{"role": "user", "content": "Tell me of the seven towers."}]
    fields: dict[str, Any] = {"max_tokens": 40, "seed": 5, "temperature": 1.0}
    text, _ = talk(client, model, messages, False, **fields)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And the eighth?"}]
    warm, usage = talk(client, model, messages, False, **fields)
    from stemcache import SamplingParams

    ids = engine.encode_chat(messages)
    assert usage.prompt_tokens == len(ids)
    [cold] = engine.generate([ids], SamplingParams(max_tokens=40, seed=5))
    assert warm == cold.text
