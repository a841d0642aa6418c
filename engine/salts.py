"""Salts: which cache salts a tenant has used lately, so that `explain` can say that a text is cached under another one.

Invariant: bounded, whatever clients send; what is forgotten is only no longer told. Requests never depend on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

MAX_TENANTS: Final = 1024
MAX_SALTS: Final = 32


class Salts:
    """The latest salts of the latest tenants. From any thread."""

    def __init__(self) -> None:
        self._of: OrderedDict[bytes, OrderedDict[bytes, None]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, tenant: bytes, salt: bytes) -> None:
        """A request of the tenant used the salt; b"" is no salt."""
        with self._lock:
            salts = self._of.setdefault(tenant, OrderedDict())
            self._of.move_to_end(tenant)
            salts[salt] = None
            salts.move_to_end(salt)
            if len(salts) > MAX_SALTS:
                salts.popitem(last=False)
            if len(self._of) > MAX_TENANTS:
                self._of.popitem(last=False)

    def of(self, tenant: bytes) -> list[bytes]:
        """The tenant's salts, the latest last."""
        with self._lock:
            return list(self._of.get(tenant, ()))
