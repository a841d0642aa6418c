"""Addresses of Redis servers: what `--cold redis://...` says, taken apart, and the client that it means.

Invariant: a password is in no message and in no `repr`.

    redis://[[user]:[password]@]host[:port][/db]      rediss:// the same over TLS
    unix://[user@]/path/to/socket[?db=0]
    redis+cluster://host[:port]                       rediss+cluster://
    redis+sentinel://host[:port][,host[:port]]/service[/db]   rediss+sentinel://

with the options ?prefix=NAME, ttl=SECONDS and ca=FILE (the certificates that the server's must be signed by).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.blobs import READ_BYTES, BlobParser, blob_packer
from stemcache.prefixtree.tiers.deadline import Deadline, TimedSocket

SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A parsed address. `shown` is fit for a log: it has no password."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    username: str | None
    password: str | None = field(repr=False)
    prefix: str
    ttl_seconds: int | None
    ca: str | None
    db: int
    service: str
    shown: str

    @classmethod
    def parse(cls, url: str, password: str | None = None) -> RedisAddress:
        """Raises TierError, which names what is wrong. password: where the address has none."""
        split = urlsplit(url)
        if split.scheme not in SCHEMES:
            raise TierError(f"a cold tier's address begins with one of {', '.join(s + '://' for s in SCHEMES)}")
        kind = split.scheme.partition("+")[2]
        try:
            options = _options(split.query)
            places = _hosts(split, 26379 if kind == "sentinel" else 6379) if split.scheme != "unix" else ()
            service, db = _path(split, kind, options)
            ttl = int(options["ttl"]) if "ttl" in options else None
        except ValueError as error:
            raise TierError(f"the cold tier's address {_shown(split)} cannot be read: {error}") from None
        if ttl is not None and ttl < 1:
            raise TierError("ttl must be at least 1 second")
        return cls(
            scheme=split.scheme,
            hosts=places,
            path=unquote(split.path),
            username=unquote(split.username) if split.username else None,
            password=unquote(split.password) if split.password else password,
            prefix=options.get("prefix", "stemcache"),
            ttl_seconds=ttl,
            ca=options.get("ca"),
            db=db,
            service=service,
            shown=_shown(split),
        )

    def connect(self, deadline: Deadline, *, connect_seconds: float, seconds: float) -> Redis | RedisCluster:
        """The client. Nothing is sent yet, but by a cluster's, which asks for its nodes and may raise RedisError."""
        common: dict[str, Any] = {
            "username": self.username,
            "password": self.password,
            "protocol": 2,  # servers before 6 have no other, and for blobs the third brings nothing
            "socket_timeout": seconds,
            "socket_read_size": READ_BYTES,
            "parser_class": BlobParser,
        }
        if self.scheme == "unix":
            return _single(deadline, UnixDomainSocketConnection, path=self.path, db=self.db, **common)
        common |= {"socket_connect_timeout": connect_seconds, "socket_keepalive": True}
        if self.scheme.startswith("rediss"):
            common |= {"ssl_ca_certs": self.ca} if self.ca else {}
        is_tls = self.scheme.startswith("rediss")
        if self.scheme.endswith("+cluster"):
            host, port = self.hosts[0]
            scheme = "rediss" if is_tls else "redis"
            return RedisCluster.from_url(
                f"{scheme}://{host}:{port}",
                connection_pool_class=_pool_class(deadline),
                retry=Retry(NoBackoff(), 1),
                **common,
            )
        if self.scheme.endswith("+sentinel"):
            connection = SentinelManagedSSLConnection if is_tls else SentinelManagedConnection
            sentinel: Any = Sentinel(self.hosts, sentinel_kwargs=_for_sentinels(common, is_tls))  # type: ignore[no-untyped-call]
            client: Redis = sentinel.master_for(
                self.service, connection_class=_timed(connection, deadline), db=self.db, retry=_once(), **common
            )
            return client
        host, port = self.hosts[0]
        return _single(deadline, SSLConnection if is_tls else Connection, host=host, port=port, db=self.db, **common)


def _once() -> Retry:
    """redis-py tries ten times by default: 59 s for one GET of a hung server."""
    return Retry(NoBackoff(), 0)


def _single(deadline: Deadline, connection: type[Any], **options: Any) -> Redis:
    return Redis(
        connection_pool=ConnectionPool(connection_class=_timed(connection, deadline), retry=_once(), **options)
    )


def _timed(connection: type[Any], deadline: Deadline) -> type[Any]:
    """A class of connections whose sockets obey `deadline`, and which copy large values no more than they must."""

    class Timed(connection):  # type: ignore[misc]
        def _connect(self) -> TimedSocket:
            return TimedSocket(super()._connect(), deadline)

        def _construct_command_packer(self, packer: Any) -> Any:
            return blob_packer(self)

    return Timed


def _pool_class(deadline: Deadline) -> type[ConnectionPool]:
    """A cluster makes one pool a node, of the class that it is given."""

    class Pool(ConnectionPool):
        def __init__(self, connection_class: type[Any] = Connection, **options: Any) -> None:
            super().__init__(connection_class=_timed(connection_class, deadline), **options)

    return Pool


def _for_sentinels(options: Mapping[str, Any], is_tls: bool) -> dict[str, Any]:
    """How sentinels are asked: as the server is, but without its user, for they have users of their own, or none."""
    kept = ("protocol", "socket_timeout", "socket_connect_timeout", "socket_keepalive", "ssl_ca_certs")
    return {name: options[name] for name in kept if name in options} | {"retry": _once(), "ssl": is_tls}


def _options(query: str) -> dict[str, str]:
    options = {name: values[-1] for name, values in parse_qs(query, strict_parsing=bool(query)).items()}
    unknown = options.keys() - {"prefix", "ttl", "ca", "db"}
    if unknown:
        raise ValueError(f"it has the unknown option {sorted(unknown)[0]!r}; known are prefix, ttl, ca and db")
    if not all(char.isalnum() or char in "_-." for char in options.get("prefix", "")):
        raise ValueError("a prefix has letters, digits, dots, dashes and underscores")
    return options


def _hosts(split: SplitResult, default_port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for each in split.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{each}")
        found.append((one.hostname or "localhost", one.port or default_port))
    return tuple(found)


def _path(split: SplitResult, kind: str, options: Mapping[str, str]) -> tuple[str, int]:
    """The sentinels' name of the service, and the number of the database."""
    db = options.get("db", "0")
    if split.scheme == "unix":
        if not split.path:
            raise ValueError("it names no socket: write unix:///path/to/socket")
        return "", int(db)
    parts = [part for part in split.path.split("/") if part]
    service = ""
    if kind == "sentinel":
        if not parts:
            raise ValueError("it names no service: write redis+sentinel://host/service")
        service = parts.pop(0)
    if parts:
        db = parts.pop(0)
    if parts or not db.isdecimal():
        raise ValueError(f"{split.path!r} is no number of a database")
    if kind == "cluster" and db != "0":
        raise ValueError("a cluster has one database, 0")
    return service, int(db)


def _shown(split: SplitResult) -> str:
    return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"
