"""`stemcache` command lines in forked processes, for the tests that start many.

A process started anew imports torch, transformers and FastAPI for six to ten seconds of processor time before it can
answer. So a fork server (`multiprocessing`'s own, one for each worker of pytest-xdist) imports them once, and forks a
process for each command line: its own session, environment and standard streams, the real entry point, a real exit
status. What it lacks is the way from the shell to that entry point, and `atexit`; test_serve.py, test_forked.py and
test_demo.py in tests/api start some by exec, and show that both ways give the same.

Invariant: the fork server has one thread, as what other threads hold would be held for ever in what it forks.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Any

from stemcache.api.cli import main
from stemcache.api.server_process import ServerProcess

# What a server has imported when it answers, by those who import the rest. The last ones are imported when they are
# used; llama is the demo model's class.
PRELOADED = [
    "stemcache.api.serve",
    "stemcache.api.generate",
    "stemcache.engine.engine",
    "stemcache.ragcache.context_cache",
    "transformers.models.llama.modeling_llama",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


class _Descriptor:
    """A file descriptor that arrives in the forked process under a number of its own, as which it is unpickled."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _Descriptor._received, (reduction.DupFd(self._number),)

    @staticmethod
    def _received(duplicate: Any) -> int:
        return int(duplicate.detach())


def _run(arguments: Sequence[str], environment: dict[str, str], stdout: int, stderr: int) -> None:
    """In the forked process: become what `python -m stemcache.api.cli` would be, and run."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    stdin = os.open(os.devnull, os.O_RDONLY)
    for given, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
        os.dup2(given, number)
        os.close(given)
    sys.argv = ["stemcache", *arguments]
    sys.exit(main(arguments))


class ForkedCommand:
    """A running command line; what of `subprocess.Popen` a ServerProcess needs."""

    def __init__(self, arguments: Sequence[str], stdout: int, stderr: int) -> None:
        """stdout, stderr: file descriptors."""
        streams = _Descriptor(stdout), _Descriptor(stderr)
        # A daemon, so that one that a broken test leaves behind is ended with pytest, which would wait for it else.
        self._process = _CONTEXT.Process(target=_run, args=(arguments, dict(os.environ), *streams), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal's number; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. timeout: seconds. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("stemcache", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class ForkedServer(ServerProcess):
    """A `stemcache serve` process that is forked."""

    def _start(self, command: Sequence[str], *_: Any) -> ForkedCommand:  # type: ignore[override]
        _, _, _, *arguments = command  # after the interpreter, -m and the module
        return ForkedCommand(arguments, self._log.fileno(), self._log.fileno())


def run_command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `stemcache ARGUMENTS` to its end. timeout: seconds. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        command = ForkedCommand(arguments, stdout.fileno(), stderr.fileno())
        try:
            status = command.wait(timeout)
        finally:
            command.kill()
        printed = [stream.seek(0) or stream.read().decode() for stream in (stdout, stderr)]
    return subprocess.CompletedProcess(arguments, status, *printed)
