"""The catalogue: documents, their passages and vectors, and where their keys and values may lie, in one SQLite file.

Invariant: the file is the truth; what is kept in memory or beside it (the vector index) is made from it. One process
has it open. Every change is one transaction, so a crash leaves the state before or after it. A document that is
deleted or changed leaves its footprints in `doomed` until somebody confirms that what they mark is gone; a crash in
between is made good at the next start.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.documents import Document, Passage, Record, Scalar, Status, content_hash
from stemcache.ragcache.errors import CatalogueError, DocumentNotFoundError

Vectors = NDArray[np.float32]
Filter = Mapping[str, Scalar | Sequence[Scalar]]

_FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE settings(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE documents(
    owner TEXT, id TEXT, title TEXT, text TEXT, metadata TEXT, hash TEXT, version INT,
    created_at REAL, updated_at REAL, expires_at REAL, pinned INT, PRIMARY KEY(owner, id)) WITHOUT ROWID;
CREATE INDEX by_expiry ON documents(expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE passages(
    key INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT, document_id TEXT, position INT, text TEXT, hash TEXT,
    vector BLOB, FOREIGN KEY(owner, document_id) REFERENCES documents(owner, id) ON DELETE CASCADE);
CREATE INDEX by_document ON passages(owner, document_id, position);
CREATE INDEX by_hash ON passages(owner, hash);
CREATE TABLE footprints(
    owner TEXT, document_id TEXT, namespace BLOB, parent BLOB, depth INT, head BLOB, noted_at REAL,
    PRIMARY KEY(owner, document_id, namespace, parent, head)) WITHOUT ROWID;
CREATE TABLE doomed(id INTEGER PRIMARY KEY AUTOINCREMENT, namespace BLOB, parent BLOB, depth INT, head BLOB);
"""


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
    Raises CatalogueError.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None, timeout=2)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA secure_delete = ON")  # deleted text is overwritten
        except sqlite3.Error as error:
            raise CatalogueError(self._problem(error)) from error
        with self._transaction():
            if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self.set("format", _FORMAT)
            elif self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'doomed'").fetchone() is None:
                raise CatalogueError(f"{path} is a SQLite file, but no catalogue of stemcache: name another one")
            elif self.get_setting("format") != _FORMAT:
                raise CatalogueError(f"{path} was written by another version of stemcache: add the documents anew")

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()

    # -- settings ------------------------------------------------------------------------------------------------------

    def get_setting(self, name: str) -> Any:
        """None if it was never set."""
        with self._reading() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def set(self, name: str, value: str | int) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    @property
    def generation(self) -> int:
        """Changes with every change of any passage."""
        return int(self.get_setting("generation") or 0)

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
            times = (created, now, document.expires_at, document.pinned)
            db.execute(
                "INSERT INTO documents VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET title=excluded.title, "
                "text=excluded.text, metadata=excluded.metadata, hash=excluded.hash, version=excluded.version, "
                "updated_at=excluded.updated_at, expires_at=excluded.expires_at, pinned=excluded.pinned",
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
            options = [wanted] if isinstance(wanted, str | int | float | bool) else list(wanted)
            path = f"$.{json.dumps(name)}"
            # SQLite's JSON has true as 1: the type is compared too, but numbers are numbers, 1 as well as 1.0.
            tests = []
            for option in options:
                kinds = ("true", "false") if isinstance(option, bool) else ("text",)
                if isinstance(option, int | float) and not isinstance(option, bool):
                    kinds = ("integer", "real")
                marks = ", ".join("?" for _ in kinds)
                tests.append(f"(json_extract(metadata, ?) = ? AND json_type(metadata, ?) IN ({marks}))")
                values += [path, option, path, *kinds]
            query += f" AND ({' OR '.join(tests) or '0'})"
        with self._reading() as db:
            return [row[0] for row in db.execute(query, values)]

    # -- footprints ----------------------------------------------------------------------------------------------------

    def note(self, owner: str, footprints: Iterable[tuple[int, Footprint]]) -> None:
        """Remember which passages (by key) left which footprints. Of passages that are no more: doomed at once."""
        now = self._clock()
        with self._transaction() as db:
            for key, mark in footprints:
                place = (mark.namespace, mark.parent, mark.depth, mark.head)
                of = "SELECT document_id FROM passages WHERE owner = ? AND key = ?"
                row = db.execute(of, (owner, key)).fetchone()
                if row is not None:
                    values = (owner, row[0], *place, now)
                    db.execute("INSERT OR REPLACE INTO footprints VALUES (?,?,?,?,?,?,?)", values)
                else:
                    db.execute("INSERT INTO doomed(namespace,parent,depth,head) VALUES (?,?,?,?)", place)

    def footprints(self, noted_before: float | None = None) -> list[Footprint]:
        """All of them, or those that were last noted before a time."""
        with self._reading() as db:
            until = float("inf") if noted_before is None else noted_before
            query = "SELECT DISTINCT namespace, parent, depth, head FROM footprints WHERE noted_at < ?"
            return [Footprint(*row) for row in db.execute(query, (until,))]

    def drop_footprints(self, footprints: Iterable[Footprint], noted_before: float) -> None:
        """Forget footprints that mark nothing any more, unless they were noted again since."""
        with self._transaction() as db:
            for mark in footprints:
                db.execute(
                    "DELETE FROM footprints WHERE namespace = ? AND parent = ? AND head = ? AND noted_at < ?",
                    (mark.namespace, mark.parent, mark.head, noted_before),
                )

    def doomed(self) -> dict[int, Footprint]:
        """Footprints whose chunks have to go, by the number under which `confirm` knows them."""
        with self._reading() as db:
            return {row[0]: Footprint(*row[1:]) for row in db.execute("SELECT * FROM doomed")}

    def confirm(self, numbers: Iterable[int]) -> None:
        """What these doomed footprints mark is gone from every tier."""
        with self._transaction() as db:
            db.executemany("DELETE FROM doomed WHERE id = ?", [(number,) for number in numbers])

    # -- inside --------------------------------------------------------------------------------------------------------

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
        self.set("generation", self.generation + 1)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise CatalogueError(self._problem(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction; inside another one, a part of that."""
        with self._reading() as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _problem(self, error: sqlite3.Error) -> str:
        name = str(self._path or "the catalogue in memory")
        match str(error):
            case "database is locked":
                return f"another process has {name} open: stop it, or name another folder"
            case "file is not a database" | "database disk image is malformed":
                return f"{name} is damaged or no catalogue of stemcache: restore it, or name another folder"
            case "unable to open database file":
                return f"{name} cannot be opened: its folder is missing, or may not be written"
            case "Cannot operate on a closed database.":
                return "the catalogue was closed"
            case reason:
                return f"{name}: {reason}"


_RECORDS: Final = (
    "SELECT id, title, text, metadata, expires_at, pinned, version, created_at, updated_at, "
    "(SELECT count(*) FROM passages p WHERE p.owner = documents.owner AND p.document_id = documents.id) "
    "FROM documents WHERE owner = ? "
)
_PASSAGES: Final = (
    "SELECT p.key, p.document_id, p.position, d.version, d.title, p.text, d.metadata FROM passages p "
    "JOIN documents d ON d.owner = p.owner AND d.id = p.document_id WHERE p.owner = ? "
)


def _record(row: Sequence[Any]) -> Record:
    name, title, text, metadata, expires_at, pinned, *rest = row
    document = Document(
        id=name, title=title, text=text, metadata=json.loads(metadata), expires_at=expires_at, pinned=bool(pinned)
    )
    return Record(document, *rest)


def _passage(row: Sequence[Any]) -> Passage:
    key, document_id, position, version, title, text, metadata = row
    return Passage(key, document_id, position, version, title, text, json.loads(metadata))
