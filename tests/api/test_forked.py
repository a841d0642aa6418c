"""Forked command lines are what they are when they are started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from forked import ForkedCommand, ForkedServer, run_command

from stemcache.api.server_process import ServerStartError


@pytest.mark.parametrize(
    "line",
    [["--version"], ["bake"], ["simulate", "--k", "2", "--requests", "50", "--documents", "200"], ["cache", "stats"]],
)
def test_output_and_status(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of the time of the start, not of the fork server's
    anew = subprocess.run([sys.executable, "-m", "stemcache.api.cli", *line], capture_output=True, text=True)
    forked = run_command(*line)
    assert (forked.stdout, forked.returncode) == (anew.stdout, anew.returncode)
    assert forked.stderr == anew.stderr.replace("python -m stemcache.api.cli", "stemcache")


def test_what_forks_has_one_thread_and_has_imported_the_rest() -> None:
    child = ForkedCommand(["--version"], sys.__stderr__.fileno(), sys.__stderr__.fileno())
    server = psutil.Process(child.pid).parent()
    assert child.wait(60) == 0
    assert server.num_threads() == 1
    assert any("libtorch" in each.path for each in server.memory_maps())


def test_signals_and_sessions() -> None:
    with ForkedServer("--pool-bytes", "16MiB") as server, ForkedServer("--pool-bytes", "16MiB") as hopeless:
        server.wait_until_ready()
        assert os.getsid(server.pid) == server.pid != os.getsid(0)
        server.signal(signal.SIGINT)
        hopeless.signal(signal.SIGKILL)
        with pytest.raises(ServerStartError, match="ended with status -9"):
            hopeless.wait_until_ready()
        assert server.stop() == 0
        assert hopeless.stop() == -9
