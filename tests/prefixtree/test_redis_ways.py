"""The ways to a Redis server beside the plain one, with real servers: TLS, sentinels, a cluster that changes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis_process import RedisProcess, SentinelProcess, installed_servers
from tls_redis import tls_server
from waiting import until

from stemcache.api.server_process import free_port
from stemcache.prefixtree.tiers.redis import RedisTier
from stemcache.prefixtree.tiers.tier import Miss, tier_key

pytestmark = pytest.mark.skipif(not installed_servers(), reason="neither redis-server nor valkey-server is installed")

NAMESPACE = bytes(32)


def soon() -> float:
    return time.monotonic() + 20


def objects(count: int) -> dict[bytes, bytes]:
    rng = random.Random(count)
    return {tier_key(NAMESPACE, rng.randbytes(32)): rng.randbytes(1 << 16) for _ in range(count)}


def stores(tier: RedisTier, some: dict[bytes, bytes]) -> bool:
    return all(tier.store(key, value, soon()) is None for key, value in some.items())


def finds(tier: RedisTier, some: dict[bytes, bytes]) -> bool:
    return tier.load(list(some), soon()) == list(some.values())


@contextmanager
def opened(url: str) -> Iterator[RedisTier]:
    tier = RedisTier(url)
    try:
        yield tier
    finally:
        tier.close()


def test_a_server_whose_certificate_nobody_vouches_for_is_not_used(tmp_path: Path) -> None:
    some = objects(1)
    with tls_server(tmp_path) as (process, ca):
        with opened(f"rediss://127.0.0.1:{process.port}?ca={ca}") as tier:
            assert stores(tier, some)
            assert finds(tier, some)
        for url in (
            f"rediss://127.0.0.1:{process.port}",  # signed by an authority that the system does not know
            f"rediss://localhost:{process.port}?ca={ca}",  # made out to another name
            f"redis://127.0.0.1:{process.port}",  # plain text
        ):
            with opened(url) as tier:
                assert not tier.stats().is_available, url
                assert tier.load(list(some), soon()) == [Miss.UNAVAILABLE]
                assert not stores(tier, some)


def test_a_sentinel_names_the_server_and_after_its_end_another() -> None:
    some, more = objects(4), objects(5)
    with RedisProcess() as first, RedisProcess(f"replicaof 127.0.0.1 {first.port}") as second:
        until(lambda: second.client().info("replication")["master_link_status"] == "up")
        with SentinelProcess(first, "main") as sentinel, redis.Redis(port=sentinel.port) as asked:
            until(lambda: known_replicas(asked) == 1)
            with opened(f"redis+sentinel://127.0.0.1:{sentinel.port}/main") as tier:
                until(lambda: tier.stats().is_available)
                assert stores(tier, some)
                assert finds(tier, some)
                until(lambda: second.client().dbsize() == len(some))
                first.kill()
                assert not finds(tier, dict(list(some.items())[:1]))
                until(lambda: second.client().info("replication")["role"] == "master")
                until(lambda: finds(tier, some))  # the breaker probes on, and the sentinel names the new one
                assert stores(tier, more)
                assert finds(tier, more)


def known_replicas(asked: redis.Redis) -> int:
    try:
        return int(asked.sentinel_master("main")["num-slaves"])
    except (redis.RedisError, KeyError):
        return 0


def test_a_cluster_whose_slots_move_is_followed() -> None:
    """What lay in the slots is a miss; stores and loads go to the new owner from then on."""
    some, options = objects(32), ("cluster-enabled yes", "cluster-node-timeout 2000")
    with (
        RedisProcess(*options, f"cluster-port {free_port()}") as one,
        RedisProcess(*options, f"cluster-port {free_port()}") as two,
        one.client() as left,
        two.client() as right,
    ):
        left.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        right.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
        bus = right.config_get("cluster-port")["cluster-port"]
        left.execute_command("CLUSTER", "MEET", "127.0.0.1", two.port, bus)
        until(lambda: is_whole(left) and is_whole(right))
        with opened(f"redis+cluster://127.0.0.1:{one.port}") as tier:
            assert stores(tier, some)
            assert finds(tier, some)
            n_left = left.dbsize()
            assert 4 < n_left < 28, "both have some"
            for client in (left, right):
                client.execute_command("CLUSTER", "DELSLOTSRANGE", 0, 8191)
            right.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
            right.execute_command("CLUSTER", "BUMPEPOCH")
            until(lambda: is_whole(left) and is_whole(right))
            found = tier.load(list(some), soon())
            assert found.count(Miss.ABSENT) == n_left
            assert all(value in (Miss.ABSENT, own) for value, own in zip(found, some.values(), strict=True))
            assert stores(tier, some)
            assert finds(tier, some)
            assert right.dbsize() == len(some)


def is_whole(client: redis.Redis) -> bool:
    return b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=[])
