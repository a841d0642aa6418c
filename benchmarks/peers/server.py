"""A server of any make: start, readiness, pause, memory, stop.

Invariant: when the `with` block is left, the process and all that it started have ended. While it is paused it takes no
processor time, so that servers which are compared can live side by side and still each have the machine for itself.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from stemcache.api.server_process import ChildServer

_STOP_SECONDS = 30.0


class Server:
    """`command` serves HTTP on 127.0.0.1:`port`, and answers GET /health with success once it is ready.

    environment: added to that of this process. It runs in a folder of its own, which goes with it.
    """

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        self._command, self._port = list(command), port
        self._environment = os.environ | environment
        self._folder = tempfile.TemporaryDirectory(prefix="stemcache-peer-")
        self._child: ChildServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, timeout: float = 600) -> float:
        """Start it and wait until it is ready; returns the seconds that took. Raises ServerStartError."""
        begin = time.monotonic()
        self._child = ChildServer(
            self._command, self._port, environment=self._environment, folder=Path(self._folder.name)
        )
        self._child.wait_until_ready(timeout)
        return time.monotonic() - begin

    def stop(self) -> None:
        """End the process and all that it started, in order if it can; idempotent."""
        if self._child is None:
            return
        self.resume()
        tree = self._tree()
        with self._child as child:
            child.stop(_STOP_SECONDS)
        for process in tree:  # what it did not end itself
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=_STOP_SECONDS)
        self._child = None

    def pause(self) -> None:
        """Take the processor away from all its processes."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def memory_bytes(self) -> int:
        """What all its processes hold now; a page that several of them share counts once (PSS)."""
        return sum(_proc_kb(process.pid, "smaps_rollup", "Pss") for process in self._tree()) << 10

    def peak_bytes(self) -> int:
        """The sum of what each process held at most (VmHWM): an upper bound where there are several."""
        return sum(_proc_kb(process.pid, "status", "VmHWM") for process in self._tree()) << 10

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._child.pid) if self._child is not None else None
            return [root, *root.children(recursive=True)] if root is not None else []
        except psutil.NoSuchProcess:
            return []


def _proc_kb(pid: int, file: str, field: str) -> int:
    """A figure in kB of a process, 0 if it has ended or does not give it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0
