"""What every tier promises, held against each of them: the same bytes or a miss, in time, and no exception."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from redis_process import RedisProcess, installed_servers
from tls_redis import tls_server
from waiting import until

from stemcache.api.server_process import free_port
from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.disk import FILES, MIN_BYTES, DiskTier
from stemcache.prefixtree.tiers.host import HostTier
from stemcache.prefixtree.tiers.open import open_tier
from stemcache.prefixtree.tiers.redis import RedisTier
from stemcache.prefixtree.tiers.tier import Miss, Refusal, Tier, tier_key

needs_redis = pytest.mark.skipif(not installed_servers(), reason="neither redis-server nor valkey-server is installed")
NAMESPACES = [bytes([i]) * 32 for i in (1, 2)]


def soon() -> float:
    return time.monotonic() + 20


def keys_of(namespace: bytes, count: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [tier_key(namespace, rng.randbytes(32)) for _ in range(count)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisProcess]:
    if not installed_servers():
        pytest.skip("neither redis-server nor valkey-server is installed")
    with RedisProcess("maxmemory 64mb", "maxmemory-policy allkeys-lru") as process:
        yield process


KINDS = ["host", "disk", "redis", "redis+ttl", "unix", "redis+cluster", "rediss"]


@pytest.fixture(params=KINDS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    match request.param:
        case "host":
            made: Tier = HostTier(64 << 20)
        case "disk":
            made = DiskTier(tmp_path, 64 << 20)
        case "redis+cluster":
            process = request.getfixturevalue("cluster")
            made = RedisTier(f"redis+cluster://127.0.0.1:{process.port}")
            until(lambda: made.stats().is_available)  # a busy machine may take longer than a probe may
        case "rediss":
            made = RedisTier(request.getfixturevalue("tls_url"))
        case kind:
            process = request.getfixturevalue("server")
            process.client().flushall()
            urls = {
                "redis": process.url,
                "redis+ttl": f"{process.url}/1?ttl=60&prefix=other",
                "unix": f"unix://{process.socket}?prefix=third",
            }
            made = RedisTier(urls[kind])
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisProcess]:
    """One node that has all slots: every command takes the way that it takes through a large cluster."""
    if not installed_servers():
        pytest.skip("neither redis-server nor valkey-server is installed")
    with RedisProcess("cluster-enabled yes", f"cluster-port {free_port()}") as process:
        client = process.client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
        yield process


@pytest.fixture(scope="module")
def tls_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not installed_servers():
        pytest.skip("neither redis-server nor valkey-server is installed")
    with tls_server(tmp_path_factory.mktemp("tls")) as (process, ca):
        yield f"rediss://127.0.0.1:{process.port}?ca={ca}"


def test_random_visits_against_a_dictionary(tier: Tier) -> None:
    rng, known = random.Random(5), {}
    keys = keys_of(NAMESPACES[0], 20) + keys_of(NAMESPACES[1], 20, seed=1)
    for _ in range(300):
        some = rng.sample(keys, rng.randrange(1, 6))
        match rng.choice(["store", "store", "load", "lookup", "touch", "delete"]):
            case "store":
                value = some[0] * rng.randrange(1, 3000)  # what it holds is its key's, as with chunks
                if some[0] not in known:
                    assert tier.store(some[0], value, soon()) is None
                    known[some[0]] = value
            case "load":
                wanted = [known.get(key, Miss.ABSENT) for key in some]
                assert tier.load(some, soon()) == wanted
            case "lookup":
                assert tier.lookup(some, soon()) == [key in known for key in some]
            case "touch":
                tier.touch(some)
            case "delete":
                assert tier.delete(some)
                for key in some:
                    known.pop(key, None)
    assert dict(tier.scan()) == {key: len(value) for key, value in known.items()}
    own = {key: len(value) for key, value in known.items() if key.startswith(NAMESPACES[0][:16])}
    assert dict(tier.scan(NAMESPACES[0])) == own
    assert own
    assert tier.delete_namespace(NAMESPACES[0])
    assert dict(tier.scan()).keys() == known.keys() - own.keys()
    stats = tier.stats()
    assert stats.is_available
    assert stats.stored_bytes > 0
    assert sum(stats.load_times) == stats.hits > 0
    assert stats.misses.keys() == {Miss.ABSENT}


def test_all_bytes_come_back(tier: Tier) -> None:
    rng = random.Random(3)
    values = [b"", b"\0", b"\r\n$-1\r\n", rng.randbytes(1 << 20), rng.randbytes((1 << 20) + 1)]
    keys = keys_of(NAMESPACES[0], len(values))
    for key, value in zip(keys, values, strict=True):
        assert tier.store(key, memoryview(value), soon()) is None
    assert [bytes(value) for value in tier.load(keys, soon())] == values


@pytest.mark.parametrize("tier", [kind for kind in KINDS if kind != "host"], indirect=True)  # memory needs no time
def test_a_deadline_that_has_passed_is_a_miss(tier: Tier) -> None:
    (key,) = keys_of(NAMESPACES[0], 1)
    tier.store(key, b"value", soon())
    assert tier.load([key], time.monotonic() - 1) == [Miss.DEADLINE]
    assert tier.load([key], soon()) == [b"value"]


def test_a_closed_tier_finds_and_keeps_nothing(tier: Tier) -> None:
    (key,) = keys_of(NAMESPACES[0], 1)
    tier.store(key, b"value", soon())
    tier.close()
    tier.close()
    assert tier.lookup([key], soon()) == [False]
    assert all(isinstance(value, Miss) for value in tier.load([key], soon()))
    assert tier.store(key, b"value", soon()) is not None
    tier.touch([key])
    tier.stats()


# -- host ------------------------------------------------------------------------------------------------------------


def test_host_memory_is_bounded_and_keeps_beginnings() -> None:
    evicted: dict[bytes, bytes] = {}
    host = HostTier(10_000, lambda key, value: evicted.__setitem__(key, bytes(value)))
    rng, parents = random.Random(1), {}
    paths: list[list[bytes]] = [keys_of(NAMESPACES[0], 6, seed=i) for i in range(30)]
    for path in paths:
        for i in reversed(range(6)):  # as the device evicts: leaves first
            parents[path[i]] = path[i - 1] if i else None
            host.store(path[i], bytes(rng.randrange(100, 700)), soon(), parent=parents[path[i]])
            host.check()
        if rng.random() < 0.5:
            host.touch(list(reversed(rng.choice(paths))))
    here = {key for key, _ in host.scan()}
    assert here
    assert evicted
    for key in here:
        assert parents[key] is None or parents[key] in here
    assert host.store(paths[0][0], bytes(10_001), soon()) is Refusal.TOO_LARGE


# -- disk ------------------------------------------------------------------------------------------------------------


def test_the_disk_is_bounded_and_forgets_the_oldest(tmp_path: Path) -> None:
    disk, rng = DiskTier(tmp_path, MIN_BYTES), random.Random(2)
    keys = keys_of(NAMESPACES[0], 300)
    for key in keys:
        assert disk.store(key, rng.randbytes(rng.randrange(1000, 500_000)), soon()) is None
        disk.touch(keys[:1])
    disk.check()
    kept = {key for key, _ in disk.scan()}
    assert keys[0] in kept, "what was used all the time is there"
    for file in range(FILES):
        here = [key in kept for key in keys[1:] if key[-1] % FILES == file]
        assert here == sorted(here), "of the others the oldest went"
        assert here[-1]
        assert not here[0]
    assert sum(file.stat().st_size for file in tmp_path.glob("*/data.mdb")) <= MIN_BYTES
    assert disk.store(keys[0], bytes(MIN_BYTES), soon()) is Refusal.TOO_LARGE
    disk.close()


def test_threads_store_side_by_side(tmp_path: Path) -> None:
    keys = keys_of(NAMESPACES[0], 40)
    with closing(DiskTier(tmp_path, MIN_BYTES)) as disk, ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda key: disk.store(key, key * 3000, soon()), keys))
        assert disk.load(keys, soon()) == [key * 3000 for key in keys]
        disk.check()


def test_the_disk_is_there_after_a_restart_and_from_two_places(tmp_path: Path) -> None:
    keys = keys_of(NAMESPACES[0], 4)
    disk = DiskTier(tmp_path, MIN_BYTES)
    for key in keys:
        disk.store(key, key * 1000, soon())
    disk.touch(keys[:1])
    disk.close()
    again = DiskTier(tmp_path, 2 * MIN_BYTES)
    again.check()
    assert again.load(keys, soon()) == [key * 1000 for key in keys]
    again.close()


def test_a_truncated_file_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others stay as they are."""
    disk, keys = DiskTier(tmp_path, MIN_BYTES), keys_of(NAMESPACES[0], 30)
    for key in keys:
        disk.store(key, key * 3000, soon())
    disk.close()
    file = tmp_path / "0" / "data.mdb"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    again = DiskTier(tmp_path, MIN_BYTES)
    found = again.lookup(keys, soon())
    assert found == [key[-1] % FILES != 0 for key in keys]
    assert set(found) == {True, False}, "keys of both kinds, or the line before says nothing"
    assert "begins anew" in caplog.text
    again.close()


