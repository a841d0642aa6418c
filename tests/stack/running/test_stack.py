"""The stack of docker-compose.yml as plain processes: the same commands, environment and secrets, on free ports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from stack_local import ROOT, load, plan, running

from stemcache.api.server_process import free_port

PROMPT = "You answer questions about the harbor. The harbor has three cranes, and the tower has a bell. " * 6
SMALL = {"STEMCACHE_POOL_BYTES": "16MiB", "STEMCACHE_HOST_BYTES": "4MiB", "STEMCACHE_COLD_BYTES": "64mb"}


@dataclass(frozen=True)
class Stack:
    """Where its parts are, and with which secrets."""

    ports: dict[str, int]
    secrets: Path
    folder: Path

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    @property
    def key(self) -> str:
        return self.secret("api-keys").split()[1]

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.ports['stemcache']}", headers=headers, trust_env=False, timeout=60
        )

    def valkey(self, user: str | None, password: str | None) -> Redis:
        return Redis(port=self.ports["valkey"], username=user, password=password, decode_responses=True)

    def run(self, *names: str) -> Callable[[], AbstractContextManager[object]]:
        """What starts some of its services."""
        environ = SMALL | {"STEMCACHE_SECRETS": str(self.secrets)}
        processes = plan(load(environ), names, self.ports, self.folder)
        return lambda: running(processes)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    subprocess.run(["sh", ROOT / "deploy/make-secrets.sh", folder / "secrets"], check=True, capture_output=True)
    made = Stack({name: free_port() for name in ("valkey", "stemcache", "prometheus")}, folder / "secrets", folder)
    with made.run("valkey")():
        yield made


@pytest.fixture(scope="module")
def endpoint(stack: Stack) -> Iterator[httpx.Client]:
    with stack.run("stemcache")(), stack.client(stack.key) as client:
        yield client


def cached(client: httpx.Client) -> int:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def value_of(text: str, sample: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{sample} "))


def test_a_prompt_outlives_the_endpoint_in_valkey(stack: Stack, endpoint: httpx.Client) -> None:
    assert cached(endpoint) == 0
    assert cached(endpoint) > 100
    admin = stack.valkey("stemcache", stack.secret("valkey-password"))
    deadline = time.monotonic() + 60
    while not any(admin.scan_iter("stemcache:*")):
        assert time.monotonic() < deadline, "nothing was written through"
        time.sleep(0.05)
    # `endpoint` is still up; a second process on a port of its own begins with an empty pool.
    again = Stack(stack.ports | {"stemcache": free_port()}, stack.secrets, stack.folder)
    (process,) = plan(load(SMALL | {"STEMCACHE_SECRETS": str(stack.secrets)}), ["stemcache"], again.ports, stack.folder)
    process.command[:] = [part for part in process.command if not part.startswith("--documents")]
    with running([process]), again.client(again.key) as client:
        explained = client.post("/v1/cache/explain", json={"prompt": PROMPT}).json()
        assert explained["cached_tokens"] == 0
        found = cached(client)
        tiers = client.get("/v1/cache/stats").json()["tiers"]
        assert found == tiers["redis"]["restored_tokens"] > 100
        assert tiers["redis"]["available"]
        assert tiers["redis"]["misses"].keys() <= {"absent"}
        with again.client(again.secret("metrics-key")) as other:
            assert cached(other) == 0, "another key is another tenant"


def test_the_endpoint_asks_for_keys_but_for_its_health_and_page(stack: Stack, endpoint: httpx.Client) -> None:
    with stack.client(None) as nobody:
        assert nobody.get("/health").json()["status"] == "ok"
        assert nobody.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/cache/stats"):
            assert nobody.get(path).status_code == 401
    with stack.client(stack.secret("metrics-key")) as prometheus:
        text = prometheus.get("/metrics").text
    assert value_of(text, 'stemcache_tier_up{tier="redis"}') == 1
    assert endpoint.get("/v1/models").json()["data"][0]["id"] == "stemcache-demo"


def test_valkey_is_configured_as_a_cache_and_lets_nobody_else_in(stack: Stack) -> None:
    own = stack.valkey("stemcache", stack.secret("valkey-password"))
    config = {name: own.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy", "save", "appendonly")}
    assert config == {"maxmemory": str(64 << 20), "maxmemory-policy": "allkeys-lru", "save": "", "appendonly": "no"}
    for command in (["SET", "other:key", "x"], ["FLUSHALL"], ["CONFIG", "SET", "save", "1 1"], ["KEYS", "*"]):
        with pytest.raises(NoPermissionError):
            own.execute_command(*command)
    nobody = stack.valkey(None, None)
    assert nobody.ping()
    for command in (["GET", "stemcache:x"], ["INFO"], ["SCAN", "0"]):
        with pytest.raises(NoPermissionError):
            nobody.execute_command(*command)
    with pytest.raises(AuthenticationError):
        stack.valkey("stemcache", "wrong").ping()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_reads_the_endpoint(stack: Stack, endpoint: httpx.Client) -> None:
    cached(endpoint)
    base = f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1"
    with stack.run("prometheus")():
        deadline = time.monotonic() + 60
        while True:
            targets = httpx.get(f"{base}/targets", trust_env=False, timeout=60).json()["data"]["activeTargets"]
            if targets and targets[0]["health"] != "unknown":
                break
            assert time.monotonic() < deadline, "it was never asked"
            time.sleep(0.2)
        assert (targets[0]["health"], targets[0]["lastError"]) == ("up", "")
        found = httpx.get(
            f"{base}/query", params={"query": "stemcache_prompt_tokens_total"}, trust_env=False, timeout=60
        ).json()
        assert float(found["data"]["result"][0]["value"][1]) > 100


def test_make_stack_local_starts_and_ends(tmp_path: Path) -> None:
    ports = {name: free_port() for name in ("endpoint", "valkey", "prometheus")}
    arguments = [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
    environ = os.environ | SMALL | {"STEMCACHE_SECRETS": str(tmp_path / "secrets")}
    command = [sys.executable, ROOT / "scripts/stack_local.py", *arguments]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "stemcache listens" in line:
                break
        health = httpx.get(f"http://127.0.0.1:{ports['endpoint']}/health", trust_env=False, timeout=60)
        assert health.json()["status"] == "ok", lines
        process.terminate()
        assert process.wait(60) == 0
    for port in ports.values():
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
