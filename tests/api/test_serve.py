"""The server process with all its safeguards on: keys, JSON logs, an orderly end."""

from __future__ import annotations

import gc
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from forked import ForkedServer

from stemcache.api import cli, serve
from stemcache.api.limits import Limits
from stemcache.api.serve import limits_from
from stemcache.api.server_process import ServerProcess, ServerStartError, free_port

KEY = "alice-key-0123456789"
LONG = {"prompt": "Zanzibar is", "max_tokens": 250, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"alice {KEY}\n")
    path.chmod(0o644)  # to be warned of
    return path


def test_garbage_is_collected_from_a_servers_start_on_and_never_among_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, with a server that ends at once."""
    seen = []
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve.logs, "configure", lambda: None)
    load, frozen = serve.load_engine, gc.get_freeze_count()

    def load_engine(*arguments: Any) -> Any:
        seen.append(gc.isenabled())
        return load(*arguments)

    monkeypatch.setattr(serve, "load_engine", load_engine)
    monkeypatch.setattr(
        serve.DrainingServer, "run", lambda *_, **__: seen.extend([gc.isenabled(), gc.get_freeze_count() > frozen])
    )
    assert cli.main(["serve", "--pool-bytes", "16MiB", "--port", str(free_port())]) == 0
    assert seen == [False, True, True]
    assert cli.main(["serve", "--model", "nowhere", "--port", str(free_port())]) == cli.USAGE_ERROR
    assert gc.isenabled()


@pytest.mark.parametrize("start", [ServerProcess, ForkedServer])
def test_a_server_with_keys_finishes_what_runs_and_logs_no_text(keys: Path, start: type[ServerProcess]) -> None:
    """Started anew, as a user does, and forked, as most tests do: both are the same from here."""
    with start("--pool-bytes", "64MiB", "--api-keys", str(keys), "--host", "0.0.0.0") as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.url, trust_env=False, timeout=60) as client:
            assert client.post("/v1/completions", json=LONG).status_code == 401
            client.headers["Authorization"] = f"Bearer {KEY}"
            with client.stream("POST", "/v1/completions", json=LONG) as response:
                lines = (line for line in response.iter_lines() if line)
                received = [next(lines)]
                process.signal(signal.SIGTERM)
                while (late := httpx.get(f"{process.url}/health", trust_env=False, timeout=60)).is_success:
                    pass  # the signal is on its way
                received += lines
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "shutting_down"
        assert received[-1] == "data: [DONE]"
        assert json.loads(received[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.stop() == 0
        output = process.output(100_000)
    assert "Zanzibar" not in output
    assert KEY not in output
    logged = [json.loads(line) for line in output.splitlines()]
    assert not [line for line in logged if line["level"] == "ERROR" and "timeout graceful" not in line["message"]]
    assert any("can be read by other users" in line["message"] for line in logged)
    statuses = [line["status"] for line in logged if line.get("path") == "/v1/completions"]
    assert statuses == [401, 200]
    assert {line["status"] for line in logged if line.get("path") == "/health"} == {503}


def test_a_server_on_all_addresses_and_with_small_limits() -> None:
    options = ("--host", "0.0.0.0", "--max-body", "1kB", "--request-timeout", "1", "--log-prompts")
    with ForkedServer("--pool-bytes", "64MiB", *options) as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.url, trust_env=False, timeout=60) as client:
            assert client.post("/v1/completions", content=b"x" * 1001).status_code == 413
            late = client.post("/v1/completions", json=LONG | {"stream": False, "max_tokens": 1900, "n": 16})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
        assert process.stop() == 0  # the last line is written after the answer
        output = process.output(100_000)
    assert "listening on 0.0.0.0 without API keys" in output
    assert "Zanzibar" in output


def test_the_command_lines_limits() -> None:
    given = ["serve", "--max-body", "2MiB", "--max-queue", "7", "--request-timeout", "30"]
    assert limits_from(cli._parser().parse_args(given)) == Limits(body_bytes=2 << 20, queue=7, seconds=30)
    assert limits_from(cli._parser().parse_args(["serve"])) == Limits()


def test_a_bad_file_of_keys_is_one_sentence(keys: Path) -> None:
    keys.write_text("alice")
    with (
        ForkedServer("--api-keys", str(keys)) as process,
        pytest.raises(ServerStartError, match="line 1: write a name"),
    ):
        process.wait_until_ready()
