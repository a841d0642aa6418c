"""The cache as its owner may look at it and change it: statistics, a picture, explanations, pins, clearing.

Invariant: every method works on one namespace, that of a tenant or of one of its salts, and sees nothing of another
tenant's. All of them wait for the engine's running step, so they belong on a thread that may wait, never on an event
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stemcache.engine.forget import Forgotten
from stemcache.engine.loop import EngineLoop
from stemcache.engine.pins import PinInfo
from stemcache.engine.salts import Salts
from stemcache.prefixtree.explain import Explanation
from stemcache.prefixtree.footprint import Footprint
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.snapshot import TreeSnapshot
from stemcache.prefixtree.store import NamespaceStats, StoreStats


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One moment of the cache: the whole device pool, and what is one tenant's."""

    layout: KVLayout
    store: StoreStats
    own: NamespaceStats
    pins: tuple[PinInfo, ...]


class Cache:
    """`Engine.cache`. `tenant` and `cache_salt` are what `Engine.submit` takes. All methods raise EngineClosedError."""

    def __init__(
        self, loop: EngineLoop, layout: KVLayout, namespace: Callable[[bytes, bytes], Namespace], salts: Salts
    ) -> None:
        self._loop = loop
        self._salts = salts
        self._layout = layout
        self._namespace = namespace

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def chunk_tokens(self) -> int:
        return self._layout.chunk_tokens

    def stats(self, *, tenant: bytes = b"", cache_salt: bytes = b"") -> CacheStats:
        """A consistent snapshot, taken between two steps."""
        store, namespace = self._loop.store, self._namespace(tenant, cache_salt)
        return self._loop.call(
            lambda: CacheStats(
                self._layout,
                store.stats(),
                store.namespace_stats(namespace),
                tuple(self._loop.pins.of(namespace)),
            )
        )

    def tree(
        self,
        max_chunks: int,
        *,
        max_depth: int | None = None,
        with_tokens: bool = False,
        tenant: bytes = b"",
        cache_salt: bytes = b"",
    ) -> TreeSnapshot:
        """A picture of up to `max_chunks` chunks, down to `max_depth` chunks from the root.

        Also of chunks that left the device for a tier below, as far as they are remembered. No tier is asked.
        """
        namespace, spiller = self._namespace(tenant, cache_salt), self._loop.cold.spiller

        def draw() -> TreeSnapshot:
            spiller.settle()
            return self._loop.store.snapshot(
                namespace, max_chunks, max_depth=max_depth, with_tokens=with_tokens, below=spiller.below
            )

        return self._loop.call(draw)

    def explain(self, prompt: Sequence[int], *, tenant: bytes = b"", cache_salt: bytes = b"") -> Explanation:
        """What a request with this prompt would find now, and why not more. Its last token is computed in any case."""
        namespace, n_last = self._namespace(tenant, cache_salt), min(1, len(prompt))
        others = [self._namespace(tenant, salt) for salt in self._salts.of(tenant) if salt != cache_salt]
        return self._loop.call(lambda: self._loop.store.explain(prompt, namespace, n_last, others))

    def cached_tokens(self, prompt: Sequence[int], *, tenant: bytes = b"", cache_salt: bytes = b"") -> int:
        """How many leading tokens are cached now."""
        namespace = self._namespace(tenant, cache_salt)
        return self._loop.call(lambda: self._loop.store.match_tokens(prompt, namespace))

    def cached_of(self, prompts: Sequence[Sequence[int]], *, tenant: bytes = b"", cache_salt: bytes = b"") -> list[int]:
        """`cached_tokens` of several prompts, at one moment."""
        namespace = self._namespace(tenant, cache_salt)
        return self._loop.call(lambda: [self._loop.store.match_tokens(prompt, namespace) for prompt in prompts])

    def footprint(
        self, prompt: Sequence[int], start: int, stop: int, *, tenant: bytes = b"", cache_salt: bytes = b""
    ) -> Footprint:
        """What marks all that is, or will be, computed from the tokens [start, stop) of a prompt. Does not wait.

        Raises ValueError unless these are some of its tokens.
        """
        return Footprint.of(prompt, start, stop, self._namespace(tenant, cache_salt), self.chunk_tokens)

    def forget(self, footprints: Iterable[Footprint]) -> Forgotten:
        """Remove all that was computed from the marked tokens, in use or not, and overwrite it.

        Requests that use it start over, out of everybody else's sight, and answer the same. Pins on it end. Tiers below
        the device lose all that they hold of the namespaces: their objects have keys that only whole prompts lead to.
        Raises TierError if one of them did not answer: then call it again with the same footprints.
        """
        wanted = list(footprints)
        if not wanted:
            return Forgotten()
        with self._forgetting_below([Namespace(digest) for digest in {each.namespace for each in wanted}]):
            return self._loop.call(lambda: self._loop.forgetting.forget(wanted))

    def held(self, footprints: Iterable[Footprint]) -> set[Footprint]:
        """Those of the footprints that may mark something: cached, or of a request that runs or waits.

        With tiers below the device all of them: what a tier holds is found by whole prompts only.
        """
        wanted = list(footprints)
        if not wanted or self._loop.cold.tiers:
            return set(wanted)
        return self._loop.call(lambda: self._loop.forgetting.held(wanted))

    def clear(self, *, tenant: bytes = b"", cache_salt: bytes = b"") -> int:
        """Evict the tenant's chunks that no request and no pin holds, and delete what the tiers below have of them.

        Returns how many left the device. Raises TierError if a tier did not answer: then call it again.
        """
        namespace = self._namespace(tenant, cache_salt)
        with self._forgetting_below([namespace]):
            return self._loop.call(lambda: self._loop.store.clear(namespace))

    @contextmanager
    def _forgetting_below(self, namespaces: Sequence[Namespace]) -> Iterator[None]:
        """Delete what the tiers have of some namespaces, after the block has cleared the device of it.

        Raises TierError if a tier did not answer; what it could not delete is deleted by the same call, made again.
        """
        cold = self._loop.cold

        def block() -> None:
            for namespace in namespaces:
                cold.restorer.block(namespace)  # or what is loaded now would be back in a moment

        def unblock() -> None:
            for namespace in namespaces:
                cold.restorer.unblock(namespace)
                cold.spiller.below.forget(namespace)
                for node in self._loop.store.chunks(namespace):
                    node.is_cold = node.is_covered = False  # what is left goes to the tiers again, in its time

        self._loop.call(block)
        try:
            yield
            for namespace in namespaces:
                cold.forget(namespace)
        finally:
            self._loop.call(unblock)

    def require_pin_room(self, prompt: Sequence[int], *, tenant: bytes = b"", cache_salt: bytes = b"") -> None:
        """Raise InvalidRequestError unless the prompt may be pinned: to be asked before computing it for a pin."""
        namespace = self._namespace(tenant, cache_salt)
        self._loop.call(lambda: self._loop.pins.require_room(prompt, namespace))

    def pin(
        self, prompt: Sequence[int], *, seconds: float | None = None, tenant: bytes = b"", cache_salt: bytes = b""
    ) -> PinInfo:
        """Keep what is cached of a prompt, in whole chunks, from being evicted; for so long, or until `unpin`.

        Raises InvalidRequestError when pins would hold more than their share of the pool, or the prompt has no whole
        chunk.
        """
        namespace = self._namespace(tenant, cache_salt)
        return self._loop.call(lambda: self._loop.pins.add(prompt, namespace, seconds))

    def pins(self, *, tenant: bytes = b"", cache_salt: bytes = b"") -> list[PinInfo]:
        """The tenant's pins, oldest first."""
        namespace = self._namespace(tenant, cache_salt)
        return self._loop.call(lambda: self._loop.pins.of(namespace))

    def unpin(self, pin_id: str, *, tenant: bytes = b"", cache_salt: bytes = b"") -> bool:
        """End a pin; False if the tenant has none of that id."""
        namespace = self._namespace(tenant, cache_salt)
        return self._loop.call(lambda: self._loop.pins.remove(pin_id, namespace))
