"""What the picture tells of the tiers, against what really lies in them: random requests over a small random Llama."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stemcache import Engine, SamplingParams
from stemcache.engine.cold import ColdOptions
from stemcache.engine.restoration import LoadBudget
from stemcache.engine.spill import ColdPolicy
from stemcache.engine.write_behind import MAX_PENDING_BYTES
from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.node import path_digests
from stemcache.prefixtree.runs import group_begin
from stemcache.prefixtree.tokens import TOKEN_BYTES, encode_tokens

SIZE = 16
GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
Tokens = tuple[int, ...]

DISK, HOST, LITTLE = {"cold": "disk"}, {"host_bytes": 64 << 20}, {"host_bytes": 80 << 10}
GIVEN_UP = {**DISK, **LITTLE, "policy": ColdPolicy.WRITE_THROUGH}
REFUSES = {"host_bytes": 1}
DEAD = {"cold": "redis://127.0.0.1:1/0"}
WAYS = [
    *({**DISK, "policy": policy} for policy in ColdPolicy),
    {**DISK, **HOST, "policy": ColdPolicy.SECOND_USE},
    {**DISK, **LITTLE, "policy": ColdPolicy.WRITE_BACK},
    GIVEN_UP,
    HOST,
    LITTLE,  # gives up most of what it gets
    REFUSES,
    DEAD,
]


def drawn(engine: Engine, below: bool) -> set[Tokens]:
    """The chunks that the picture tells, each named by all tokens up to its end."""
    above: dict[str | None, Tokens] = {None: ()}
    found: set[Tokens] = set()
    for branch in engine.cache.tree(5000, with_tokens=True).branches:
        start = len(above[branch.parent])
        path = above[branch.id] = above[branch.parent] + branch.token_ids
        if branch.is_below is below:
            found |= {path[:end] for end in range(start + SIZE, len(path) + 1, SIZE)}
    return found


def restorable(engine: Engine, read: Sequence[Tokens], device: set[Tokens]) -> set[Tokens]:
    """What the tiers' own objects hold of all that was ever read, where nothing is missing before it."""
    group, own, objects = engine._loop.cold.group, engine.namespace(), set[bytes]()
    with suppress(TierError):  # no server is there
        objects |= {key[-32:] for tier in engine._loop.cold.tiers for key, _ in tier.scan(own.digest)}
    held: set[Tokens] = set()
    for tokens in read:
        whole = tokens[: len(tokens) // SIZE * SIZE]
        digests = path_digests(own.digest, encode_tokens(whole), SIZE * TOKEN_BYTES)
        for depth, digest in enumerate(digests, 1):
            if digest in objects:
                held |= {whole[: each * SIZE] for each in range(group_begin(depth, group), depth + 1)}
    found: set[Tokens] = set()
    for path in sorted(held - device, key=len):
        if len(path) == SIZE or path[:-SIZE] in found | device:
            found.add(path)
    return found


@pytest.fixture
def make(llama_engine: Callable[..., Engine], tmp_path: Path) -> Callable[[dict[str, Any]], Engine]:
    """Makes engines of 28 chunks over tiers that are waited for, whatever loading costs."""

    def engine(options: dict[str, Any]) -> Engine:
        if options.get("cold") == "disk":
            options = options | {"cold": f"disk://{tmp_path}", "cold_bytes": 64 << 20}
        made = llama_engine(pool_bytes=112 << 10, cold=ColdOptions(**{"budget": LoadBudget(60, 60)} | options))
        made._loop.cold.cost.advises = lambda *asked: True  # type: ignore[method-assign]
        return made

    return engine


def workload(rng: random.Random) -> Iterator[list[list[int]]]:
    """Batches of prompts that share beginnings, part inside and between groups, and come again."""
    texts = [[rng.randrange(90) for _ in range(11 * SIZE)] for _ in range(3)]
    texts += [text[: rng.randrange(16, 100)] + [rng.randrange(90) for _ in range(6 * SIZE)] for text in texts * 2]
    for _ in range(25):
        yield [rng.choice(texts)[: rng.randrange(SIZE, 11 * SIZE)] for _ in range(rng.choice([1, 1, 2]))]


@pytest.mark.sweep
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_what_is_told_below_is_what_can_be_restored(
    make: Callable[[dict[str, Any]], Engine], options: dict[str, Any]
) -> None:
    rng, engine = random.Random(str(options)), make(options)
    spiller = engine._loop.cold.spiller
    read: list[Tokens] = []
    most = 0
    for prompts in workload(rng):
        # What does not fit is dropped.
        spiller.writes.max_pending_bytes = 0 if rng.random() < 0.15 else MAX_PENDING_BYTES
        for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
            read.append((*prompt, *completion.token_ids))
        assert spiller.writes.drain(60)
        told, device = drawn(engine, below=True), drawn(engine, below=False)
        found = restorable(engine, read, device)
        # A chunk for which there was no room on the way to the disk, and which host memory then gave up, may be told.
        assert told >= found if options == GIVEN_UP else told == found
        spiller.below.check()
        most = max(most, len(told))
    assert engine.stats().store.evicted_chunks > 20
    assert (most > 5) == (options not in (REFUSES, DEAD))


def test_what_is_cleared_or_forgotten_is_told_no_more(make: Callable[[dict[str, Any]], Engine]) -> None:
    rng, engine = random.Random(3), make(DISK)
    prompts = [[rng.randrange(90) for _ in range(10 * SIZE)] for _ in range(5)]
    for tenant in (b"", b"other"):
        for prompt in prompts:
            list(engine.submit(prompt, GREEDY, tenant=tenant))
    assert engine._loop.cold.spiller.writes.drain(60)
    theirs = engine.cache.tree(5000, with_tokens=True, tenant=b"other")
    assert engine.cache.tree(5000).below_chunks >= 20
    assert theirs.below_chunks >= 10
    engine.cache.forget([engine.cache.footprint(prompts[0], 20, 40)])
    assert engine.cache.tree(5000).below_chunks == 0, "the tiers lose all of the namespace, to be sure"
    again = engine.cache.tree(5000, with_tokens=True, tenant=b"other")
    assert [each.token_ids for each in again.branches] == [each.token_ids for each in theirs.branches]
    engine.cache.clear(tenant=b"other")
    assert engine.cache.tree(5000, tenant=b"other").branches == ()
