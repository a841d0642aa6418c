"""A server of any make as a child process: start, readiness, pause, memory, stop.

Invariant: when the `with` block is left, the process and all that it started have ended. While it is paused it takes no
processor time, so that servers which are compared can live side by side and still each have the machine for itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

_STOP_SECONDS = 15


class ServerError(Exception):
    """The server ended or did not answer in time; the message ends with what it printed last."""


class Server:
    """`command` serves HTTP on 127.0.0.1:`port`, and answers GET /health with success once it is ready.

    environment: added to that of this process. It runs in a folder of its own, which goes with it.
    """

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = list(command)
        self._environment = os.environ | environment
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._folder = tempfile.TemporaryDirectory(prefix="stemcache-peer-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 900) -> float:
        """Start it and wait until it is ready; returns the seconds that took. Raises ServerError."""
        begin = time.monotonic()
        self._process = subprocess.Popen(
            self._command, cwd=self._folder.name, env=self._environment, stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.monotonic() < begin + timeout:
                if self._process.poll() is not None:
                    raise ServerError(f"it ended with status {self._process.returncode}: {self.output()}")
                with suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").is_success:
                        return time.monotonic() - begin
                time.sleep(0.05)
        raise ServerError(f"it was not ready within {timeout:g} s: {self.output()}")

    def stop(self) -> None:
        """End the process and all that it started, in order if it can; idempotent."""
        if self._process is None:
            return
        self.resume()
        tree = self._tree()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        for process in tree:  # what it did not end itself
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(tree, timeout=_STOP_SECONDS)
        self._process = None

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

    def output(self, last_bytes: int = 1500) -> str:
        """The end of what it printed."""
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - last_bytes))
        return self._log.read().decode(errors="replace").strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid) if self._process is not None else None
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
