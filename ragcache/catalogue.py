"""The catalogue: documents, their passages and vectors.

Invariant: the file is the truth; what is kept in memory or beside it (the vector index) is made from it. Content that
is deleted or changed dooms its footprints in the same transaction.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stemcache.ragcache.database import Database
from stemcache.ragcache.documents import Document, Passage, Record, Scalar, Status, content_hash
from stemcache.ragcache.errors import DocumentNotFoundError
from stemcache.ragcache.trail import Trail

Vectors = NDArray[np.float32]
Filter = Mapping[str, Scalar | Sequence[Scalar]]


@dataclass(frozen=True, slots=True)
class Stored:
    """What `put` did. Passages with `removed` keys are no more; `added` are new, in order."""

    record: Record
    status: Status
    removed: list[int]
    added: list[int]


class Catalogue:
    """Documents of any number of owners; nothing of one is ever told to another. From any thread.

    path: None keeps everything in memory. clock: seconds since 1970.
    Raises CatalogueError, as all methods do.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(path)
        self.trail = Trail(self.database, clock)
        self._clock = clock
        self._reading, self._transaction = self.database.reading, self.database.transaction

    def close(self) -> None:
        """Idempotent."""
        self.database.close()

    @property
    def generation(self) -> int:
        """Changes with every change of any passage."""
        return int(self.database.get_setting("generation") or 0)

    # -- documents -----------------------------------------------------------------------------------------------------

    def put(self, owner: str, document: Document, passages: Sequence[str], vectors: Vectors) -> Stored:
        """Add a document, or change the one with its id.

        passages, vectors `[n, dimensions]`: of its content; not looked at where that is what it was.
        """
        old = self.find(owner, document.id)
        same = old is not None and old.document.content_hash == document.content_hash
        if same and old is not None and old.document == document:
            return Stored(old, "unchanged", [], [])
        now = self._clock()
        with self._transaction() as db:
            removed: list[int] = []
            version, created = (1, now) if old is None else (old.version + (not same), old.created_at)
            fields = (document.title, document.text, json.dumps(dict(document.metadata)), document.content_hash)
            times = (created, now, document.expires_at, document.pinned, document.system_prompt)
            db.execute(
                "INSERT INTO documents VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET "
                "title=excluded.title, text=excluded.text, metadata=excluded.metadata, hash=excluded.hash, "
                "version=excluded.version, updated_at=excluded.updated_at, expires_at=excluded.expires_at, "
                "pinned=excluded.pinned, system_prompt=excluded.system_prompt",
                (owner, document.id, *fields, version, *times),
            )
            added: list[int] = []
            if not same:
                removed = self._drop_content(db, owner, document.id)
                for position, (text, vector) in enumerate(zip(passages, vectors, strict=True)):
                    digest = content_hash(document.title, text)
                    row = (owner, document.id, position, text, digest, np.asarray(vector, np.float32).tobytes())
                    insert = "INSERT INTO passages(owner,document_id,position,text,hash,vector) VALUES (?,?,?,?,?,?)"
                    added.append(int(db.execute(insert, row).lastrowid or 0))
                self._next_generation()
            record = self.get(owner, document.id)
        return Stored(record, "created" if old is None else "updated", removed, added)

    def delete(self, owner: str, document_id: str) -> list[int]:
        """Delete a document; returns the keys of its passages. Raises DocumentNotFoundError."""
        with self._transaction() as db:
            self.get(owner, document_id)
            removed = self._drop_content(db, owner, document_id)
            db.execute("DELETE FROM documents WHERE owner = ? AND id = ?", (owner, document_id))
            self._next_generation()
        return removed

    def find(self, owner: str, document_id: str) -> Record | None:
        """A document by its id; None if there is none."""
        with self._reading() as db:
            row = db.execute(_RECORDS + "AND id = ?", (owner, document_id)).fetchone()
        return None if row is None else _record(row)

    def get(self, owner: str, document_id: str) -> Record:
        """A document by its id. Raises DocumentNotFoundError."""
        record = self.find(owner, document_id)
        if record is None:
            raise DocumentNotFoundError(document_id)
        return record

    def records(self, owner: str, *, after: str = "", limit: int = 100) -> list[Record]:
        """Documents in the order of their ids, from the one after `after` on."""
        with self._reading() as db:
            rows = db.execute(_RECORDS + "AND id > ? ORDER BY id LIMIT ?", (owner, after, limit)).fetchall()
        return [_record(row) for row in rows]

    def count(self, owner: str) -> int:
        """How many documents an owner has."""
        with self._reading() as db:
            return int(db.execute("SELECT count(*) FROM documents WHERE owner = ?", (owner,)).fetchone()[0])

    def pinned(self) -> list[tuple[str, str]]:
        """Owner and id of all pinned documents."""
        with self._reading() as db:
            return list(db.execute("SELECT owner, id FROM documents WHERE pinned ORDER BY owner, id"))

    def expired(self) -> list[tuple[str, str]]:
        """Owner and id of the documents whose time is over."""
        with self._reading() as db:
            return list(db.execute("SELECT owner, id FROM documents WHERE expires_at <= ?", (self._clock(),)))

    # -- passages ------------------------------------------------------------------------------------------------------

    def passages(self, owner: str, keys: Sequence[int]) -> list[Passage]:
        """The passages with these keys, in this order; those that are no more are left out."""
        with self._reading() as db:
            rows = {key: db.execute(_PASSAGES + "AND p.key = ?", (owner, key)).fetchone() for key in keys}
        return [_passage(row) for row in rows.values() if row is not None]

    def passages_of(self, owner: str, document_id: str) -> list[Passage]:
        """A document's passages in order."""
        with self._reading() as db:
            rows = db.execute(_PASSAGES + "AND p.document_id = ? ORDER BY position", (owner, document_id)).fetchall()
        return [_passage(row) for row in rows]

    def passage_like(self, owner: str, title: str, text: str) -> Passage | None:
        """The passage that has exactly this title and text, if there is one."""
        with self._reading() as db:
            row = db.execute(_PASSAGES + "AND p.hash = ?", (owner, content_hash(title, text))).fetchone()
        return None if row is None else _passage(row)

    def vectors(self, owner: str, dimensions: int) -> tuple[Sequence[int], Vectors]:
        """All keys and vectors `[n, dimensions]` of an owner."""
        with self._reading() as db:
            rows = db.execute("SELECT key, vector FROM passages WHERE owner = ? ORDER BY key", (owner,)).fetchall()
        joined = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), dimensions)
        return [row[0] for row in rows], joined

    def keys_where(self, owner: str, where: Filter) -> Sequence[int]:
        """Keys of the passages whose document's metadata has each of these values, or one of each of these lists."""
        query = (
            "SELECT key FROM passages p JOIN documents d ON d.owner = p.owner AND d.id = document_id WHERE p.owner = ?"
        )
        values: list[Any] = [owner]
        for name, wanted in where.items():
            tests = []
            for option in [wanted] if isinstance(wanted, str | int | float | bool) else wanted:
                kinds = _KINDS[type(option)]
                tests.append(f"(j.key = ? AND j.value = ? AND j.type IN ({', '.join('?' for _ in kinds)}))")
                values += [name, option, *kinds]
            query += f" AND EXISTS (SELECT 1 FROM json_each(d.metadata) j WHERE {' OR '.join(tests) or '0'})"
        with self._reading() as db:
            return [row[0] for row in db.execute(query, values)]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _drop_content(self, db: sqlite3.Connection, owner: str, document_id: str) -> list[int]:
        """Drop a document's passages, and doom what was computed from them."""
        of = (owner, document_id)
        removed = [row[0] for row in db.execute("SELECT key FROM passages WHERE owner=? AND document_id=?", of)]
        db.execute("DELETE FROM passages WHERE owner = ? AND document_id = ?", of)
        db.execute(
            "INSERT INTO doomed(namespace, parent, depth, head) "
            "SELECT namespace, parent, depth, head FROM footprints WHERE owner = ? AND document_id = ?",
            of,
        )
        db.execute("DELETE FROM footprints WHERE owner = ? AND document_id = ?", of)
        return removed

    def _next_generation(self) -> None:
        self.database.set("generation", self.generation + 1)


