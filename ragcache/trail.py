"""The trail: where in the cache documents left keys and values, as footprints, and which of them have to go.

Invariant: what was computed from a document's content is marked by footprints of that document, or by doomed ones if
the content is no more. Doomed footprints stay until somebody confirms that what they mark is gone; a crash in between
is made good at the next start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.database import Database


class Trail:
    """Footprints in a database. From any thread; all methods raise CatalogueError. clock: seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def note(self, owner: str, footprints: Iterable[tuple[int, Footprint]]) -> None:
        """Remember which passages (by key) left which footprints. Of passages that are no more: doomed at once."""
        now = self._clock()
        with self._database.transaction() as db:
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
        with self._database.reading() as db:
            until = float("inf") if noted_before is None else noted_before
            query = "SELECT DISTINCT namespace, parent, depth, head FROM footprints WHERE noted_at < ?"
            return [Footprint(*row) for row in db.execute(query, (until,))]

    def drop_footprints(self, footprints: Iterable[Footprint], noted_before: float) -> None:
        """Forget footprints that mark nothing any more, unless they were noted again since."""
        with self._database.transaction() as db:
            for mark in footprints:
                db.execute(
                    "DELETE FROM footprints WHERE namespace = ? AND parent = ? AND head = ? AND noted_at < ?",
                    (mark.namespace, mark.parent, mark.head, noted_before),
                )

    def doomed(self) -> dict[int, Footprint]:
        """Footprints whose chunks have to go, by the number under which `confirm` knows them."""
        with self._database.reading() as db:
            return {row[0]: Footprint(*row[1:]) for row in db.execute("SELECT * FROM doomed")}

    def confirm(self, numbers: Iterable[int]) -> None:
        """What these doomed footprints mark is gone from every tier."""
        with self._database.transaction() as db:
            db.executemany("DELETE FROM doomed WHERE id = ?", [(number,) for number in numbers])
