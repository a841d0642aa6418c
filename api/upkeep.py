"""Upkeep: what a server does for its documents while nobody asks.

Invariant: it never stands in anybody's way: it begins when the server does, ends with it, and what fails is told in the
log and tried again the next time. Expired documents also leave when somebody looks at documents; this is for the quiet
hours, as their keys and values must not outlive them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from stemcache.api.keys import Tenant
from stemcache.engine.errors import EngineClosedError
from stemcache.prefixtree.errors import StemcacheError

if TYPE_CHECKING:
    from stemcache.ragcache.context_cache import ContextCache

_log = logging.getLogger(__name__)


class Upkeep:
    """`with Upkeep(documents, tenants):` pins again what is remembered as pinned, then looks for expired documents.

    seconds: between two looks; one reads an index of the catalogue.
    """

    def __init__(self, documents: ContextCache, tenants: Sequence[Tenant], *, seconds: float = 5.0) -> None:
        self._documents = documents
        self._tenants = tenants
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stemcache-upkeep", daemon=True)

    def __enter__(self) -> Upkeep:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._pin_again()
            while not self._stop.wait(self._seconds):
                try:
                    self._documents.expire()
                except EngineClosedError:
                    raise
                except StemcacheError as error:
                    _log.warning("expired documents could not be deleted: %s", error)
        except EngineClosedError:
            _log.debug("the engine is closed: no more upkeep")

    def _pin_again(self) -> None:
        from stemcache.ragcache.preparation import Space

        for tenant in self._tenants:
            try:
                space = Space(tenant.name, tenant.id)
                pinned = self._documents.warm_pinned(space=space, should_stop=self._stop.is_set)
            except EngineClosedError:
                raise
            except StemcacheError as error:
                _log.warning("documents could not be pinned again: %s", error)
            else:
                if pinned:
                    _log.info("%d documents are pinned again", pinned)
