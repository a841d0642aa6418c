"""A server as a child process; `ServerProcess` is a `stemcache serve`.

Invariant: when the `with` block is left the child has ended, whatever happened in the block.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from stemcache.prefixtree.errors import StemcacheError

_POLL_SECONDS = 0.1
# More than `serve` itself gives its running requests (35 s), so that only one that hangs is killed.
_STOP_SECONDS = 60


def free_port() -> int:
    """A port that nobody uses now. Somebody else may take it before the caller does; then the server says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerStartError(StemcacheError):
    """The server ended, or did not answer in time; the message ends with what it printed last."""


class ChildServer:
    """`command` serves HTTP on 127.0.0.1:`port`, and answers GET /health with success once it is ready.

    environment: all of the child's; this process's by default. folder: where it runs.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._process = self._start(command, environment, folder)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str] | None, folder: Path | None
    ) -> subprocess.Popen[bytes]:
        """Start the child with its output in the log. Tests fork instead: tests/support/forked.py."""
        # A session of its own, so that Ctrl-C reaches the parent only, which then stops the child in order.
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Return when /health answers. Raises ServerStartError: at once where the server has ended.

        timeout: seconds; by default as long as a start takes on a machine whose processors have other work to do.
        """
        deadline = time.monotonic() + timeout
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise ServerStartError(f"the server ended with status {self._process.returncode}: {self.output()}")
                try:
                    if client.get(f"{self.url}/health").is_success:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(_POLL_SECONDS)
        raise ServerStartError(f"the server did not answer within {timeout:g} s: {self.output()}")

    def signal(self, number: int) -> None:
        """Send the server a signal."""
        self._process.send_signal(number)

    def stop(self, timeout: float = _STOP_SECONDS) -> int:
        """Ask the server to end, and insist after `timeout` seconds; returns its exit status. Idempotent."""
        self._process.terminate()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def output(self, last_bytes: int = 4000) -> str:
        """The end of what the server printed."""
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - last_bytes))
        return self._log.read().decode(errors="replace").strip()


class ServerProcess(ChildServer):
    """stemcache on a free port of this machine. `arguments` are those of `stemcache serve`."""

    def __init__(self, *arguments: str) -> None:
        port = free_port()
        super().__init__([sys.executable, "-m", "stemcache.api.cli", "serve", "--port", str(port), *arguments], port)
