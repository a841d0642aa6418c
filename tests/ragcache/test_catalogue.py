"""The catalogue: what survives a restart or a crash, what is refused, and random changes against a model."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from random import Random

import numpy as np
import pytest

from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.catalogue import Catalogue
from stemcache.ragcache.documents import Document
from stemcache.ragcache.embedders import HashingEmbedder
from stemcache.ragcache.errors import CatalogueError, DocumentNotFoundError, EmbedderError
from stemcache.ragcache.library import Library
from stemcache.ragcache.splitter import Splitter


def mark(n):
    return Footprint(bytes([n]) * 32, bytes([n]) * 32, n, bytes([n]) * 4)


def put(catalogue, owner, document, passages=("p",)):
    return catalogue.put(owner, document, passages, np.ones((len(passages), 2), np.float32))


def test_random_changes_against_a_dictionary(tmp_path):
    random, model = Random(4), {}
    catalogue = Catalogue(tmp_path / "c.sqlite")
    for turn in range(300):
        owner, name = random.choice("ab"), f"d{random.randrange(8)}"
        if random.random() < 0.7:
            document = Document(id=name, text=random.choice("xyz"), metadata={"m": random.randrange(2)})
            passages = [f"{document.text}{i}" for i in range(random.randint(1, 3))]
            stored = put(catalogue, owner, document, passages)
            old = model.get((owner, name))
            same = old is not None and old[0].text == document.text
            status = "created" if old is None else "unchanged" if old[0] == document else "updated"
            assert stored.status == status
            assert (bool(stored.added), bool(stored.removed)) == (not same, old is not None and not same)
            model[owner, name] = (document, old[1] if same else passages)
        elif (owner, name) in model:
            assert len(catalogue.delete(owner, name)) == len(model.pop((owner, name))[1])
        else:
            with pytest.raises(DocumentNotFoundError):
                catalogue.delete(owner, name)
        if turn % 60 == 59:
            catalogue.close()
            catalogue = Catalogue(tmp_path / "c.sqlite")
    for owner in "ab":
        own = {name: value for (whose, name), value in model.items() if whose == owner}
        assert {record.id: record.document for record in catalogue.records(owner)} == {n: v[0] for n, v in own.items()}
        assert {n: [p.text for p in catalogue.passages_of(owner, n)] for n in own} == {n: v[1] for n, v in own.items()}
        keys, vectors = catalogue.vectors(owner, 2)
        assert len(keys) == len(vectors) == sum(len(value[1]) for value in own.values())
        for wanted in (0, 1):
            found = catalogue.passages(owner, catalogue.keys_where(owner, {"m": wanted}))
            assert {p.document_id for p in found} == {n for n, v in own.items() if v[0].metadata["m"] == wanted}
    catalogue.close()


def test_filters_know_types_and_strange_names():
    catalogue = Catalogue()
    for name, value in {"int": 1, "float": 1.0, "true": True, "text": "1", "other": 2}.items():
        put(catalogue, "o", Document(id=name, text="t", metadata={'a "b".c': value, "lang": "en"}))

    def found(**where):
        keys = catalogue.keys_where("o", {'a "b".c' if name == "a" else name: value for name, value in where.items()})
        return {passage.document_id for passage in catalogue.passages("o", keys)}

    assert found(a=1) == {"int", "float"}
    assert found(a=True) == {"true"}
    assert found(a="1") == {"text"}
    assert found(a=["1", 2]) == {"text", "other"}
    assert found(a=[]) == found(lang="de") == found(nothing=1) == set()
    assert found(a=2, lang="en") == {"other"}
    catalogue.close()


def test_keys_are_never_used_twice():
    catalogue, seen = Catalogue(), set()
    for _ in range(4):
        (key,) = put(catalogue, "o", Document(id="d", text="t")).added
        assert key not in seen
        seen.add(key)
        catalogue.delete("o", "d")
    catalogue.close()


def test_footprints_are_doomed_with_their_content():
    now = [0.0]
    catalogue = Catalogue(clock=lambda: now[0])
    (key,) = put(catalogue, "o", Document(id="d", text="t")).added
    catalogue.trail.note("o", [(key, mark(1)), (key, mark(1)), (key, mark(2))])
    put(catalogue, "o", Document(id="d", text="t", metadata={"a": 1}))
    assert catalogue.trail.doomed() == {}, "its content is what it was"
    now[0] = 10.0
    catalogue.trail.note("o", [(key, mark(2))])
    catalogue.trail.drop_footprints([mark(1), mark(2)], noted_before=5.0)
    assert catalogue.trail.footprints() == [mark(2)], "the other was not noted again"
    (new,) = put(catalogue, "o", Document(id="d", text="u")).added
    assert list(catalogue.trail.doomed().values()) == [mark(2)]
    catalogue.trail.note("o", [(key, mark(3)), (new, mark(4))])
    doomed = catalogue.trail.doomed()
    assert list(doomed.values()) == [mark(2), mark(3)], "noted for content that is no more"
    catalogue.trail.note("o", [(new, mark(2))])
    catalogue.trail.confirm(doomed)
    assert catalogue.trail.doomed() == {}
    assert set(catalogue.trail.footprints()) == {mark(2), mark(4)}, "noted since for what is there"
    catalogue.close()


def test_what_is_doomed_survives_a_crash(tmp_path):
    """The process ends in the middle of a deletion, without any goodbye."""
    program = f"""
