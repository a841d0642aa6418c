"""A lock that many may share, or one may hold alone.

Invariant: while one holds it alone, nobody shares it. Whoever shares it may share it again; to ask for it alone
while sharing it would wait for oneself.

Newcomers are let in while somebody waits to be alone: who wants that for good (to close what is shared) says so first,
in a flag that newcomers look at. To keep them waiting instead would let a thread that shares twice wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class SharedLock:
    """`with lock:` holds it together with others, `with lock.alone():` without; any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_sharing = 0

    def __enter__(self) -> None:
        with self._changed:
            self._n_sharing += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._n_sharing -= 1
            if not self._n_sharing:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it when all others have left. Who comes then waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._n_sharing)
            yield

    @contextmanager
    def alone_now(self) -> Iterator[bool]:
        """Hold it alone if nobody else has it, and give whether that is so. Does not wait for who shares it."""
        with self._changed:
            yield not self._n_sharing
