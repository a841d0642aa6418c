"""The answers' shapes of the cache routes, for the OpenAPI description.

Invariant: as in `answers`: the routes build plain dictionaries, and the tests hold the two against each other.
"""

from __future__ import annotations

from typing import Literal

from stemcache.api.answers import Answer


class RangeAnswer(Answer):
    start: int
    stop: int
    tokens: int
    result: Literal["hit", "miss"]
    reason: str
    why: str
    text: str


class DivergenceAnswer(Answer):
    token: int
    before: str
    prompt: str
    cached: str


class CacheExplanation(Answer):
    """POST /v1/cache/explain."""

    object: Literal["cache.explanation"]
    prompt_tokens: int
    cached_tokens: int
    chunk_tokens: int
    ranges: list[RangeAnswer]
    divergence: DivergenceAnswer | None
    advice: list[str]
    searched_all: bool


class CacheWarm(Answer):
    """POST /v1/cache/warm."""

    object: Literal["cache.warm"]
    prompt_tokens: int
    cached_tokens: int
    newly_cached_tokens: int


class PinEntry(Answer):
    id: str
    object: Literal["cache.pin"]
    pinned_tokens: int
    expires_in_seconds: float | None


class CachePin(PinEntry):
    """POST /v1/cache/pin."""

    prompt_tokens: int
    cached_tokens: int
    newly_cached_tokens: int


class CachePins(Answer):
    """GET /v1/cache/pin."""

    object: Literal["list"]
    data: list[PinEntry]


class CacheUnpin(Answer):
    """DELETE /v1/cache/pin/{id}."""

    id: str
    object: Literal["cache.pin"]
    deleted: Literal[True]


class CacheClear(Answer):
    """POST /v1/cache/clear."""

    object: Literal["cache.clear"]
    cleared_chunks: int
    cleared_tokens: int


class PoolChunks(Answer):
    total: int
    free: int
    cached: int
    private: int
    leased: int


class OwnChunks(Answer):
    cached: int
    private: int
    leased: int


class PoolAmount(Answer):
    total: int
    cached: int


class OwnAmount(Answer):
    cached: int


class PoolTier(Answer):
    chunks: PoolChunks
    tokens: PoolAmount
    bytes: PoolAmount


class ColdAmount(Answer):
    """None where the tier cannot tell."""

    total: int | None
    cached: int | None


class ColdTier(Answer):
    available: bool
    objects: int | None
    bytes: ColdAmount
    hits: int
    misses: dict[str, int]
    stores: int
    refusals: dict[str, int]
    evictions: int
    loaded_bytes: int
    stored_bytes: int
    load_seconds: float
    restored_tokens: int
    trouble: str | None


class OwnTier(Answer):
    chunks: OwnChunks
    tokens: OwnAmount
    bytes: OwnAmount
    hit_tokens: int
    evicted_chunks: int


class Misses(Answer):
    evicted: int
    unfinished_chunk: int
    new: int


class PinTotals(Answer):
    count: int
    tokens: int


class FirstTokens(Answer):
    requests: int
    median_seconds: float | None


class FirstTokenTimes(Answer):
    """Of the latest requests: those of whose prompt more than half was found, and the others."""

    cached: FirstTokens
    computed: FirstTokens


class DocumentTier(Answer):
    tokens: OwnAmount
    bytes: OwnAmount


class DocumentReuseAnswer(Answer):
    id: str
    title: str
    tokens: int
    requests: int
    tiers: dict[str, DocumentTier]
    hit_tokens: int
    moved_tokens: int
    miss_tokens: int
    misses: Misses


class TenantStatistics(Answer):
    tiers: dict[str, OwnTier]
    prompts: int
    hit_tokens: int
    miss_tokens: int
    misses: Misses
    leases: int
    pins: PinTotals
    first_token: FirstTokenTimes
    documents: list[DocumentReuseAnswer]


class CacheStatistics(Answer):
    """GET /v1/cache/stats."""

    object: Literal["cache.stats"]
    chunk_tokens: int
    bytes_per_token: int
    tiers: dict[str, PoolTier | ColdTier]
    tenant: TenantStatistics


class TreeNode(Answer):
    id: str
    parent: str | None
    start: int
    depth: int
    chunks: int
    tokens: int
    tier: Literal["device", "below"]
    stored_tokens: int
    sharers: int
    children: int
    hidden_children: int
    idle_seconds: float
    text: str | None = None


class CacheTree(Answer):
    """GET /v1/cache/tree."""

    object: Literal["cache.tree"]
    chunk_tokens: int
    cached_tokens: int
    shown_tokens: int
    below_tokens: int
    children: int
    hidden_children: int
    nodes: list[TreeNode]


class RecentRequestAnswer(Answer):
    number: int
    age_seconds: float
    prompt_tokens: int
    cached_tokens: int
    evicted_tokens: int
    first_token_seconds: float


class CacheRequests(Answer):
    """GET /v1/cache/requests."""

    object: Literal["list"]
    data: list[RecentRequestAnswer]
