"""The three embedders, each for real: a server of our own for the endpoint, a random small model for the library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from stemcache.ragcache.embedders import (
    EndpointEmbedder,
    HashingEmbedder,
    SentenceTransformerEmbedder,
    embedder_of,
)
from stemcache.ragcache.errors import EmbedderError

TEXTS = ["The bridge is closed in winter.", "A market is held every week.", "", "Bridges close."]


class Endpoint(BaseHTTPRequestHandler):
    """OpenAI's embeddings by the hashing embedder; `answer` makes it answer something else."""

    answer: tuple[int, bytes] | None = None
    seen: list[tuple[str, dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append((self.headers.get("Authorization", ""), body))
        vectors = 3 * HashingEmbedder(64).embed_documents(body["input"])
        data = [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]
        status, content = Endpoint.answer or (200, json.dumps({"data": data[::-1]}).encode())
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.answer, Endpoint.seen = None, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def check(embedder):
    vectors = embedder.embed_documents(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((4, embedder.dimensions), np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.allclose(lengths[[0, 1, 3]], 1, atol=1e-5)
    assert embedder.embed_documents([]).shape == (0, embedder.dimensions)
    question = embedder.embed_question(TEXTS[1])
    assert question.shape == (embedder.dimensions,)
    assert int(np.argmax(vectors @ question)) == 1
    return vectors


def test_hashing():
    vectors = check(HashingEmbedder())
    assert vectors[0] @ vectors[3] > vectors[1] @ vectors[3], "'bridges' is nearer to 'bridge' than to anything else"
    assert HashingEmbedder(64).name != HashingEmbedder().name


def test_endpoint(url):
    embedder = embedder_of(url, model="m", api_key="secret")
    vectors = check(embedder)
    assert np.allclose(vectors, HashingEmbedder(64).embed_documents(TEXTS), atol=1e-6)
    many = [f"text {i}" for i in range(150)]
    assert np.allclose(embedder.embed_documents(many), HashingEmbedder(64).embed_documents(many), atol=1e-6)
    assert max(len(body["input"]) for _, body in Endpoint.seen) == 64
    assert {key for key, _ in Endpoint.seen} == {"Bearer secret"}
    assert Endpoint.seen[0][1]["model"] == "m"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((401, b"bad key"), "refuses to embed .401.: bad key"),
        ((200, b"<html>"), "does not answer with OpenAI's embeddings"),
        ((200, b'{"data": [{"index": 0}]}'), "does not answer with OpenAI's embeddings"),
        ((200, b'{"data": []}'), "answers 1 texts with vectors of shape"),
        ((200, b'{"data": [{"index": 0, "embedding": [1, 2]}]}'), "vectors of shape .1, 2."),
        ((200, json.dumps({"data": [{"index": 0, "embedding": [1e999] * 64}]}).encode()), "numbers that are none"),
    ],
)
def test_an_endpoint_that_fails(url, answer, problem):
    embedder = EndpointEmbedder(url, "m")
    Endpoint.answer = answer
    with pytest.raises(EmbedderError, match=problem):
        embedder.embed_question("text")


def test_a_failing_endpoint_loses_nothing(url, cache_of):
    cache = cache_of(embedder=EndpointEmbedder(url, "m"))
    cache.add(["The first text."])
    Endpoint.answer = (500, b"broken")
    with pytest.raises(EmbedderError):
        cache.add(["The second text."])
    with pytest.raises(EmbedderError):
        cache.ask("first?")
    Endpoint.answer = None
    assert cache.count() == 1
    assert cache.retrieve("first?")[0].passage.text == "The first text."


def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers", reason="the extra 'embeddings' is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w.strip(".").lower() for t in TEXTS for w in t.split()}),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "."]))
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words) + 1, **sizes)).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    layer = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[layer, Pooling(32)], device="cpu").save(str(tmp_path / "model"))
    embedder = embedder_of(str(tmp_path / "model"))
    assert isinstance(embedder, SentenceTransformerEmbedder)
    assert np.allclose(check(embedder), embedder.embed_documents(TEXTS), atol=1e-6)
    with pytest.raises(EmbedderError, match="cannot be loaded"):
        SentenceTransformerEmbedder(str(tmp_path / "nothing"))
