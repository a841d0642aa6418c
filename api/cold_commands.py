"""`stemcache cache ls|stats|verify|clear --cold URL`: a cold tier as its administrator sees it, without a server.

Invariant: no token and no value is printed; nothing is deleted but by `clear` and by `verify --delete`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from stemcache.api.cold_options import address_from, seal_from
from stemcache.api.settings import Settings
from stemcache.prefixtree.errors import FrameError, TierError
from stemcache.prefixtree.frame import unpack
from stemcache.prefixtree.tiers.open import open_tier
from stemcache.prefixtree.tiers.tier import Miss, Tier

_LOAD_SECONDS: Final = 30.0
_DISK_BYTES: Final = 10 << 30
_DAMAGED: Final = 1
# What a healthy tier may hold all the same: a newer program's objects, and those of a server with another secret.
_FOREIGN: Final = frozenset({"version_newer", "mac"})


def run(options: argparse.Namespace) -> int:
    """Run the action. Raises StemcacheError."""
    settings = Settings.read()
    address = address_from(options.cold, settings)
    tier = open_tier(address, max_bytes=_DISK_BYTES, password=settings.cold_password)
    try:
        match options.action:
            case "ls":
                return _ls(tier)
            case "stats":
                return _stats(tier)
            case "verify":
                return _verify(tier, seal_from(settings), delete=options.delete)
            case _:
                return _clear(tier, options.namespace, yes=options.yes)
    finally:
        tier.close()


def _ls(tier: Tier) -> int:
    objects: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    with _progress("listing") as step:
        for key, size in tier.scan():
            objects[key[:16].hex()] += 1
            n_bytes[key[:16].hex()] += size
            step()
    table = Table(box=None, pad_edge=False)
    table.add_column("namespace", no_wrap=True)
    for title in ("objects", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for namespace, size in n_bytes.most_common():
        table.add_row(namespace, str(objects[namespace]), f"{size / 2**20:.1f}")
    Console(highlight=False).print(table if objects else "nothing is stored")
    return 0


def _stats(tier: Tier) -> int:
    if not tier.stats().is_available:
        raise TierError(f"the {tier.name} tier does not answer: {tier.stats().trouble}")
    objects = n_bytes = 0
    with _progress("counting") as step:
        for _, size in tier.scan():
            objects += 1
            n_bytes += size
            step()
    console = Console(highlight=False)
    console.print(f"{tier.name}: {objects} objects, {n_bytes / 2**20:.1f} MiB")
    for warning in getattr(tier, "warnings", ()):
        console.print(f"warning: {warning}", soft_wrap=True)
    return 0


def _verify(tier: Tier, secret: bytes | None, *, delete: bool) -> int:
    """Read and check every object; 1 if any is damaged."""
    found: Counter[str] = Counter()
    keys = [key for key, _ in tier.scan()]
    with _progress("verifying", len(keys)) as step:
        for key in keys:
            reason = _check(tier, key, secret)
            found[reason] += 1
            if delete and reason not in _FOREIGN | {"sound", *Miss}:
                tier.delete([key])
            step()
    console = Console(highlight=False)
    for reason, count in found.most_common():
        console.print(f"{count} {reason.replace('_', ' ')}")
    if not keys:
        console.print("nothing is stored")
    return _DAMAGED if found.keys() - _FOREIGN - {"sound", Miss.ABSENT} else 0


def _check(tier: Tier, key: bytes, secret: bytes | None) -> str:
    """Return "sound", or why an object is not."""
    with tier.reading(key, time.monotonic() + _LOAD_SECONDS) as value:
        if isinstance(value, Miss):
            return value
        try:
            frame = unpack(value, key[16:], secret=secret)
        except FrameError as error:
            return error.reason
        return "sound" if frame.header.namespace.digest[:16] == key[:16] else "namespace"


def _clear(tier: Tier, namespace: str | None, *, yes: bool) -> int:
    try:
        wanted = None if namespace is None else bytes.fromhex(namespace)
    except ValueError:
        wanted = b""
    if wanted is not None and len(wanted) != 16:
        raise TierError("a namespace is 32 hexadecimal digits, as `stemcache cache ls` shows them")
    keys = [key for key, _ in tier.scan(wanted)]
    if keys and not yes:
        if not sys.stdin.isatty():
            raise TierError(f"{len(keys)} objects would be deleted: say --yes")
        if input(f"Delete {len(keys)} objects from the {tier.name} tier? [y/N] ").strip().lower() not in ("y", "yes"):
            return 0
    with _progress("deleting", len(keys)) as step:
        for at in range(0, len(keys), 256):
            some = keys[at : at + 256]
            if not tier.delete(some):
                raise TierError(f"the {tier.name} tier stopped answering: {tier.stats().trouble}")
            for _ in some:
                step()
    Console(highlight=False).print(f"{len(keys)} objects deleted")
    return 0


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal; a call is one object."""
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