import os, numpy as np
from stemcache.ragcache.catalogue import Catalogue
from stemcache.ragcache.documents import Document
from stemcache.prefixtree.footprint import Footprint
catalogue = Catalogue({str(tmp_path / "c.sqlite")!r})
for name in "ab":
    stored = catalogue.put("o", Document(id=name, text=name), ["p"], np.ones((1, 2), np.float32))
    catalogue.trail.note("o", [(stored.added[0], Footprint(b"n" * 32, name.encode() * 32, 0, b"head"))])
catalogue.delete("o", "a")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 9
    catalogue = Catalogue(tmp_path / "c.sqlite")
    assert [record.id for record in catalogue.records("o")] == ["b"]
    assert [each.parent for each in catalogue.trail.doomed().values()] == [b"a" * 32]
    catalogue.close()


def test_a_store_forgets_at_its_start_what_a_crash_has_left(engine, cache_of, tmp_path):
    cache = cache_of(folder=tmp_path / "s")
    cache.add([Document(id="d", text="The code of Velmora is 7392, and the keeper of Velmora is Trasin of Brel.")])
    cache.ask("What is the code of Velmora?")
    cache._documents.clean = lambda: 0  # the process ends before it
    cache.delete("d")
    assert cache._catalogue.trail.doomed()
    cached = engine.stats().store.cached_chunks
    cache.close()
    cache_of(folder=tmp_path / "s")
    assert engine.stats().store.cached_chunks < cached


def test_files_that_are_no_catalogue(tmp_path):
    (tmp_path / "text").write_text("no database, but a text that is long enough to be read as one" * 40)
    with pytest.raises(CatalogueError, match="damaged or no catalogue"):
        Catalogue(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE t(a)")
    other.close()
    with pytest.raises(CatalogueError, match="no catalogue of stemcache"):
        Catalogue(tmp_path / "other")
    with pytest.raises(CatalogueError, match="cannot be opened"):
        Catalogue(tmp_path / "missing" / "c")
    catalogue = Catalogue(tmp_path / "c")
    with pytest.raises(CatalogueError, match="another process has"):
        Catalogue(tmp_path / "c")
    catalogue.database.set("format", 99)
    catalogue.close()
    with pytest.raises(CatalogueError, match="another version"):
        Catalogue(tmp_path / "c")
    with pytest.raises(CatalogueError, match="was closed"):
        catalogue.records("o")


def test_a_failed_write_changes_nothing(tmp_path):
    """SQLite refuses pages beyond a limit, as it does on a full disk."""
    catalogue = Catalogue(tmp_path / "c")
    library = Library(catalogue, HashingEmbedder(), Splitter(None, None), "flat")
    library.put("o", Document(id="small", text="small text"))
    pages = catalogue.database._db.execute("PRAGMA page_count").fetchone()[0]
    catalogue.database._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(CatalogueError, match="full"):
        library.put("o", Document(id="large", text="large text " * 10_000))
    assert [found.passage.document_id for found in library.search("o", "large text", 5)] == ["small"]
    catalogue.database._db.execute("PRAGMA max_page_count = 100000")
    library.put("o", Document(id="large", text="large text " * 10_000))
    assert [found.passage.document_id for found in library.search("o", "large text", 5)] == ["large", "small"]
    catalogue.close()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_the_index_beside_it_is_taken_only_if_it_is_of_now(tmp_path, kind):
    texts = {f"d{i}": f"the number {i * 7919} and the word w{i * 31}" for i in range(40)}

    def opened():
        return Library(Catalogue(tmp_path / "c"), HashingEmbedder(), Splitter(None, None), kind, tmp_path)

    def right(library):
        found = [library.search("o", text, 1)[0].passage.document_id for text in texts.values()]
        return found == list(texts)

    library = opened()
    for name, text in texts.items():
        library.put("o", Document(id=name, text=text))
    assert right(library)
    library.save()
    library.catalogue.close()
    (file,) = tmp_path.glob("index-*.faiss")
    library = opened()
    assert library._file("o") == file
    assert right(library)
    library.delete("o", texts.popitem()[0])  # and then a crash: the file on the disk is of before
    library.catalogue.close()
    library = opened()
    assert right(library)
    assert len(library._index("o")) == 39
    library.save()
    (newer,) = tmp_path.glob("index-*.faiss")
    newer.write_bytes(newer.read_bytes()[:100])
    library.catalogue.close()
    library = opened()
    assert right(library), "made anew from the catalogue"
    library.catalogue.close()


def test_vectors_of_another_embedder_are_refused(tmp_path):
    catalogue = Catalogue(tmp_path / "c")
    Library(catalogue, HashingEmbedder(), Splitter(None, None), "flat")
    with pytest.raises(EmbedderError, match="hashing-char_wb-3-5-2048"):
        Library(catalogue, HashingEmbedder(256), Splitter(None, None), "flat")
    catalogue.close()


def test_footprints_that_mark_nothing_are_swept(engine, cache_of):
    now = [0.0]
    cache = cache_of(clock=lambda: now[0])
    cache.add(
        [Document(id=name, text=f"{name}: the code is 7392, and its keeper is Trasin.") for name in ("alpha", "beta")]
    )
    cache.ask("What is the code of alpha?", k=1)
    engine.clear_cache()
    cache.ask("What is the code of beta?", k=1)
    assert len(cache._catalogue.trail.footprints()) == 2
    cache._documents.sweep()
    assert len(cache._catalogue.trail.footprints()) == 2, "too young to be judged"
    now[0] = 4000.0
    cache._documents.sweep()
    (left,) = cache._catalogue.trail.footprints()
    assert engine.cache.held([left]) == {left}
