"""The database of documents: one SQLite file, its tables, and its errors in words.

Invariant: one process has it open. Every change is one transaction, so a crash leaves the state before or after it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stemcache.ragcache.errors import CatalogueError

_FORMAT: Final = 2
_SCHEMA: Final = """
CREATE TABLE settings(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE documents(
    owner TEXT, id TEXT, title TEXT, text TEXT, metadata TEXT, hash TEXT, version INT,
    created_at REAL, updated_at REAL, expires_at REAL, pinned INT, system_prompt TEXT,
    PRIMARY KEY(owner, id)) WITHOUT ROWID;
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


class Database:
    """From any thread. path: None keeps everything in memory. Raises CatalogueError."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
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
        with self.transaction():
            if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self.set("format", _FORMAT)
            elif self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'doomed'").fetchone() is None:
                raise CatalogueError(f"{path} is a SQLite file, but no catalogue of stemcache: name another one")
            elif self.get_setting("format") == 1:  # it did not say what documents are pinned after
                self._db.execute("ALTER TABLE documents ADD COLUMN system_prompt TEXT")
                self.set("format", _FORMAT)
            elif self.get_setting("format") != _FORMAT:
                raise CatalogueError(f"{path} was written by another version of stemcache: add the documents anew")

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()

    # -- settings ------------------------------------------------------------------------------------------------------

    def get_setting(self, name: str) -> Any:
        """None if it was never set."""
        with self.reading() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def set(self, name: str, value: str | int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise CatalogueError(self._problem(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction; inside another one, a part of that."""
        with self.reading() as db:
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