def test_a_file_that_is_no_store_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "data.mdb").write_bytes(random.Random(1).randbytes(100_000))
    disk = DiskTier(tmp_path, MIN_BYTES)
    assert disk.stats().objects == 0
    disk.close()


def test_a_folder_of_which_a_part_cannot_be_used_is_refused_whole(tmp_path: Path) -> None:
    (tmp_path / str(FILES - 1)).write_text("a file where a folder belongs")
    with pytest.raises(TierError, match="cannot use"):
        DiskTier(tmp_path, MIN_BYTES)
    (tmp_path / str(FILES - 1)).unlink()
    DiskTier(tmp_path, MIN_BYTES).close()


# -- redis -----------------------------------------------------------------------------------------------------------


@needs_redis
def test_nothing_outside_of_the_prefix_is_touched(server: RedisProcess) -> None:
    client = server.client()
    client.flushall()
    client.set("theirs", "1")
    client.set("stemcacheother:ff:ff", "2")
    client.set("stemcache:not:ours", "3")
    tier = RedisTier(server.url)
    keys = keys_of(NAMESPACES[0], 3)
    for key in keys:
        tier.store(key, b"x", soon())
    assert {key for key, _ in tier.scan()} == set(keys)
    assert tier.delete_namespace(NAMESPACES[0])
    assert set(client.scan_iter()) == {b"theirs", b"stemcacheother:ff:ff", b"stemcache:not:ours"}
    tier.close()


