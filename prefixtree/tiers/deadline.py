"""Deadlines for whole answers: sockets that end in time, however slowly the other side writes.

Invariant: under `Deadline.until(t)` no read or write of this thread on a `TimedSocket` lasts beyond t.

A socket's own timeout starts anew with every byte that arrives: redis-py with `socket_timeout=0.25` was still reading
after 6 s from a server that sent one byte every 0.1 s. Closing the connection from a watching thread would do too, and
needs a thread, a lock, and a way to be sure that the connection has not been lent to somebody else meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from typing import Any


class Deadline(threading.local):
    """Each thread's own: the time by which what it reads and writes now must be done; None for no limit."""

    at: float | None = None

    @contextmanager
    def until(self, at: float) -> Iterator[None]:
        """Set the deadline of this thread, in seconds of `time.monotonic`, for the length of a block."""
        before, self.at = self.at, at
        try:
            yield
        finally:
            self.at = before

    def left(self) -> float | None:
        """Return the seconds that are left. Raises TimeoutError when none are."""
        if self.at is None:
            return None
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left


class TimedSocket:
    """A socket whose reads and writes obey a deadline, beside its own timeout. Everything else is the socket's."""

    def __init__(self, sock: socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._timeout = sock.gettimeout()

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds
        self._sock.settimeout(seconds)

    def recv_into(self, *arguments: Any) -> int:
        self._arm()
        return self._sock.recv_into(*arguments)

    def recv(self, *arguments: Any) -> bytes:
        self._arm()
        return self._sock.recv(*arguments)

    def sendall(self, data: Any) -> None:
        self._arm()
        self._sock.sendall(data)

    def fileno(self) -> int:
        return self._sock.fileno()

    def _arm(self) -> None:
        left = self._deadline.left()
        if left is not None:
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))
        elif self._sock.gettimeout() != self._timeout:
            self._sock.settimeout(self._timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
