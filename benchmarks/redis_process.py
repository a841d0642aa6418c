"""A Redis or Valkey server of our own, for tests and benchmarks: started, stopped, killed and damaged at will.

Invariant: when the `with` block is left the server has ended and its folder is gone, whatever was done to it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import redis

from stemcache.api.server_process import free_port

SERVERS = ("redis-server", "valkey-server")


def installed_servers() -> list[str]:
    """Those of the two that are there."""
    return [name for name in SERVERS if shutil.which(name)]


class RedisProcess:
    """A server on a free port and a socket. `options` are lines of its configuration."""

    def __init__(self, *options: str, program: str | None = None, tls: bool = False) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="stemcache-redis-"))
        self.socket = self.folder / "socket"
        self.url = f"redis://127.0.0.1:{self.port}"
        self._program = program or installed_servers()[0]
        listens = ["port 0", f"tls-port {self.port}"] if tls else [f"port {self.port}"]
        lines = ["bind 127.0.0.1", "save ''", "appendonly no", f"dir {self.folder}", f"unixsocket {self.socket}"]
        self._config = self.folder / "redis.conf"
        self._config.write_text("\n".join([*lines, *listens, *options]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self._process = subprocess.Popen(
            [self._program, str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(500):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._program} ended with status {self._process.returncode}")
            if self.socket.exists() and self._answers():
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self._program} did not start")

    def client(self) -> redis.Redis:
        """A client of the test's own, past all that is tested. (The socket needs no TLS.)"""
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=10)

    def pause(self) -> None:
        """Let it hang: connections are taken, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def __enter__(self) -> RedisProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True


class SentinelProcess:
    """A sentinel that watches one server, and may decide alone that it is down, after 200 ms."""

    def __init__(self, server: RedisProcess, service: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="stemcache-sentinel-"))
        self._config = self.folder / "sentinel.conf"  # which the sentinel writes to as well
        self._config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {service} 127.0.0.1 {server.port} 1\n"
            f"sentinel down-after-milliseconds {service} 200\nsentinel failover-timeout {service} 1000\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SentinelProcess:
        command = [installed_servers()[0], str(self._config), "--sentinel"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
