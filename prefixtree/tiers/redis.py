"""Redis or Valkey as a tier: one key for each object, and nothing else on the server.

Invariant: no command names a key outside of the prefix. A server that does not answer costs one deadline, after which
it is left in peace for a while (see `redis_server`).

There is no index on the server: under `allkeys-lru` it would be evicted like everything else, and lie. The server's own
`maxmemory` and its policy do the eviction; paths are touched leaf to root, so that beginnings outlive what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

from redis.exceptions import OutOfMemoryError, RedisClusterException, RedisError

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.address import RedisAddress
from stemcache.prefixtree.tiers.redis_server import CALL_SECONDS, RedisServer, reason_of
from stemcache.prefixtree.tiers.tier import Miss, Refusal, TierCounters, TierStats, Value, namespace_prefix

T = TypeVar("T")

# Redis answers requests for a value of more than its memory by evicting everything else first; and values of over
# 4 MiB are slow. A chunk is far smaller.
MAX_VALUE_BYTES: Final = 64 << 20

FULL_PAUSE: Final = 2.0
"""Seconds without stores after the server said that it is full. Loads go on."""

_FAILURES: Final = (RedisError, RedisClusterException, OSError)
_BATCH: Final = 256


class RedisTier:
    """A server, a cluster, or a service of sentinels, by its address (see `address`).

    A server that is not there is no error: it is asked again and again in the background. Raises TierError for an
    address that cannot be read.
    """

    name = "redis"

    def __init__(self, url: str, *, password: str | None = None) -> None:
        self.counters = TierCounters()
        self._address = RedisAddress.parse(url, password)
        self._server = RedisServer(self._address)
        self._full_until = 0.0

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the server's settings, in sentences."""
        return self._server.warnings

    # -- what requests need ------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        names = [self._name(key) for key in keys]

        def ask(client: Any) -> list[bool]:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.exists(name)
            return [bool(found) for found in pipeline.execute()]

        found = self._server.ask(ask, deadline) if names else []
        if isinstance(found, Miss):
            self.counters.missed(found)
            return [False] * len(keys)
        return found

    def load(self, keys: Sequence[bytes], deadline: float) -> list[Value | Miss]:
        return [self._load(self._name(key), deadline) for key in keys]

    def reading(self, key: bytes, deadline: float) -> AbstractContextManager[Value | Miss]:
        return nullcontext(self.load([key], deadline)[0])

    def store(self, key: bytes, value: Value, deadline: float) -> Refusal | None:
        refusal = self._store(self._name(key), value, deadline)
        if refusal is None:
            self.counters.stored(len(value))
        else:
            self.counters.refused(refusal)
        return refusal

    def touch(self, keys: Sequence[bytes]) -> None:
        names, ttl = [self._name(key) for key in keys], self._address.ttl_seconds

        def touch(client: Any) -> None:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                if ttl is None:
                    pipeline.touch(name)
                else:
                    pipeline.expire(name, ttl)
            pipeline.execute()

        if names:
            self._server.ask(touch, time.monotonic() + CALL_SECONDS)

    def delete(self, keys: Iterable[bytes]) -> bool:
        return self._unlink(self._name(key) for key in keys)

    # -- administration ----------------------------------------------------------------------------------------------

    def delete_namespace(self, namespace: bytes) -> bool:
        try:
            names = list(self._scan_names(namespace))
        except TierError:
            return False
        return self._unlink(iter(names))

    def scan(self, namespace: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        for names in _batches(self._scan_names(namespace)):
            sizes = self._require(partial(_sizes, names))
            for name, size in zip(names, sizes, strict=True):
                key = self._key(name)
                if key is not None and size:  # 0: it went between the two commands
                    yield key, size

    def stats(self) -> TierStats:
        """What this process did; what the server holds is asked by `scan`, for it takes a walk over its keys."""
        return TierStats.of(
            self.name, self.counters, is_available=self._server.is_available, trouble=self._server.trouble
        )

    def close(self) -> None:
        self._server.close()

    # -- one command -------------------------------------------------------------------------------------------------

    def _load(self, name: bytes, deadline: float) -> Value | Miss:
        ttl, begin = self._address.ttl_seconds, time.monotonic()
        value: Value | Miss | None = self._server.ask(
            lambda client: client.get(name) if ttl is None else client.getex(name, ex=ttl), deadline
        )
        if value is None:
            value = Miss.ABSENT
        if isinstance(value, Miss):
            self.counters.missed(value)
            return value
        self.counters.loaded(len(value), time.monotonic() - begin)
        return value

    def _store(self, name: bytes, value: Value, deadline: float) -> Refusal | None:
        if len(value) > MAX_VALUE_BYTES:
            return Refusal.TOO_LARGE
        if time.monotonic() < self._full_until:
            return Refusal.FULL
        data = memoryview(value)
        try:
            missed = self._server.ask(lambda client: client.set(name, data, ex=self._address.ttl_seconds), deadline)
        except OutOfMemoryError:
            self._full_until = time.monotonic() + FULL_PAUSE
            return Refusal.FULL
        match missed:
            case Miss.DEADLINE:
                return Refusal.DEADLINE
            case Miss():
                return Refusal.UNAVAILABLE
            case _:
                return None

    def _unlink(self, names: Iterable[bytes]) -> bool:
        """One command a key, for a cluster has its keys on several nodes."""
        for some in _batches(names):
            gone = self._server.ask(partial(_unlinked, some), time.monotonic() + CALL_SECONDS)
            if isinstance(gone, Miss):
                return False
            with self.counters.lock:
                self.counters.deletions += gone
        return True

    def _scan_names(self, namespace: bytes | None) -> Iterator[bytes]:
        """Names under the prefix only. Raises TierError."""
        inside = "*" if namespace is None else f"{namespace_prefix(namespace).hex()}:*"
        pattern = f"{self._address.prefix}:{inside}"
        names = self._require(lambda client: client.scan_iter(match=pattern, count=1000))
        try:
            yield from names
        except _FAILURES as error:
            raise TierError(f"{self._address.shown} stopped answering: {reason_of(error)}") from None

    def _require(self, command: Callable[[Any], T]) -> T:
        found = self._server.ask(command, time.monotonic() + 10 * CALL_SECONDS)
        if isinstance(found, Miss):
            raise TierError(f"{self._address.shown} does not answer: {self._server.trouble}")
        return found

    # -- names -------------------------------------------------------------------------------------------------------

    def _name(self, key: bytes) -> bytes:
        """prefix:namespace:digest, in hexadecimal, for people who look at their server."""
        return f"{self._address.prefix}:{key[:16].hex()}:{key[16:].hex()}".encode()

    def _key(self, name: bytes) -> bytes | None:
        """The key of a name; None for a name that we did not make."""
        try:
            _, namespace, digest = name.decode().rsplit(":", 2)
            key = bytes.fromhex(namespace + digest)
        except ValueError:
            return None
        return key if self._name(key) == name else None


def _unlinked(names: Sequence[bytes], client: Any) -> int:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.unlink(name)
    return sum(pipeline.execute())


def _sizes(names: Sequence[bytes], client: Any) -> list[int]:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.strlen(name)
    return [0 if isinstance(size, Exception) else int(size) for size in pipeline.execute(raise_on_error=False)]


def _batches(names: Iterable[bytes]) -> Iterator[list[bytes]]:
    left = iter(names)
    while some := list(islice(left, _BATCH)):
        yield some
