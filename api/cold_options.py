"""What of the command line and the environment decides the tiers below the device."""

from __future__ import annotations

import argparse
import hmac
import logging
from typing import TYPE_CHECKING, Final

from stemcache.api.cli_options import size

if TYPE_CHECKING:
    from stemcache.api.settings import Settings
    from stemcache.engine.cold import ColdOptions

_log = logging.getLogger(__name__)

POLICIES: Final = ("write-back", "write-through", "write-through-on-second-use")  # ColdPolicy, without loading torch

# A server without keys and without a secret has one tenant, everybody. With a cold tier its id must be the same after a
# restart and on the next machine.
EVERYBODY: Final = b"stemcache.everybody"


def add_cold_options(parser: argparse.ArgumentParser) -> None:
    """`--cold` and what belongs to it."""
    parser.add_argument(
        "--cold",
        default="off",
        metavar="off|disk|URL",
        help="where chunks go that outlive the pool and the process: off, disk, disk:///folder, redis://, rediss://, "
        "unix://, redis+cluster:// or redis+sentinel:// (default: off)",
    )
    parser.add_argument(
        "--host-bytes", type=size, default="0", help="host memory for chunks that the pool evicts (default: none)"
    )
    parser.add_argument(
        "--cold-bytes", type=size, default="10GiB", help="what the disk tier may grow to (default: %(default)s)"
    )
    parser.add_argument(
        "--cold-policy",
        choices=POLICIES,
        default="write-through",
        help="when a chunk goes to the cold tier (default: %(default)s)",
    )
    parser.add_argument(
        "--cold-codec",
        default="raw",
        metavar="CODEC",
        help="how chunks are stored: raw or lossless; others change answers (default: %(default)s)",
    )


def cold_from(options: argparse.Namespace, settings: Settings) -> ColdOptions:
    """The tiers that the command line asks for."""
    from stemcache.engine.cold import ColdOptions
    from stemcache.engine.spill import ColdPolicy

    return ColdOptions(
        cold=address_from(options.cold, settings),
        host_bytes=options.host_bytes,
        cold_bytes=options.cold_bytes,
        policy=ColdPolicy(options.cold_policy),
        codec=options.cold_codec,
        password=settings.cold_password,
        secret=seal_from(settings),
    )


def address_from(address: str, settings: Settings) -> str:
    """The tier's address, with the user's own cache folder where none is named."""
    if address == "disk" and settings.cache_home is not None:
        return (settings.cache_home / "stemcache" / "chunks").absolute().as_uri().replace("file://", "disk://", 1)
    return address


def seal_from(settings: Settings) -> bytes | None:
    """The secret with which stored chunks are sealed; None where the server was given none of its own."""
    return hmac.digest(settings.secret, b"stemcache.cold.v1", "sha256") if settings.has_secret else None


def tenant_secret(options: argparse.Namespace, settings: Settings, *, has_keys: bool) -> bytes:
    """The secret of which tenants' ids are made.

    One that is drawn anew at each start would make all of a cold tier unreachable.
    """
    if settings.has_secret or options.cold == "off":
        return settings.secret
    if has_keys:
        _log.warning(
            "what is stored in %s will not be found after a restart: set STEMCACHE_SECRET, from which the tenants' ids "
            "are made",
            options.cold.partition("?")[0].rpartition("@")[2],
        )
        return settings.secret
    return EVERYBODY
