"""The plugins' client of the document routes, against the real server; and what they say without their frameworks."""

from __future__ import annotations

import importlib
import pickle
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.ragcache.batches import batches
from stemcache.ragcache.errors import MissingExtraError, ServerAnswerError
from stemcache.ragcache.plugins.chat_fields import extra_body, template_document
from stemcache.ragcache.plugins.client import DocumentsClient, FoundPassage, without_title


@pytest.fixture
def documents(server: ServerProcess) -> Iterator[DocumentsClient]:
    client = DocumentsClient(f"{server.url}/v1")
    yield client
    for each in list(client.all()):
        client.delete(each["id"])
    client.close()


def test_documents_come_back(documents: DocumentsClient) -> None:
    """More than a page and more than a batch of them, with ids that URLs must escape."""
    given = [{"id": f"a/{n} ?&ü#%", "text": f"The code of tower {n} is {n}.", "metadata": {"n": n}} for n in range(130)]
    assert [each["status"] for each in documents.add(given)] == ["created"] * 130
    assert documents.count() == 130
    kept = sorted(documents.all(), key=lambda each: int(each["metadata"]["n"]))
    assert [{name: each[name] for name in ("id", "text", "metadata")} for each in kept] == given
    found = documents.search("What is the code of tower 77?", 3, {"n": [77, 78]})
    assert [each.document_id for each in found] == [given[77]["id"], given[78]["id"]]
    name = str(given[5]["id"])
    assert [documents.has(name), documents.delete(name), documents.delete(name), documents.has(name)] == [
        True,
        True,
        False,
        False,
    ]
    assert documents.search("What?", 1, {"n": 5}) == []


def test_passages_of_a_split_document_have_ids_of_their_own(documents: DocumentsClient) -> None:
    documents.add(
        [{"id": "long", "title": "T", "text": " ".join(f"The code of tower {n} is {n}." for n in range(300))}]
    )
    found = documents.search("What is the code of tower 5?", 100)
    assert len(found) > 2
    assert {each.id for each in found} == {"long", *(f"long#{n}" for n in range(1, len(found)))}
    assert found[0].metadata_with_title == {"title": "T"}


def test_refusals_and_silence(documents: DocumentsClient, server: ServerProcess) -> None:
    with pytest.raises(ServerAnswerError, match=r"the server refuses: k must be"):
        documents.search("What?", 0)
    with pytest.raises(ServerAnswerError, match="sent as JSON"):
        documents.add([{"text": "T", "metadata": {"a": float("nan")}}])
    with pytest.raises(ServerAnswerError, match="the document's text is empty"):
        documents.add([{"text": " "}])
    with pytest.raises(ServerAnswerError, match="stemcache serve"):
        DocumentsClient("http://127.0.0.1:9").count()  # which leaves no connection open


def test_a_server_of_another_kind() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Welcome</html>")

    with HTTPServer(("127.0.0.1", 0), Page) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        client = DocumentsClient(f"http://127.0.0.1:{other.server_port}")
        with pytest.raises(ServerAnswerError, match="no stemcache server"):
            client.count()
        client.close()
        other.shutdown()
        thread.join()


def test_batches_keep_within_their_limits() -> None:
    given = [{"text": "x" * length} for length in (3 << 20, 1, *[1 << 19] * 3, *[5] * 70)]
    made = list(batches(given))
    assert [each for batch in made for each in batch] == given
    for batch in made:
        assert len(batch) <= 32
        assert len(batch) == 1 or sum(len(each["text"]) for each in batch) <= 1 << 20
    assert list(batches([])) == []


def test_fields_of_a_chat() -> None:
    assert extra_body(None, None, None) == {}
    assert extra_body({"top_k": 1, "rag": {"k": 1}}, ["T"], {"k": 2}) == {
        "top_k": 1,
        "documents": ["T"],
        "rag": {"k": 2},
    }
    assert extra_body({}, [], None) == {"documents": []}
    assert template_document(7, "T") == {"title": "", "text": "T"}
    assert without_title({"title": "A", "n": 1}) == ("A", {"n": 1})
    assert without_title({"title": 7}) == ("", {"title": 7})
    passage = FoundPassage("d", 0, "", "T", {"n": 1}, 0.5)
    assert passage.metadata_with_title == {"n": 1}
    assert pickle.loads(pickle.dumps(passage)) == passage


@pytest.mark.parametrize(
    ("plugin", "library"), [("langchain", "langchain_core"), ("llamaindex", "llama_index"), ("haystack", "haystack")]
)
def test_a_missing_framework_is_named(plugin: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"stemcache.ragcache.plugins.{plugin}"
    for name in [each for each in sys.modules if each.split(".")[0] == library or each.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # what an import finds that must fail
    with pytest.raises(
        MissingExtraError, match=rf"{library}.* is not installed; run: pip install 'stemcache\[{plugin}\]'"
    ):
        importlib.import_module(package)
