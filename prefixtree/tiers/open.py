"""A cold tier by its address: the one place that knows all kinds, and loads only the library that is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.tier import Tier


def cache_folder() -> Path:
    """The user's folder for what can be made anew, as the platform has it."""
    match sys.platform:
        case "darwin":
            return Path.home() / "Library" / "Caches" / "stemcache"
        case "win32":
            return Path.home() / "AppData" / "Local" / "stemcache" / "Cache"
        case _:
            return Path.home() / ".cache" / "stemcache"


def open_tier(address: str, *, max_bytes: int, password: str | None = None) -> Tier:
    """Open "disk", "disk:///folder" or a Redis address.

    max_bytes: what the disk's files may grow to; a server has its own limit.
    password: where a server's address has none.

    Raises:
        TierError: the address is none of these, the folder cannot be used, or a library is missing.
    """
    split = urlsplit(address)
    if address == "disk" or split.scheme == "disk":
        from stemcache.prefixtree.tiers.disk import DiskTier

        if split.netloc:
            raise TierError(f"a disk tier's address has three slashes: disk:///{split.netloc}{split.path}")
        folder = Path(unquote(split.path)) if split.scheme else cache_folder() / "chunks"
        return DiskTier(folder, max_bytes)
    if split.scheme == "unix" or split.scheme.partition("+")[0] in ("redis", "rediss"):
        try:
            import redis  # noqa: F401
        except ImportError:
            raise TierError("a Redis tier needs redis-py: pip install 'stemcache[redis]'") from None
        from stemcache.prefixtree.tiers.redis import RedisTier

        return RedisTier(address, password=password)
    raise TierError("a cold tier is off, disk, disk:///folder, or an address such as redis://host:6379")
