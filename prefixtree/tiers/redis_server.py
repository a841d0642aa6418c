"""A Redis server as it is asked here: under a deadline, and not while it is left in peace.

Invariants: `ask` is back by its deadline, raises nothing but that the server is full, and sends nothing while the
breaker is open; a thread asks in the background whether the server answers again. No message holds a value, a key's
bytes or a password.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, OutOfMemoryError

from stemcache.prefixtree.tiers.address import RedisAddress
from stemcache.prefixtree.tiers.breaker import CircuitBreaker, Prober
from stemcache.prefixtree.tiers.deadline import Deadline
from stemcache.prefixtree.tiers.tier import Miss

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_SECONDS: Final = 0.5
CALL_SECONDS: Final = 1.0
"""For what has no deadline of its own: probes, touches, deletions. A load's is its caller's."""

_DENIALS: Final = (AuthenticationError, AuthorizationError, NoPermissionError)


class RedisServer:
    """A server, a cluster, or a service of sentinels. One that is not there is no error.

    Attributes:
        warnings: what is wrong with its settings, in sentences.
        trouble: what it last failed with, in a sentence; None if all is well.
    """

    def __init__(self, address: RedisAddress) -> None:
        self.warnings: list[str] = []
        self.trouble: str | None = None
        self._address = address
        self._deadline = Deadline()
        self._client: Any = None
        self._breaker = CircuitBreaker()
        self._closed = False
        self.probe()
        self._prober = Prober(self._breaker, self._probe, "stemcache-redis-probe")

    @property
    def is_available(self) -> bool:
        """False while it is left in peace."""
        return not self._breaker.is_open

    def ask(self, command: Callable[[Any], T], deadline: float) -> T | Miss:
        """Give the client to `command` and return its answer, or why there is none. Raises OutOfMemoryError only."""
        if self._closed or self._breaker.is_open:
            return Miss.UNAVAILABLE
        if time.monotonic() >= deadline:
            return Miss.DEADLINE
        try:
            with self._deadline.until(deadline):
                answer = command(self._connected())
        except OutOfMemoryError:
            raise
        except Exception as error:  # RedisError and OSError, and whatever else the library makes of garbage
            self._note(error)
            return Miss.DEADLINE if time.monotonic() >= deadline else Miss.UNAVAILABLE
        self._breaker.succeeded()
        return answer

    def probe(self) -> None:
        """Ask it now, and note in `trouble` what is wrong."""
        try:
            self._probe()
        except Exception as error:
            log.warning("the cold tier %s cannot be used now: %s", self._address.shown, reason_of(error))
            self._breaker.trip(pause=30.0 if isinstance(error, _DENIALS) else 0.5)

    def close(self) -> None:
        """Let go of it; idempotent. Later nothing is asked."""
        if not self._closed:
            self._closed = True
            self._prober.close()
            if self._client is not None:
                self._client.close()

    def _note(self, error: Exception) -> None:
        was_open = self._breaker.is_open
        self.trouble = reason_of(error)
        if isinstance(error, _DENIALS):
            self._breaker.trip(pause=30.0)
        else:
            self._breaker.failed()
        if self._breaker.is_open and not was_open:
            log.warning("the cold tier %s is left in peace for a while: %s", self._address.shown, self.trouble)
            self._prober.wake()

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._address.connect(self._deadline, connect_seconds=CONNECT_SECONDS, seconds=CALL_SECONDS)
        return self._client

    def _probe(self) -> None:
        """Raise unless the server answers a ping and a read."""
        was_down = self.trouble is not None
        try:
            with self._deadline.until(time.monotonic() + CALL_SECONDS):
                client = self._connected()
                client.ping()
                client.get(f"{self._address.prefix}:probe")
        except Exception as error:
            self.trouble = reason_of(error)
            raise
        self.trouble = None
        if was_down:
            log.warning("the cold tier %s answers again", self._address.shown)
        self._check_policy(client)

    def _check_policy(self, client: Any) -> None:
        """Say so once if the server will refuse stores when it is full, rather than make room."""
        if self.warnings:
            return
        try:
            with self._deadline.until(time.monotonic() + CALL_SECONDS):
                found = client.config_get("maxmemory*")
        except Exception:  # servers of a provider often forbid the question
            return
        policy, limit = found.get("maxmemory-policy", ""), found.get("maxmemory", "")
        if policy == "noeviction" or (policy.startswith("volatile") and self._address.ttl_seconds is None):
            self.warnings.append(
                f"the Redis server {self._address.shown} has maxmemory-policy {policy}: once full it keeps "
                "what it has and refuses what is new; set maxmemory-policy to allkeys-lru"
            )
        elif limit == "0":
            self.warnings.append(
                f"the Redis server {self._address.shown} has no maxmemory: it takes what memory its machine has; "
                "set maxmemory, such as 4gb"
            )
        for warning in self.warnings:
            log.warning(warning)


def reason_of(error: BaseException) -> str:
    """An error in words. The library's own message may quote a command with its values, so only some are repeated."""
    if isinstance(error, _DENIALS):
        return "it refuses the user or password, or what they may do (see --cold and STEMCACHE_COLD_PASSWORD)"
    if isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError":
        return "it did not answer in time"
    if isinstance(error, OSError) or type(error).__name__ in ("ConnectionError", "BusyLoadingError"):
        return f"no connection ({type(error).__name__})"
    return type(error).__name__
