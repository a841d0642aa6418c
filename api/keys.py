"""API keys and the tenants that they stand for.

Invariant: a key is never kept, only its SHA-256; and how long a look-up takes says nothing about how much of a key was
right, nor which of the keys it was.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stemcache.prefixtree.errors import StemcacheError

_log = logging.getLogger(__name__)

MIN_KEY_LENGTH: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_READABLE_BY_OTHERS: Final = stat.S_IRGRP | stat.S_IROTH
# Where container engines mount a secret, for its one container and with whatever mode it has outside.
_MOUNTED: Final = Path("/run/secrets")


class KeyFileError(StemcacheError):
    """The file of API keys cannot be used; the message names the line, never the key."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request is served for. `id` decides which chunks it can find; `name` is for the log."""

    name: str
    id: bytes

    @classmethod
    def of(cls, name: str, secret: bytes) -> Tenant:
        """The tenant of a name. Without the server's secret nobody can tell which id a name has.

        A server without keys has one tenant, whose name is empty, as no key's name is.
        """
        return cls(name, hmac.digest(secret, b"stemcache.tenant.v1\0" + name.encode(), "sha256"))


class Keyring:
    """The keys that are let in. Keys of the same name are one tenant: so a key can be replaced without a pause."""

    def __init__(self, keys: Mapping[str, str], secret: bytes) -> None:
        """keys: name by key. secret: what tenants' ids are derived with."""
        self._tenants = [(_digest(key), Tenant.of(name, secret)) for key, name in keys.items()]

    @classmethod
    def load(cls, path: Path, secret: bytes) -> Keyring:
        """Read a file with `name key` in each line; blank lines and those that begin with # say nothing.

        Raises KeyFileError for a line that is none of these, OSError when the file cannot be read.
        """
        if path.stat().st_mode & _READABLE_BY_OTHERS and not path.is_relative_to(_MOUNTED):
            _log.warning("%s, the file of API keys, can be read by other users; run: chmod 600 %s", path, path)
        keys: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            try:
                name, key = _check(fields)
            except ValueError as error:
                raise KeyFileError(f"{path}, line {number}: {error}") from None
            if keys.setdefault(key, name) != name:
                raise KeyFileError(f"{path}, line {number}: the key of '{name}' is another name's too; make a new one")
        if not keys:
            raise KeyFileError(f"{path} holds no key; write 'name key' into a line")
        return cls(keys, secret)

    @property
    def tenants(self) -> list[Tenant]:
        """Each once."""
        return list(dict.fromkeys(tenant for _, tenant in self._tenants))

    def find(self, key: str) -> Tenant | None:
        """Whose key it is. All keys are compared, whether or not one has matched."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _check(fields: list[str]) -> tuple[str, str]:
    if len(fields) != 2:
        raise ValueError("write a name and a key, with a space between them")
    name, key = fields
    if not _NAME.fullmatch(name):
        raise ValueError("a name has up to 64 letters, digits, dots, dashes and underscores")
    if len(key) < MIN_KEY_LENGTH or not key.isascii():
        raise ValueError(
            f"the key of '{name}' needs at least {MIN_KEY_LENGTH} ASCII characters; try: openssl rand -hex 24"
        )
    return name, key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
