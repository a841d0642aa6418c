"""The routes under /v1/cache: what is cached, why a prompt hits or misses, and what shall stay or go.

Invariant: a tenant sees and changes its own cache only; of the others it learns how full the pool is, nothing more. The
event loop never waits for the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fastapi import Body, FastAPI, Query, Request
from starlette.exceptions import HTTPException

from stemcache.api import cache_answers as answers
from stemcache.api.admission import Admission
from stemcache.api.answers import documented
from stemcache.api.cache_schemas import CacheQuery, PinPrompt, Prompt, RequestsQuery, StatsQuery, TreeQuery
from stemcache.api.cold_metrics import cold_answer
from stemcache.api.disconnect import until_disconnect
from stemcache.api.document_routes import space_of
from stemcache.api.errors import NotFoundError
from stemcache.api.explain import report
from stemcache.api.generation import Generation
from stemcache.api.generation import Prompt as Tokens
from stemcache.api.schemas import ChatRequest, CompletionRequest
from stemcache.api.tenant import tenant_id
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.outputs import Usage
from stemcache.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from stemcache.engine.cache import CacheStats
    from stemcache.engine.engine import Engine
    from stemcache.engine.pins import PinInfo
    from stemcache.ragcache.context_cache import ContextCache
    from stemcache.ragcache.preparation import Space
    from stemcache.ragcache.reuse import DocumentReuse

Json = dict[str, Any]
PromptsOf = Callable[[CompletionRequest | ChatRequest], Awaitable[list[Tokens]]]
Salted = Annotated[CacheQuery, Query()]


class Owner(TypedDict):
    """Whose chunks are meant: what `Engine.cache` takes."""

    tenant: bytes
    cache_salt: bytes


def _owner(salt: str | None) -> Owner:
    return {"tenant": tenant_id(), "cache_salt": (salt or "").encode()}


class CacheRoutes:
    """The routes. `prompts_of` reads prompts as the completion routes do; `show_text` allows the tree's text."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        prompts_of: PromptsOf,
        documents: ContextCache | None,
        *,
        show_text: bool,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._cache = engine.cache
        self._prompts_of = prompts_of
        self._documents = documents
        self._show_text = show_text

    def add_to(self, app: FastAPI) -> None:
        app.get("/v1/cache/stats", **documented(answers.CacheStatistics))(self.stats)
        app.get("/v1/cache/requests", **documented(answers.CacheRequests))(self.requests)
        app.get("/v1/cache/tree", **documented(answers.CacheTree))(self.tree)
        app.post("/v1/cache/explain", **documented(answers.CacheExplanation))(self.explain)
        app.post("/v1/cache/warm", **documented(answers.CacheWarm))(self.warm)
        app.post("/v1/cache/clear", **documented(answers.CacheClear))(self.clear)
        app.get("/v1/cache/pin", **documented(answers.CachePins))(self.pins)
        app.post("/v1/cache/pin", **documented(answers.CachePin))(self.pin)
        app.delete("/v1/cache/pin/{pin_id}", **documented(answers.CacheUnpin))(self.unpin)

    async def stats(self, query: Annotated[StatsQuery, Query()], request: Request) -> Json:
        """What is cached, in the whole pool and of the caller, and what the caller's requests found and missed."""
        owner = _owner(query.cache_salt)
        answer = _stats(await asyncio.to_thread(self._cache.stats, **owner))
        answer["tiers"] |= cold_answer(await asyncio.to_thread(self._engine.cold_stats))
        answer["tenant"]["first_token"] = self._admission.recent.first_tokens(**owner)
        space = space_of(query.cache_salt)
        answer["tenant"]["documents"] = await asyncio.to_thread(self._reuse, space, query.documents)
        return answer

    async def requests(self, query: Annotated[RequestsQuery, Query()], request: Request) -> Json:
        """The caller's latest requests, newest first: what of their prompts was found, and when their answer began."""
        found = self._admission.recent.latest(query.limit, **_owner(query.cache_salt))
        return {"object": "list", "data": found}

    async def tree(self, query: Annotated[TreeQuery, Query()], request: Request) -> Json:
        """The caller's prefix tree, level by level and latest first. Unbranched chains of chunks are one node.

        A node whose tier is "below" has left the device. A tier below it was given a copy, and may have lost it since.
        """
        if query.text and not self._show_text:
            raise HTTPException(403, "This server shows no cached text: start it with --show-cache-text.")
        return await asyncio.to_thread(self._draw, query, _owner(query.cache_salt))

    async def explain(self, body: Annotated[Prompt, Body()], request: Request) -> Json:
        """Why a completion or chat request, sent as it is, would find this much in the cache and not more."""
        tokens = (await self._prompt_of(body)).token_ids
        return await asyncio.to_thread(self._explain, tokens, _owner(body.cache_salt))

    async def warm(self, body: Annotated[Prompt, Body()], request: Request) -> Json:
        """Compute and cache the prompt of a completion or chat request, without an answer."""
        prompt = await self._prompt_of(body)
        tokens = prompt.token_ids
        usage = await self._compute(body, prompt, request)
        cached = await asyncio.to_thread(self._cache.cached_tokens, tokens, **_owner(body.cache_salt))
        return {"object": "cache.warm"} | _computed(usage, cached)

    async def pin(self, body: Annotated[PinPrompt, Body()], request: Request) -> Json:
        """Warm a prompt, and keep its whole chunks until the pin is deleted, expires, or must give way to a request."""
        prompt, owner = await self._prompt_of(body), _owner(body.cache_salt)
        tokens = prompt.token_ids
        await asyncio.to_thread(self._cache.require_pin_room, tokens, **owner)
        usage = await self._compute(body, prompt, request)
        pin = await asyncio.to_thread(self._cache.pin, tokens, seconds=body.ttl_seconds, **owner)
        return _pin(pin) | _computed(usage, pin.tokens)

    async def pins(self, query: Salted, request: Request) -> Json:
        """The caller's pins, oldest first."""
        pins = await asyncio.to_thread(self._cache.pins, **_owner(query.cache_salt))
        return {"object": "list", "data": [_pin(pin) for pin in pins]}

    async def unpin(self, pin_id: str, query: Salted, request: Request) -> Json:
        """End a pin. What it kept stays cached until room is needed."""
        if not await asyncio.to_thread(self._cache.unpin, pin_id, **_owner(query.cache_salt)):
            raise NotFoundError(
                f"There is no pin '{pin_id}': it was deleted, expired, or gave way to a request that needed its room.",
                code="pin_not_found",
            )
        return {"id": pin_id, "object": "cache.pin", "deleted": True}

    async def clear(self, query: Salted, request: Request) -> Json:
        """Evict the caller's chunks that no request and no pin holds."""
        cleared = await asyncio.to_thread(self._cache.clear, **_owner(query.cache_salt))
        return {
            "object": "cache.clear",
            "cleared_chunks": cleared,
            "cleared_tokens": cleared * self._cache.chunk_tokens,
        }

    async def _prompt_of(self, body: CompletionRequest | ChatRequest) -> Tokens:
        prompts = await self._prompts_of(body)
        if len(prompts) > 1:
            raise InvalidRequestError("this route takes one prompt, not a list of them", param="prompt")
        return prompts[0]

    async def _compute(self, body: CompletionRequest | ChatRequest, prompt: Tokens, request: Request) -> Usage:
        """Have a prompt computed, and with it cached, as a request that wants no answer."""
        admitted = self._admission.admit(body, 1)
        async with Generation.submit(admitted, [prompt], SamplingParams(max_tokens=0)) as generation:
            await until_disconnect(generation.collect(), request.receive)
        return generation.usage

    def _explain(self, tokens: list[int], owner: Owner) -> Json:
        return report(self._engine.explain(tokens, **owner), tokens, self._text)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._engine.prompts.decode(tokens, skip_special_tokens=False)

    def _reuse(self, space: Space, limit: int) -> list[Json]:
        if self._documents is None or not limit:
            return []
        size = self._engine.cache.layout.bytes_per_token
        return [_document(each, size) for each in self._documents.reuse(limit, space=space)]

    def _draw(self, query: TreeQuery, owner: Owner) -> Json:
        tree = self._cache.tree(query.max_nodes, max_depth=query.depth, with_tokens=query.text, **owner)
        size = tree.chunk_tokens
        return {
            "object": "cache.tree",
            "chunk_tokens": size,
            "cached_tokens": tree.cached_chunks * size,
            "shown_tokens": tree.shown_chunks * size,
            "below_tokens": tree.below_chunks * size,
            "children": tree.children,
            "hidden_children": tree.hidden_children,
            "nodes": [
                {
                    "id": branch.id,
                    "parent": branch.parent,
                    "start": branch.depth * size,
                    "depth": branch.depth,
                    "chunks": branch.chunks,
                    "tokens": branch.chunks * size,
                    "tier": "below" if branch.is_below else "device",
                    "stored_tokens": branch.stored_chunks * size,
                    "sharers": branch.sharers,
                    "children": branch.children,
                    "hidden_children": branch.hidden_children,
                    "idle_seconds": round(branch.idle_seconds, 3),
                }
                | ({"text": self._text(branch.token_ids)} if query.text else {})
                for branch in tree.branches
            ],
        }


