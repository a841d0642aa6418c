"""A proxy between a client and a server that can be made bad: slow, trickling, cutting answers short, or swapping them.

Invariant: what the client sends reaches the server as it is; only answers are tampered with, by the mode of the moment.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Literal

Mode = Literal["pass", "slow", "trickle", "cut"]

SLOW_SECONDS = 0.4
TRICKLE_SECONDS = 0.02


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and speaks to `port`. `mode` may be changed at any time.

    pass: as it comes. slow: each piece of an answer comes 0.4 s late. trickle: a byte every 0.02 s.
    cut: the connection is closed in the middle of an answer of over 1 kB.
    """

    def __init__(self, port: int) -> None:
        self.mode: Mode = "pass"
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._listener.close()
        for each in list(self._open):
            with suppress(OSError):
                each.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                if self._closed:
                    return
                client.close()
                continue
            self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not answers or self.mode == "pass":
                    target.sendall(data)
                elif self.mode == "slow":
                    time.sleep(SLOW_SECONDS)
                    target.sendall(data)
                elif self.mode == "cut":
                    target.sendall(data[: len(data) // 2] if len(data) > 1000 else data)
                    if len(data) > 1000:
                        break
                else:
                    self._trickle(data, target)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self._open.discard(each)

    def _trickle(self, data: bytes, target: socket.socket) -> None:
        for at in range(len(data)):
            if self.mode != "trickle":
                target.sendall(data[at:])
                return
            target.sendall(data[at : at + 1])
            time.sleep(TRICKLE_SECONDS)