# SQLite reads JSON's true as 1, so types are compared too; but numbers are numbers, 1 as well as 1.0.
_KINDS: Final = {
    str: ("text",),
    bool: ("true", "false"),
    int: ("integer", "real"),
    float: ("integer", "real"),
}

_RECORDS: Final = (
    "SELECT id, title, text, metadata, expires_at, pinned, system_prompt, version, created_at, updated_at, "
    "(SELECT count(*) FROM passages p WHERE p.owner = documents.owner AND p.document_id = documents.id) "
    "FROM documents WHERE owner = ? "
)
_PASSAGES: Final = (
    "SELECT p.key, p.document_id, p.position, d.version, d.title, p.text, d.metadata FROM passages p "
    "JOIN documents d ON d.owner = p.owner AND d.id = p.document_id WHERE p.owner = ? "
)


def _record(row: Sequence[Any]) -> Record:
    name, title, text, metadata, expires_at, pinned, system_prompt, *rest = row
    document = Document(
        id=name,
        title=title,
        text=text,
        metadata=json.loads(metadata),
        expires_at=expires_at,
        pinned=bool(pinned),
        system_prompt=system_prompt,
    )
    return Record(document, *rest)


def _passage(row: Sequence[Any]) -> Passage:
    key, document_id, position, version, title, text, metadata = row
    return Passage(key, document_id, position, version, title, text, json.loads(metadata))
