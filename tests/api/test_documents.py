"""Documents over HTTP: added, retrieved, reported and deleted, on real servers with two tenants and a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
from forked import ForkedServer
from waiting import until

from stemcache.api.answers import ChatAnswer, ErrorAnswer
from stemcache.api.cache_answers import CacheStatistics
from stemcache.api.cli import _parser, main
from stemcache.api.document_answers import (
    ChangedDocument,
    ChangedDocuments,
    DeletedDocument,
    DeletedDocuments,
    DocumentAnswer,
    DocumentList,
    FoundPassages,
)
from stemcache.api.document_service import open_documents
from stemcache.api.server_process import ServerProcess
from stemcache.api.settings import Settings
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.engine import Engine
from stemcache.prefixtree.errors import StemcacheError
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.errors import ServerAnswerError
from stemcache.ragcache.plugins.client import DocumentsClient

ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32
FACTS = random_corpus(Random(77), 12)
DOCUMENTS = [{"id": f.title, "title": f.title, "text": f.text, "metadata": {"n": i}} for i, f in enumerate(FACTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def started(folder: Path) -> ServerProcess:
    keys = folder / "keys"
    keys.write_text(f"alice {ALICE}\nbob {BOB}\n")
    keys.chmod(0o600)
    options = ("--dtype", "float32", "--pool-bytes", "16MiB", "--chunk-tokens", "16", "--show-cache-text")
    more = ("--api-keys", str(keys), "--documents", str(folder / "store"), "--max-documents", "50")
    return ForkedServer(*options, *more)


@pytest.fixture(scope="module")
def tenants(folder: Path) -> Iterator[ServerProcess]:
    with started(folder) as process:
        process.wait_until_ready()
        yield process


def client_of(server: ServerProcess, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60)


@pytest.fixture
def alice(tenants: ServerProcess) -> Iterator[httpx.Client]:
    """A client with no documents and an empty cache."""
    with client_of(tenants, ALICE) as client:
        client.post("/v1/cache/clear").raise_for_status()
        yield client
        names = [each["id"] for each in client.get("/v1/documents").json()["data"]]
        if names:
            client.delete("/v1/documents", params={"id": names}).raise_for_status()


@pytest.fixture
def bob(tenants: ServerProcess) -> Iterator[httpx.Client]:
    with client_of(tenants, BOB) as client:
        yield client


def add(client: httpx.Client, documents: list[dict[str, Any]]) -> ChangedDocuments:
    response = client.post("/v1/documents", json={"documents": documents})
    assert response.status_code == 200, response.text
    return ChangedDocuments.model_validate(response.json())


def chat(client: httpx.Client, question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, "return_token_ids": True} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    ChatAnswer.model_validate(response.json())
    answer: dict[str, Any] = response.json()
    return answer


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return ErrorAnswer.model_validate(response.json()).error.model_dump()


def cached_text(client: httpx.Client) -> str:
    nodes = client.get("/v1/cache/tree", params={"text": True, "max_nodes": 5000}).json()["nodes"]
    return " ".join(node["text"] for node in nodes)


def test_life_of_documents(alice: httpx.Client) -> None:
    created = add(alice, DOCUMENTS)
    assert [each.status for each in created.data] == ["created"] * 12
    assert [each.status for each in add(alice, DOCUMENTS[:2]).data] == ["unchanged"] * 2
    page = DocumentList.model_validate(alice.get("/v1/documents", params={"limit": 5}).json())
    assert (len(page.data), page.has_more, page.total) == (5, True, 12)
    after = {"limit": 1000, "after": page.data[-1].id}
    rest = DocumentList.model_validate(alice.get("/v1/documents", params=after).json())
    assert sorted(each.id for each in (*page.data, *rest.data)) == sorted(each["id"] for each in DOCUMENTS)
    name = DOCUMENTS[0]["id"]
    got = DocumentAnswer.model_validate(alice.get(f"/v1/documents/{name}").json())
    assert (got.text, got.title, got.metadata, got.version) == (DOCUMENTS[0]["text"], name, {"n": 0}, 1)
    put = alice.put(f"/v1/documents/{name}", json={"text": "Another text.", "ttl_seconds": 100}).json()
    changed = ChangedDocument.model_validate(put)
    assert (changed.status, changed.version, changed.metadata) == ("updated", 2, {})
    assert changed.expires_at == pytest.approx(changed.updated_at + 100, abs=1)
    gone = DeletedDocument.model_validate(alice.delete(f"/v1/documents/{name}").json())
    assert (gone.id, gone.deleted, gone.forgotten_chunks) == (name, True, 0)
    assert refusal(alice.get(f"/v1/documents/{name}"), 404)["code"] == "document_not_found"
    names = [each["id"] for each in DOCUMENTS[1:4]]
    refusal(alice.delete("/v1/documents", params={"id": [*names, name]}), 404)
    assert alice.get("/v1/documents").json()["total"] == 11, "none of them was deleted"
    several = DeletedDocuments.model_validate(alice.delete("/v1/documents", params={"id": names}).json())
    assert [each.id for each in several.data] == names
    path = "folder/a file & more?.txt"
    assert alice.put(f"/v1/documents/{path.replace('?', '%3F')}", json={"text": "T"}).json()["id"] == path


def test_answers_with_retrieval_are_those_with_the_same_documents(alice: httpx.Client, bob: httpx.Client) -> None:
    add(alice, DOCUMENTS)
    for index, fields in ((0, {}), (1, {"order": "cache"}), (0, {"order": "cache", "k": 2}), (1, {"explain": True})):
        question = FACTS[index].facts[0].question
        mine = chat(alice, question, rag=fields)
        used = mine["rag"]["documents"]
        assert used[0]["id"] == DOCUMENTS[index]["id"] or fields.get("order") == "cache"
        given = [{"title": each["title"], "text": FACTS[_number(each["id"])].text} for each in used]
        theirs = chat(bob, question, documents=given)
        assert theirs["prompt_token_ids"] == mine["prompt_token_ids"]
        assert theirs["choices"][0]["message"] == mine["choices"][0]["message"]
        assert "rag" not in theirs
    assert sum(each["tokens"] for each in used) < mine["usage"]["prompt_tokens"]


def _number(document_id: str) -> int:
    return [each["id"] for each in DOCUMENTS].index(document_id)


def test_what_was_reused_is_told(alice: httpx.Client, tenants: ServerProcess) -> None:
    add(alice, DOCUMENTS)
    question = FACTS[2].facts[0].question
    assert {each["reuse"] for each in chat(alice, question, rag={})["rag"]["documents"]} == {"none"}
    again = chat(alice, question, rag={"explain": True})
    assert {each["reuse"] for each in again["rag"]["documents"]} == {"all"}
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < sum(each["cached_tokens"] for each in again["rag"]["documents"]) < cached
    # A stream says it in its first chunk, which the openai package hands on.
    messages: Any = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{tenants.url}/v1", api_key=ALICE, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="stemcache-demo", messages=messages, stream=True, max_tokens=4, extra_body={"rag": {"k": 2}}
        )
        chunks = list(stream)
    told: Any = chunks[0].model_extra
    assert [each["reuse"] for each in told["rag"]["documents"]] == ["all", "all"]
    assert all("rag" not in (chunk.model_extra or {}) for chunk in chunks[1:])
    # Documents that the caller brings are told of too, if 'rag' is there.
    stranger = {"title": "T", "text": "Nobody knows this text."}
    known = {name: DOCUMENTS[2][name] for name in ("title", "text")}
    told = chat(alice, question, documents=[known, stranger], rag={"order": "relevance"})["rag"]["documents"]
    assert [each["id"] for each in told] == [DOCUMENTS[2]["id"], None]


def test_the_statistics_tell_of_each_document(alice: httpx.Client, bob: httpx.Client) -> None:
    add(alice, DOCUMENTS)
    expected: dict[str, tuple[int, int, int]] = {}
    for ask in range(3):
        for each in chat(alice, FACTS[ask % 2].facts[0].question, rag={"k": 3})["rag"]["documents"]:
            requests, hits, tokens = expected.get(each["id"], (0, 0, 0))
            expected[each["id"]] = (requests + 1, hits + each["cached_tokens"], tokens + each["tokens"])
    stats = CacheStatistics.model_validate(alice.get("/v1/cache/stats").json())
    told = {each.id: each for each in stats.tenant.documents}
    assert {
        name: (each.requests, each.hit_tokens, each.hit_tokens + each.miss_tokens) for name, each in told.items()
    } == (expected)
    for each in told.values():
        cached = each.tiers["device"]
        assert sum(each.misses.model_dump().values()) == each.miss_tokens
        assert 0 < cached.tokens.cached <= each.requests * each.tokens
        assert cached.bytes.cached == cached.tokens.cached * stats.bytes_per_token
    assert len(alice.get("/v1/cache/stats", params={"documents": 1}).json()["tenant"]["documents"]) == 1
    assert alice.get("/v1/cache/stats", params={"cache_salt": "x"}).json()["tenant"]["documents"] == []
    assert bob.get("/v1/cache/stats").json()["tenant"]["documents"] == []
    alice.delete(f"/v1/documents/{stats.tenant.documents[0].id}").raise_for_status()
    left = alice.get("/v1/cache/stats").json()["tenant"]["documents"]
    assert [each["id"] for each in left] == [each.id for each in stats.tenant.documents[1:]]


def test_filters_and_few_documents(alice: httpx.Client) -> None:
    add(alice, DOCUMENTS)
    told = chat(alice, "What?", rag={"k": 9, "filter": {"n": [3, 5]}})["rag"]
    assert sorted(_number(each["id"]) for each in told["documents"]) == [3, 5]
    assert told["notes"] == ["9 passages were asked for, and there are only 2"]
    other = chat(alice, "What is it?", rag={"k": 1, "query": FACTS[4].facts[0].question})["rag"]["documents"]
    assert other[0]["id"] == DOCUMENTS[4]["id"]


def test_deleting_empties_the_cache_of_it(alice: httpx.Client) -> None:
    add(alice, DOCUMENTS)
    question, name = FACTS[0].facts[0].question, DOCUMENTS[0]["id"]
    chat(alice, question, rag={})
    chat(alice, question, rag={}, cache_salt="another")
    chat(alice, question, documents=[{"title": name, "text": DOCUMENTS[0]["text"]}])
    messages = [{"role": "user", "content": question}]
    warm = alice.post("/v1/cache/warm", json={"messages": messages, "rag": {"k": 1}})
    assert warm.status_code == 200, warm.text
    assert name in cached_text(alice)
    gone = alice.delete(f"/v1/documents/{name}").json()
    assert gone["forgotten_chunks"] > 8
    assert name not in cached_text(alice)
    assert name not in [each["id"] for each in chat(alice, question, rag={})["rag"]["documents"]]
    assert name not in cached_text(alice)


def test_pinned(alice: httpx.Client) -> None:
    question, name = FACTS[6].facts[0].question, DOCUMENTS[6]["id"]
    (added,) = add(alice, [DOCUMENTS[6] | {"pinned": True, "system_prompt": SYSTEM_PROMPT}]).data
    assert (added.pinned, added.system_prompt) == (True, SYSTEM_PROMPT)
    add(alice, [DOCUMENTS[7]])
    alice.post("/v1/cache/clear").raise_for_status()
    assert len(alice.get("/v1/cache/pin").json()["data"]) == 1
    (told,) = chat(alice, question, rag={"k": 1})["rag"]["documents"]
    assert told["cached_tokens"] > told["tokens"] - 16, "all but an unfinished chunk"
    fields = {each: DOCUMENTS[6][each] for each in ("title", "text", "metadata")}
    assert alice.put(f"/v1/documents/{name}", json=fields).json()["pinned"] is False
    assert alice.get("/v1/cache/pin").json()["data"] == []
    bad = {"documents": [DOCUMENTS[6] | {"system_prompt": "S"}]}
    assert refusal(alice.post("/v1/documents", json=bad))["param"] == "documents[0].system_prompt"


def test_what_users_run_into(alice: httpx.Client, bob: httpx.Client) -> None:
    add(alice, DOCUMENTS[:3])
    question = FACTS[0].facts[0].question
    # A date at the front.
    for day, advised in (("20", False), ("21", True)):
        messages = [{"role": "system", "content": f"Today is 2026-11-{day}. {SYSTEM_PROMPT}"}]
        messages.append({"role": "user", "content": question})
        told = chat(alice, question, messages=messages, rag={"k": 2, "explain": True})["rag"]
        assert any("such as a date, after the documents" in note for note in told["notes"]) is advised
    # More passages than there are.
    assert chat(alice, question, rag={"k": 50})["rag"]["notes"] == ["50 passages were asked for, and there are only 3"]
    # Two tenants with the same document: one deletes it, and the other's is as it was.
    add(bob, DOCUMENTS[:3])
    for client in (alice, bob, alice, bob):
        reused = {each["reuse"] for each in chat(client, question, rag={"k": 1})["rag"]["documents"]}
    alice.delete(f"/v1/documents/{DOCUMENTS[0]['id']}").raise_for_status()
    (told,) = chat(bob, question, rag={"k": 1})["rag"]["documents"]
    assert (told["id"], {told["reuse"]}, reused) == (DOCUMENTS[0]["id"], {"all"}, {"all"})
    bob.delete("/v1/documents", params={"id": [each["id"] for each in DOCUMENTS[:3]]}).raise_for_status()
    # A document that is longer than the context, whole and as the passages that it is split into.
    book = "\n\n".join(f"{each.title}\n{each.text}" for each in random_corpus(Random(78), 60)) + "\n\n" + FACTS[5].text
    given = {"messages": [{"role": "user", "content": question}], "documents": [{"title": "", "text": book}]}
    error = refusal(alice.post("/v1/chat/completions", json=given | {"max_tokens": 8}))
    assert error["code"] == "context_length_exceeded"
    (added,) = add(alice, [{"id": "book", "text": book}]).data
    assert added.passages > 5
    used = chat(alice, FACTS[5].facts[0].question, rag={"k": 2})["rag"]["documents"]
    assert {each["id"] for each in used} == {"book"}


def test_another_tenant_has_nothing_to_do_with_it(alice: httpx.Client, bob: httpx.Client) -> None:
    add(alice, DOCUMENTS[:3])
    name = DOCUMENTS[0]["id"]
    assert bob.get("/v1/documents").json() == {"object": "list", "data": [], "has_more": False, "total": 0}
    refusal(bob.get(f"/v1/documents/{name}"), 404)
    refusal(bob.delete(f"/v1/documents/{name}"), 404)
    body = {"messages": [{"role": "user", "content": "What?"}], "rag": {}}
    assert refusal(bob.post("/v1/chat/completions", json=body))["code"] == "no_documents"
    assert alice.get("/v1/documents").json()["total"] == 3


@pytest.mark.parametrize(
    ("rag", "more", "param"),
    [
        ({"k": 0}, {}, "rag.k"),
        ({"k": 1000}, {}, "rag.k"),
        ({"k": "4"}, {}, "rag.k"),
        ({"order": "id"}, {}, "rag.order"),
        ({"reuse": "blend"}, {}, "rag.reuse"),
        ({"colour": 1}, {}, "rag.colour"),
        ({"filter": {"a": {}}}, {}, "rag.filter.a"),
        ({"k": 2}, {"documents": ["Text."]}, "rag.k"),
        ({"filter": {"a": 1}}, {"documents": ["Text."]}, "rag.filter"),
        ({}, {"truncate_prompt_tokens": 20}, "truncate_prompt_tokens"),
        ({}, {"messages": [{"role": "system", "content": "S"}]}, "rag"),
        ({}, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_bad_wishes(alice: httpx.Client, rag: dict[str, Any], more: dict[str, Any], param: str) -> None:
    add(alice, DOCUMENTS[:2])
    body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2, "rag": rag} | more
    error = refusal(alice.post("/v1/chat/completions", json=body))
    assert str(error["param"]).startswith(param), error


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"text": " "}, "documents[0].text"),
        ({"title": "T"}, "documents[0].text"),
        ({"text": "T", "id": "a//b"}, "documents[0].id"),
        ({"text": "T", "metadata": {"a": "b" * 9000}}, "documents[0].metadata.a"),
        ({"text": "T", "metadata": {"a": {"b": ["c" * 9000]}}}, "documents[0].metadata.a"),
        ({"text": "T", "ttl_seconds": 0}, "documents[0].ttl_seconds"),
        ({"text": "T", "colour": 1}, "documents[0].colour"),
    ],
)
def test_bad_documents(alice: httpx.Client, document: dict[str, Any], param: str) -> None:
    error = refusal(alice.post("/v1/documents", json={"documents": [document]}))
    assert str(error["param"]).startswith(param), error
    assert alice.get("/v1/documents").json()["total"] == 0


@pytest.mark.parametrize(
    "metadata", ['{"a": NaN}', '{"a": {"b": 1e999}}', r'{"a": ["\ud800"]}', '{"a": ' + "[" * 17 + "]" * 17 + "}"]
)
def test_metadata_that_could_not_be_read_back(alice: httpx.Client, metadata: str) -> None:
    body = f'{{"documents": [{{"text": "T", "metadata": {metadata}}}]}}'
    response = alice.post("/v1/documents", content=body, headers={"Content-Type": "application/json"})
    assert str(refusal(response)["param"]).startswith("documents[0].metadata.a")


def test_metadata_is_what_it_was(alice: httpx.Client) -> None:
    metadata = {"n": 1, "of": None, "pages": [1, 2.5, {"at": ["ü", True]}], "deep": json.loads("[" * 16 + "]" * 16)}
    add(alice, [{"id": "a", "text": "T", "metadata": metadata}, {"id": "b", "text": "U", "metadata": {"n": [1]}}])
    assert alice.get("/v1/documents/a").json()["metadata"] == metadata
    assert [each.status for each in add(alice, [{"id": "a", "text": "T", "metadata": metadata}]).data] == ["unchanged"]
    assert [each.id for each in search(alice, "T", filter={"n": 1}).data] == ["a"]


def search(client: httpx.Client, query: str, **fields: Any) -> FoundPassages:
    response = client.post("/v1/search", json={"query": query} | fields)
    assert response.status_code == 200, response.text
    return FoundPassages.model_validate(response.json())


def test_search_finds_what_chats_retrieve(alice: httpx.Client, bob: httpx.Client) -> None:
    add(alice, DOCUMENTS)
    for index, fields in ((0, {}), (1, {"k": 2}), (2, {"k": 5, "filter": {"n": [1, 2, 3]}})):
        question = FACTS[index].facts[0].question
        found = search(alice, question, **fields)
        retrieved = chat(alice, question, rag=fields)["rag"]["documents"]
        told = [(each.id, each.passage, each.version, each.title, each.score) for each in found.data]
        assert told == [
            tuple(each[name] for name in ("id", "passage", "version", "title", "score")) for each in retrieved
        ]
        assert found.data[0].id == DOCUMENTS[index]["id"]
        assert found.data[0].text == DOCUMENTS[index]["text"]
        assert found.data[0].metadata == {"n": index}
        assert not found.notes
    for nothing, why in ((search(bob, "What?"), "add some first"), (search(alice, "What?", filter={"n": 99}), "widen")):
        assert not nothing.data
        assert why in nothing.notes[0]
    assert refusal(alice.post("/v1/search", json={"query": "What?", "k": 0}))["param"] == "k"
    assert refusal(alice.post("/v1/search", json={"k": 1}))["param"] == "query"


def test_the_plugins_client_has_a_key(alice: httpx.Client, tenants: ServerProcess) -> None:
    add(alice, DOCUMENTS[:3])
    for key, count in ((ALICE, 3), (BOB, 0)):
        with closing(DocumentsClient(tenants.url, key)) as client:
            assert client.count() == count
    with closing(DocumentsClient(tenants.url)) as client:
        with pytest.raises(ServerAnswerError, match="the server refuses") as refused:
            client.count()
        assert refused.value.code == "invalid_api_key"


def test_a_list_has_texts_if_asked(alice: httpx.Client) -> None:
    add(alice, DOCUMENTS[:3])
    page = alice.get("/v1/documents", params={"text": True, "limit": 2}).json()
    assert [each["text"] for each in page["data"]] == [
        alice.get(f"/v1/documents/{each['id']}").json()["text"] for each in page["data"]
    ]
    assert "text" not in alice.get("/v1/documents").json()["data"][0]


def test_there_is_a_limit(alice: httpx.Client) -> None:
    many = [{"text": f"Text {i}."} for i in range(51)]
    assert refusal(alice.post("/v1/documents", json={"documents": many}))["code"] == "document_limit_exceeded"
    add(alice, many[:50])
    add(alice, many[:50])  # they are there already
    assert refusal(alice.put("/v1/documents/one", json={"text": "T"}))["code"] == "document_limit_exceeded"


def test_the_command_line(
    tenants: ServerProcess, alice: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("STEMCACHE_API_KEY", ALICE)
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("The code of Abc is 12.")
    lines = [{"id": f"l{i}", "text": f"Line {i}."} for i in range(70)]
    Path("many.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:40]))
    url = ["--url", tenants.url]
    assert main(["documents", "add", "one.txt", "many.jsonl", "--metadata", "lang=en", "--ttl", "500", *url]) == 0
    assert capsys.readouterr().out == "41 created, 0 updated, 0 unchanged\n"
    one = alice.get("/v1/documents/one.txt").json()
    assert (one["title"], one["metadata"]) == ("one", {"lang": "en"})
    assert one["expires_at"] is not None
    assert main(["documents", "list", *url]) == 0
    told = capsys.readouterr().out
    assert "one.txt" in told
    assert "41 documents" in told
    assert main(["documents", "delete", "one.txt", "l3", *url]) == 0
    assert capsys.readouterr().out.count("deleted") == 2
    assert main(["documents", "delete", "one.txt", *url]) == 2
    assert "no document 'one.txt'" in capsys.readouterr().err
    Path("bad.jsonl").write_text('{"text": "T"}\n{"title": "T"}')
    assert main(["documents", "add", "bad.jsonl", *url]) == 2
    assert "line 2" in capsys.readouterr().err
    Path("binary").write_bytes(b"\xff\xfe")
    assert main(["documents", "add", "binary", *url]) == 2
    assert "no UTF-8" in capsys.readouterr().err


def test_the_options_of_serve(engine: Engine, tmp_path: Path) -> None:
    settings = Settings.read({"STEMCACHE_SECRET": "s"})

    def opened(*options: str) -> AbstractContextManager[ContextCache | None]:
        return open_documents(_parser().parse_args(["serve", *options]), settings, engine)

    with opened("--documents", str(tmp_path / "a"), "--index", "hnsw", "--passage-tokens", "20") as documents:
        assert documents is not None
        assert documents._speculates
        (change,) = documents.add(["The code of Velmora is 7392. " * 10])
        assert change.record.passages > 5
    with opened("--no-speculation") as documents:
        assert documents is not None
        assert not documents._speculates
    for bad, problem in (
        (("--embedder", "http://127.0.0.1:9/v1", "--embedding-model", "m"), "cannot be asked for embeddings"),
        (("--embedder", "http://127.0.0.1:9/v1"), "--embedding-model NAME"),
        (("--embedder", str(tmp_path / "nothing")), "cannot be loaded|not installed"),
        (("--documents", str(Path(__file__) / "a")), "cannot be made"),
    ):
        with pytest.raises(StemcacheError, match=problem):
            opened(*bad)


def test_documents_survive_a_restart(folder: Path, tenants: ServerProcess) -> None:
    """Also where the server's secret, and with it the tenants' ids, are others. The last test: it ends the server."""
    with client_of(tenants, ALICE) as client:
        add(client, [DOCUMENTS[0] | {"pinned": True, "system_prompt": SYSTEM_PROMPT}, *DOCUMENTS[1:3]])
        client.delete(f"/v1/documents/{DOCUMENTS[2]['id']}").raise_for_status()
    tenants.stop()
    with started(folder) as later, client_of(later, ALICE) as client:
        later.wait_until_ready()
        assert client.get("/v1/documents").json()["total"] == 2
        until(lambda: client.get("/v1/cache/pin").json()["data"])
        told = chat(client, FACTS[0].facts[0].question, rag={"k": 1})["rag"]["documents"]
        assert told[0]["id"] == DOCUMENTS[0]["id"]
        assert told[0]["cached_tokens"] > 0, "it was pinned, and is so again"
        assert list((folder / "store").glob("*.sqlite"))
