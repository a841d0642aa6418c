"""`stemcache serve --cold` and `stemcache cache`: a server that is warm after a restart, and its tier looked after."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from forked import ForkedServer, run_command

from stemcache.api import cli
from stemcache.api.cold_options import EVERYBODY, address_from, seal_from, tenant_secret
from stemcache.api.server_process import free_port
from stemcache.api.settings import Settings
from stemcache.prefixtree.tiers.disk import DiskTier

SECRET = Settings.read({"STEMCACHE_SECRET": "s" * 32, "XDG_CACHE_HOME": "/caches"})
PLAIN = Settings.read({})


def ask(url: str) -> int:
    """Ask for an answer to a prompt of 600 tokens; how many of them were cached."""
    body = {"prompt": [5 + i % 400 for i in range(600)], "max_tokens": 2, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def value(metrics: str, name: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def test_a_server_is_warm_after_its_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dtype", "float32", "--pool-bytes", "64MiB", "--host-bytes", "16MiB", "--cold-codec", "lossless")
    options += ("--cold", f"disk://{tmp_path}", "--cold-bytes", "64MiB")
    with ForkedServer(*options) as server:
        server.wait_until_ready()
        assert ask(server.url) == 0
        assert server.stop() == 0  # which writes what waits
    with ForkedServer(*options) as server:
        server.wait_until_ready()
        ask(server.url)  # the first load of a busy machine may come too late; what came is there
        assert ask(server.url) >= 512
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=60).text
        assert value(metrics, 'stemcache_tier_up{tier="disk"}') == 1
        assert value(metrics, 'stemcache_tier_objects{tier="disk"}') == 3
        assert value(metrics, 'stemcache_tier_load_seconds_count{tier="disk"}') == value(
            metrics, 'stemcache_tier_hits_total{tier="disk"}'
        )
        tiers = httpx.get(f"{server.url}/v1/cache/stats", trust_env=False, timeout=60).json()["tiers"]
        assert list(tiers) == ["device", "host", "disk"]
        assert tiers["disk"]["objects"] == 3
        assert httpx.post(f"{server.url}/v1/cache/clear", trust_env=False, timeout=60).is_success
        assert (
            httpx.get(f"{server.url}/v1/cache/stats", trust_env=False, timeout=60).json()["tiers"]["disk"]["objects"]
            == 0
        )
        ask(server.url)
        assert server.stop() == 0

    def run(*words: str) -> tuple[int, str]:
        status = cli.main(["cache", *words, "--cold", f"disk://{tmp_path}"])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    status, listed = run("ls")
    namespace = listed.split()[-3]
    assert (status, len(namespace), listed.split()[-2]) == (0, 32, "3")
    assert run("stats")[1].startswith("disk: 3 objects")
    assert run("verify") == (0, "3 sound\n")
    tier = DiskTier(tmp_path, 64 << 20)
    (key, *_) = [key for key, _ in tier.scan()]
    tier.delete([key])
    tier.store(key, b"damaged", time.monotonic() + 9)
    tier.close()
    assert run("verify", "--delete") == (1, "2 sound\n1 truncated\n")
    assert run("verify") == (0, "2 sound\n")
    assert run("clear") == (2, "stemcache: 2 objects would be deleted: say --yes\n")
    assert run("clear", "--namespace", "xyz")[0] == 2
    assert run("clear", "--namespace", "00" * 16, "--yes") == (0, "0 objects deleted\n")
    assert run("clear", "--namespace", namespace, "--yes") == (0, "2 objects deleted\n")
    assert run("ls")[1] == run("verify")[1] == "nothing is stored\n"


def test_a_tier_that_is_not_there_is_told_when_it_should_forget() -> None:
    with ForkedServer("--cold", f"redis://127.0.0.1:{free_port()}", "--pool-bytes", "64MiB") as server:
        server.wait_until_ready()
        assert ask(server.url) == 0
        answer = httpx.post(f"{server.url}/v1/cache/clear", trust_env=False, timeout=60)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "tier_failed"
        assert "the redis tier did not answer" in error["message"]
        assert ask(server.url) == 0, "the device was cleared all the same"
        assert ask(server.url) >= 512


def test_a_tier_that_cannot_be_had_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "stats", "--cold", "redis://127.0.0.1:1"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert cli.main(["cache", "ls", "--cold", "ftp://host"]) == 2
    assert "off, disk" in capsys.readouterr().err
    for options, problem in (
        (("--cold", "disk:///proc/nothing/here"), "/proc/nothing/here"),
        (("--cold", "disk", "--cold-codec", "zip"), "zip"),
    ):
        ended = run_command("serve", "--port", "0", *options)  # not in this process, whose SIGTERM it would take
        assert ended.returncode == 2
        assert problem in ended.stderr


def test_the_tenant_of_a_server_without_keys_is_found_again(caplog: pytest.LogCaptureFixture) -> None:
    options = cli._parser().parse_args(["serve", "--cold", "redis://me:hidden@host/0"])
    off = cli._parser().parse_args(["serve"])
    assert tenant_secret(options, PLAIN, has_keys=False) == EVERYBODY
    assert tenant_secret(off, PLAIN, has_keys=False) == PLAIN.secret
    assert tenant_secret(options, SECRET, has_keys=False) == tenant_secret(options, SECRET, has_keys=True) == b"s" * 32
    assert not caplog.text
    assert tenant_secret(options, PLAIN, has_keys=True) == PLAIN.secret
    assert "STEMCACHE_SECRET" in caplog.text
    assert "hidden" not in caplog.text


def test_the_disk_lies_in_the_users_cache_folder() -> None:
    assert address_from("disk", SECRET) == "disk:///caches/stemcache/chunks"
    assert address_from("disk", PLAIN) == "disk"
    assert address_from("redis://host", SECRET) == "redis://host"
    assert seal_from(PLAIN) is None
    assert seal_from(SECRET) not in (None, b"s" * 32)