def _computed(usage: Usage, cached_now: int) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "newly_cached_tokens": max(0, cached_now - usage.cached_tokens),
    }


def _pin(pin: PinInfo) -> Json:
    left = None if pin.expires_in is None else round(pin.expires_in, 3)
    return {"id": pin.id, "object": "cache.pin", "pinned_tokens": pin.tokens, "expires_in_seconds": left}


def _document(each: DocumentReuse, bytes_per_token: int) -> Json:
    cached = each.cached_tokens
    return {
        "id": each.document_id,
        "title": each.title,
        "tokens": each.tokens,
        "requests": each.requests,
        "tiers": {"device": {"tokens": {"cached": cached}, "bytes": {"cached": cached * bytes_per_token}}},
        "hit_tokens": each.hit_tokens,
        "moved_tokens": each.moved_tokens,
        "miss_tokens": each.miss_tokens,
        "misses": {
            "evicted": each.evicted_tokens,
            "unfinished_chunk": each.unfinished_tokens,
            "new": each.new_tokens,
        },
    }


def _stats(stats: CacheStats) -> Json:
    """By tier, so that further tiers stand beside the device."""
    size, bytes_each = stats.layout.chunk_tokens, stats.layout.bytes_per_chunk
    pool, own = stats.store, stats.own
    misses = {"evicted": own.evicted_tokens, "unfinished_chunk": own.unfinished_tokens, "new": own.new_tokens}
    return {
        "object": "cache.stats",
        "chunk_tokens": size,
        "bytes_per_token": stats.layout.bytes_per_token,
        "tiers": {
            "device": {
                "chunks": {
                    "total": pool.total_chunks,
                    "free": pool.free_chunks,
                    "cached": pool.cached_chunks,
                    "private": pool.private_chunks,
                    "leased": pool.leased_chunks,
                },
                "tokens": {"total": pool.total_chunks * size, "cached": pool.cached_chunks * size},
                "bytes": {"total": pool.total_chunks * bytes_each, "cached": pool.cached_chunks * bytes_each},
            }
        },
        "tenant": {
            "tiers": {
                "device": {
                    "chunks": {"cached": own.cached_chunks, "private": own.private_chunks, "leased": own.leased_chunks},
                    "tokens": {"cached": own.cached_chunks * size},
                    "bytes": {"cached": own.cached_chunks * bytes_each},
                    "hit_tokens": own.hit_tokens,
                    "evicted_chunks": own.evicted_chunks,
                }
            },
            "prompts": own.acquires,
            "hit_tokens": own.hit_tokens,
            "miss_tokens": sum(misses.values()),
            "misses": misses,
            "leases": own.leases,
            "pins": {"count": len(stats.pins), "tokens": sum(pin.tokens for pin in stats.pins)},
        },
    }