@needs_redis
def test_a_time_to_live_is_renewed_by_use(server: RedisProcess) -> None:
    tier = RedisTier(f"{server.url}?ttl=100")
    (key,) = keys_of(NAMESPACES[0], 1)
    tier.store(key, b"x", soon())
    (name,) = [name for name in server.client().scan_iter() if bytes(name).endswith(key[16:].hex().encode())]
    for use in (lambda: tier.load([key], soon()), lambda: tier.touch([key])):
        server.client().expire(name, 10)
        use()
        assert server.client().ttl(name) > 50
    tier.close()


@needs_redis
@pytest.mark.parametrize(("policy", "warns"), [("noeviction", True), ("volatile-lru", True), ("allkeys-lfu", False)])
def test_a_policy_that_refuses_is_pointed_out(policy: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    with RedisProcess("maxmemory 64mb", f"maxmemory-policy {policy}") as process:
        tier = RedisTier(process.url)
        assert bool(tier.warnings) == warns
        assert ("allkeys-lru" in caplog.text) == warns
        tier.close()


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memcached://host", "off, disk, disk:///folder"),
        ("disk://folder", "three slashes"),
        ("redis://host:notaport", "cannot be read"),
        ("redis://host?nosuch=1", "nosuch"),
        ("redis://host?ttl=0", "ttl"),
        ("redis://host?ttl=soon", "cannot be read"),
        ("redis://host?prefix=a*b", "prefix"),
        ("redis://host/one", "database"),
        ("redis+sentinel://host", "service"),
        ("redis+cluster://host/3", "one database"),
        ("unix://", "socket"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_in_words(address: str, says: str) -> None:
    with pytest.raises(TierError, match=says):
        open_tier(address, max_bytes=MIN_BYTES)


def test_a_password_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    from stemcache.prefixtree.tiers.address import RedisAddress

    address = RedisAddress.parse("redis://user:hunter22@127.0.0.1:1/0", "other-secret")
    assert address.password == "hunter22"
    assert "hunter22" not in repr(address) + str(address)
    tier = RedisTier("redis://user:hunter22@127.0.0.1:1/0")
    assert "cannot be used now" in caplog.text
    assert "hunter22" not in caplog.text + str(tier.stats())
    tier.close()
