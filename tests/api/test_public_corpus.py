"""`serve --public-corpus`: found by every tenant, whose own prompts stay their own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import pytest
from forked import ForkedServer

from stemcache.api.public_corpus import PublicCorpusError, warm_public_corpus
from stemcache.engine.demo.facts import FactDocument, random_corpus
from stemcache.engine.engine import PUBLIC, Engine
from stemcache.engine.sampling import SamplingParams
from stemcache.prefixtree.explain import Reason

GREEDY = SamplingParams(max_tokens=8, temperature=0)
KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789ab"}


def body_of(corpus: list[FactDocument], question: str) -> dict[str, object]:
    documents = [document.as_template_document() for document in corpus]
    return {"messages": [{"role": "user", "content": question}], "documents": documents}


@pytest.fixture
def file(tmp_path: Path, corpus: list[FactDocument]) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [body_of(corpus, "?"), {"prompt": [7 + i % 300 for i in range(200)]}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_answers_are_the_same_and_nothing_private_is_shared(engine: Engine, file: Path, corpus) -> None:
    facts = [fact for document in corpus for fact in document.facts]
    prompts = [
        engine.encode_chat(body["messages"], documents=body["documents"])  # type: ignore[arg-type]
        for body in (body_of(corpus, fact.question) for fact in facts)
    ]

    def ask(prompt: list[int], tenant: bytes) -> tuple[list[int], int]:
        with engine.submit(prompt, GREEDY, tenant=tenant) as stream:
            return [token for delta in stream for token in delta.token_ids], stream.usage.cached_tokens

    alone = [ask(prompt, str(i).encode())[0] for i, prompt in enumerate(prompts)]
    public_tokens = warm_public_corpus(engine, file)
    assert public_tokens >= 200
    shared = len(engine.encode_chat([{"role": "user", "content": ""}], documents=body_of(corpus, "")["documents"]))  # type: ignore[arg-type]
    for tenant in (b"alice", b"bob"):
        told = engine.explain(prompts[0], tenant=tenant)
        assert told.tokens_of(Reason.PUBLIC) >= shared - 2 * engine.chunk_tokens
        for prompt, expected in zip(prompts, alone, strict=True):
            tokens, cached = ask(prompt, tenant)
            assert tokens == expected
            assert shared - 2 * engine.chunk_tokens <= cached <= shared + 8, "what a tenant asks, no other finds"
    engine.cache.clear(tenant=b"alice")
    assert engine.explain(prompts[0], tenant=b"alice").tokens_of(Reason.PUBLIC) > 0
    engine.check()
    for pin in engine.cache.pins(tenant=PUBLIC):
        engine.cache.unpin(pin.id, tenant=PUBLIC)
    engine.cache.clear(tenant=PUBLIC)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request"),
        ("{", "line 1: Invalid JSON"),
        ('{"prompt": [1, 2]}\n{"prompt": []}', "line 2: prompt: Value error"),
        ('{"prompt": [1, 2], "speed": 9}', "line 1: speed"),
        ('{"prompt": [99999999]}', "line 1: "),
        ('{"messages": [{"role": "user", "content": "?"}], "rag": {}}', "line 1: what is retrieved"),
        (
            '{"messages": [{"role": "user", "content": "?"}], "tool_choice": "required", '
            '"tools": [{"type": "function", "function": {"name": "f"}}]}',
            "line 1: This model's chat template has no place for tools",
        ),
    ],
)
def test_what_is_no_corpus_is_refused(engine: Engine, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    with pytest.raises(PublicCorpusError, match=message):
        warm_public_corpus(engine, path)


def test_two_keys_find_it_at_once(file: Path, tmp_path: Path, corpus: list[FactDocument]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    question = random_corpus(random.Random(1), 1)[0].facts[0].question
    with ForkedServer("--api-keys", str(keys), "--public-corpus", str(file), "--pool-bytes", "64MiB") as server:
        server.wait_until_ready()
        for key in KEYS.values():
            with httpx.Client(
                base_url=server.url, trust_env=False, timeout=60, headers={"Authorization": f"Bearer {key}"}
            ) as http:
                body = body_of(corpus, question)
                told = http.post("/v1/cache/explain", json=body).json()
                assert told["ranges"][0]["reason"] == "public"
                usage = http.post("/v1/chat/completions", json=body | {"max_tokens": 2}).json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] == told["cached_tokens"] >= 64
        assert "are cached for all tenants" in server.output()
