"""What stemcache takes from its environment. Nothing else reads it.

Secrets come this way or from files, never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment's part of the configuration.

    api_keys_file: STEMCACHE_API_KEYS_FILE, the file that `--api-keys` names.
    api_key: STEMCACHE_API_KEY, a single key for a server of one tenant.
    secret: STEMCACHE_SECRET, or the contents of the file STEMCACHE_SECRET_FILE; random where neither is given, and then
        no other process finds this one's chunks.
    embeddings_api_key: STEMCACHE_EMBEDDINGS_API_KEY, for the endpoint of `--embedder`.
    traces_endpoint: OTEL_EXPORTER_OTLP_ENDPOINT.
    has_secret: whether the secret was given, and will be the same at the next start.
    cold_password: STEMCACHE_COLD_PASSWORD, or the contents of the file STEMCACHE_COLD_PASSWORD_FILE, of the Redis
        server that `--cold` names.
    cache_home: XDG_CACHE_HOME.
    """

    api_keys_file: Path | None
    api_key: str | None
    secret: bytes
    embeddings_api_key: str | None
    traces_endpoint: str | None
    has_secret: bool = False
    cold_password: str | None = None
    cache_home: Path | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises OSError when a secret's file cannot be read."""
        keys_file = environ.get("STEMCACHE_API_KEYS_FILE")
        secret = _secret("STEMCACHE_SECRET", environ)
        return cls(
            api_keys_file=Path(keys_file) if keys_file else None,
            api_key=environ.get("STEMCACHE_API_KEY") or None,
            secret=secret or secrets.token_bytes(32),
            embeddings_api_key=environ.get("STEMCACHE_EMBEDDINGS_API_KEY") or None,
            traces_endpoint=environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
            has_secret=bool(secret),
            cold_password=_secret("STEMCACHE_COLD_PASSWORD", environ).decode() or None,
            cache_home=Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else None,
        )


def _secret(name: str, environ: Mapping[str, str]) -> bytes:
    """A variable's value, or the contents of the file that the variable with `_FILE` names; empty without either."""
    value, file = environ.get(name, ""), environ.get(f"{name}_FILE")
    return value.encode() if value or not file else Path(file).read_bytes().strip()


def client_api_key() -> str | None:
    """STEMCACHE_API_KEY: the key with which our own commands ask a server; None if it is not set or empty."""
    return os.environ.get("STEMCACHE_API_KEY") or None
