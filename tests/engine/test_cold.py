"""The engine with tiers below the device: warm after a restart, and answers are the same whatever befalls a tier."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import FaultProxy
from redis_process import RedisProcess, installed_servers
from transformers import AutoTokenizer
from waiting import until

from stemcache import Engine, SamplingParams
from stemcache.engine.checkpoint import Checkpoint, load_checkpoint
from stemcache.engine.cold import ColdOptions
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.outputs import Completion
from stemcache.engine.prompts import Prompts
from stemcache.engine.restoration import LoadBudget
from stemcache.engine.spill import ColdPolicy
from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.frame import FrameHeader, pack, unpack
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.tiers.disk import DiskTier
from stemcache.prefixtree.tiers.open import open_tier
from stemcache.prefixtree.tiers.tier import Miss
from stemcache.prefixtree.tokens import decode_tokens

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
needs_redis = pytest.mark.skipif(not installed_servers(), reason="neither redis-server nor valkey-server is installed")


def _questions() -> list[list[int]]:
    """Prompts that share documents in the front and ask for something in them: the answer is read from the chunks."""
    prompts = Prompts(AutoTokenizer.from_pretrained(MODEL_PATH))
    corpus = random_corpus(random.Random(11), 7, facts=4, fillers=3)
    documents = [document.as_template_document() for document in corpus]
    system = {"role": "system", "content": SYSTEM_PROMPT}
    turned = documents[:4] + documents[:3:-1]
    asked = [(corpus[0].facts[0], documents), (corpus[1].facts[1], documents), (corpus[2].facts[0], turned)]
    return [
        prompts.encode_chat([system, {"role": "user", "content": fact.question}], documents=texts)
        for fact, texts in asked
    ]


PROMPTS = _questions()
PATIENT = LoadBudget(60, 60)  # so that a slow machine alone ends no load
HASTY = LoadBudget(0.1, 0.1)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.set_num_threads(1)
    return load_checkpoint(MODEL_PATH, device=torch.device("cpu"), dtype="float32")


@pytest.fixture
def make(checkpoint: Checkpoint) -> Iterator[Callable[..., Engine]]:
    """Makes engines over the same model; each is checked and closed at the end."""
    made: list[Engine] = []

    def engine(cold: str = "off", *, pool_bytes: int = 64 << 20, tries: bool = True, **options: Any) -> Engine:
        options = {"cold_bytes": 64 << 20, "budget": PATIENT} | options
        made.append(Engine(checkpoint, "demo", pool_bytes=pool_bytes, cold=ColdOptions(cold=cold, **options)))
        if tries:  # whatever it costs, so that it is not the machine's load that decides what is tested
            made[-1]._loop.cold.cost.advises = lambda *asked: True
        return made[-1]

    yield engine
    for each in made:
        close(each)


def close(engine: Engine) -> None:
    """Close it, if it is not closed, having proved that nothing leaked."""
    try:
        engine.require_alive()
    except Exception:
        return
    engine.check()
    stats = engine.stats().store
    assert (stats.leases, stats.claims, stats.private_chunks) == (0, 0, 0)
    assert not engine._loop.cold.restorer.is_busy
    engine.close()


class Answered(list[int]):
    """The tokens of an answer; equal to another's if their log-probabilities are too, up to rounding."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion.token_ids)
        self.logprobs = [each.logprob for each in completion.logprobs]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Answered)
        return super().__eq__(other) and self.logprobs == pytest.approx(other.logprobs, abs=1e-3)

    __hash__ = None  # type: ignore[assignment]


def run(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Answered]:
    return [Answered(completion) for completion in engine.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def answers(checkpoint: Checkpoint) -> list[Answered]:
    """What the engine says without any tier, each prompt computed alone."""
    with Engine(checkpoint, "demo", pool_bytes=64 << 20) as engine:
        found: list[Answered] = []
        for prompt in PROMPTS:
            found += run(engine, [prompt])
            engine.clear_cache()
        return found


@pytest.fixture(scope="module")
def redis_process() -> Iterator[RedisProcess]:
    if not installed_servers():
        pytest.skip("neither redis-server nor valkey-server is installed")
    with RedisProcess("maxmemory 128mb", "maxmemory-policy allkeys-lru") as process:
        yield process


@pytest.fixture
def server(redis_process: RedisProcess) -> RedisProcess:
    redis_process.go_on()
    redis_process.client().flushall()
    return redis_process


@pytest.fixture(params=["disk", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"disk://{tmp_path}" if request.param == "disk" else request.getfixturevalue("server").url


def written(engine: Engine) -> None:
    """Wait until nothing is under way to a tier."""
    assert engine._loop.cold.spiller.writes.drain(60)


def ends(engine: Engine) -> dict[str, int]:
    return dict(engine.cold_stats().restored.ended)


def misses(engine: Engine) -> dict[str, int]:
    return dict(engine.cold_stats().tiers[-1].misses)


# -- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", list(ColdPolicy))
def test_an_engine_is_warm_after_a_restart(make, address, answers, policy) -> None:
    first = make(address, policy=policy)
    assert run(first) == answers
    if policy is ColdPolicy.SECOND_USE:
        before = n_objects(first)
        assert run(first) == answers
        assert n_objects(first) > before, "the second use of what one prompt alone had read"
    close(first)
    second = make(address, policy=policy)
    completions = list(second.generate(PROMPTS, GREEDY))
    assert [Answered(completion) for completion in completions] == answers
    assert all(completion.usage.cached_tokens >= 512 for completion in completions)
    restored = second.cold_stats().restored
    assert set(restored.ended) == {"loaded"}
    # What the prompts share is loaded once.
    distinct = {tuple(prompt[:end]) for prompt in PROMPTS for end in range(64, len(prompt), 64)}
    assert 512 <= sum(restored.tokens.values()) <= 64 * len(distinct)


def n_objects(engine: Engine) -> int:
    written(engine)
    return len(list(engine._loop.cold.tiers[-1].scan()))


@pytest.fixture(scope="module")
def asked(checkpoint: Checkpoint) -> list[tuple[list[int], Answered]]:
    """Random prompts, some of them twice, and what the engine says to each without any tier."""
    rng = random.Random(4)
    prompts = [rng.choice(PROMPTS)[: rng.randrange(200, 640)] + PROMPTS[0][-60:] for _ in range(8)]
    prompts += rng.sample(prompts, 4)
    with Engine(checkpoint, "demo", pool_bytes=64 << 20) as engine:
        return [(prompt, run(engine, [prompt])[0]) for prompt in prompts]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (ColdPolicy.WRITE_BACK, {"host_bytes": 64 << 20}),
        (ColdPolicy.WRITE_BACK, {"host_bytes": 2 << 20}),
        (ColdPolicy.WRITE_BACK, {}),
        (ColdPolicy.WRITE_THROUGH, {"host_bytes": 2 << 20}),
        (ColdPolicy.SECOND_USE, {}),
    ],
    ids=str,
)
def test_what_a_small_device_evicts_is_found_again(make, tmp_path, asked, policy, options) -> None:
    """Random requests over a pool that holds few of them; answers as without tiers, and no child outlives a parent."""
    engine = make(f"disk://{tmp_path}", pool_bytes=2 << 20, policy=policy, **options)
    for begin in range(0, len(asked), 4):
        prompts, expected = zip(*asked[begin : begin + 4], strict=True)
        assert run(engine, prompts) == list(expected)
        written(engine)
        require_closed(engine)
    assert sum(engine.cold_stats().restored.tokens.values()) > 0 or (policy is ColdPolicy.SECOND_USE and not options)
    assert engine.stats().store.evicted_chunks > 0


def require_closed(engine: Engine) -> None:
    """In host memory stands nothing whose beginning is neither there nor on the device."""
    host = engine._loop.cold.host
    if host is not None:
        host.check()
        on_device = {node.digest for node in engine._loop.call(lambda: list(engine._loop.store.chunks()))}
        for key, _ in host.scan():
            parent = host.parent_of(key)
            assert parent is None or parent in host or parent[16:] in on_device


def test_requests_that_compute_are_not_held_up_by_one_that_loads(make, server, answers) -> None:
    close_after(make(server.url), answers)
    with FaultProxy(server.port) as proxy:
        engine = make(proxy.url)
        proxy.mode = "slow"
        loading = engine.submit(PROMPTS[0], GREEDY)
        until(lambda: engine._loop.cold.restorer.is_busy or loading.timing.ended)
        short = engine.submit([7, 8, 9], GREEDY)
        list(short)
        assert loading.timing.started is None or short.timing.ended < loading.timing.ended
        assert [t for delta in loading for t in delta.token_ids] == list(answers[0])


def close_after(engine: Engine, answers: list[Answered]) -> None:
    assert run(engine) == answers
    written(engine)
    close(engine)


def test_who_shares_a_prefix_shares_its_load(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url)
    completions = list(engine.generate([PROMPTS[0]] * 5, GREEDY))
    assert [Answered(completion) for completion in completions] == [answers[0]] * 5
    tier = engine.cold_stats().tiers[0]
    assert tier.hits == 3, "ten chunks in groups of four"
    assert sum(engine.cold_stats().restored.tokens.values()) == len(PROMPTS[0]) // 64 * 64


def test_tenants_find_nothing_of_each_other(make, address) -> None:
    first, second = make(address), None
    list(first.submit(PROMPTS[0], GREEDY, tenant=b"alice"))
    close(first)
    second = make(address)
    for tenant, at_least in ((b"bob", 0), (b"alice", 512)):
        stream = second.submit(PROMPTS[0], GREEDY, tenant=tenant)
        list(stream)
        assert (stream.usage.cached_tokens >= 512) == bool(at_least)


def test_clearing_reaches_every_tier_and_what_is_under_way(make, address, answers) -> None:
    engine = make(address, host_bytes=8 << 20, pool_bytes=3 << 20)
    assert run(engine) == answers
    other = engine.submit(PROMPTS[0], GREEDY, tenant=b"other")
    list(other)
    engine.cache.clear()  # while the last writes are under way
    written(engine)
    own, theirs = engine.namespace().digest, engine.namespace(b"other").digest
    for tier in engine._loop.cold.tiers:
        assert not list(tier.scan(own))
    assert list(engine._loop.cold.tiers[-1].scan(theirs))
    (completion,) = engine.generate([PROMPTS[0]], GREEDY)
    assert completion.usage.cached_tokens == 0
    assert Answered(completion) == answers[0]


def stored_tokens(engine: Engine, namespace: Namespace) -> list[list[int]]:
    """The tokens of all objects that the tiers hold of a namespace, read from the objects themselves."""
    found = []
    for tier in engine._loop.cold.tiers:
        for key, _ in tier.scan(namespace.digest):
            (value,) = tier.load([key], time.monotonic() + 10)
            assert not isinstance(value, Miss)
            found.append(decode_tokens(unpack(value, key[-32:]).header.tokens))
    return found


def test_what_is_forgotten_is_in_no_tier_and_does_not_come_back(make, address, answers) -> None:
    """Also while a request computes with it, which starts over out of sight: its chunks are copied nowhere."""
    engine = make(address, host_bytes=8 << 20, pool_bytes=3 << 20)
    assert run(engine) == answers
    written(engine)
    prompt, own, theirs = PROMPTS[0], engine.namespace(), engine.namespace(b"other")
    list(engine.submit(prompt, GREEDY, tenant=b"other"))
    start, stop = 60, len(prompt) - 20  # all of the documents
    marked = set(pairwise(prompt[start:stop]))
    assert any(marked & set(pairwise(tokens)) for tokens in stored_tokens(engine, own))
    footprint = engine.cache.footprint(prompt, start, stop)
    engine.clear_cache()  # the device alone: a footprint is not to be dropped while a tier may hold what it marks
    assert engine.cache.held([footprint]) == {footprint}
    running = engine.submit(prompt, replace(GREEDY, max_tokens=40))
    next(iter(running))
    engine.cache.forget([engine.cache.footprint(each, start, stop) for each in PROMPTS])
    tokens = [token for delta in running for token in delta.token_ids]
    assert tuple(tokens[:5]) == tuple(answers[0][1:6])
    written(engine)
    assert stored_tokens(engine, own) == []
    assert stored_tokens(engine, theirs)
    engine.check()  # which the engine does after it has emptied the request's own namespace
    for node in engine._loop.store.chunks():
        assert node.root.key in (own.digest, theirs.digest)
    engine.close()
    again = make(address)
    (completion,) = again.generate([prompt], GREEDY)
    assert completion.usage.cached_tokens == 0
    assert Answered(completion) == answers[0]


def test_what_is_cheaper_to_compute_is_not_loaded(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url)
    engine._loop.cold.cost.advises = lambda *asked: False
    assert run(engine) == answers
    assert set(ends(engine)) <= {"cheaper_to_compute", "absent"}
    assert ends(engine)["cheaper_to_compute"] > 0
    assert engine.cold_stats().tiers[0].hits == 0


def test_clearing_says_when_a_tier_does_not_answer(make, server, answers) -> None:
    """What it holds is still there: silence would be a lie. Asked again once it answers, it is gone."""
    close_after(make(server.url), answers)
    engine = make(server.url)
    namespace = engine.namespace()
    server.pause()
    with pytest.raises(TierError, match="redis tier did not answer"):
        engine.cache.clear()
    server.go_on()
    until(lambda: engine.cold_stats().tiers[0].is_available)
    assert stored_tokens(engine, namespace)
    engine.cache.clear()
    assert not stored_tokens(engine, namespace)
    assert run(engine) == answers


def test_cancelling_who_waits_for_a_load_leaks_nothing(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url, budget=LoadBudget(1, 1))
    server.pause()
    streams = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    until(lambda: engine._loop.cold.restorer.is_busy)
    for stream in streams:
        stream.cancel()
    until(lambda: not engine._loop.cold.restorer.is_busy)
    server.go_on()
    assert run(engine) == answers


def test_closing_an_engine_that_loads(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url)
    server.pause()
    stream = engine.submit(PROMPTS[0], GREEDY)
    until(lambda: engine._loop.cold.restorer.is_busy)
    server.go_on()
    engine.close()
    with pytest.raises(Exception, match="closed"):
        list(stream)


# -- damaged objects -------------------------------------------------------------------------------------------------


def damage(address: str, change: Callable[[bytes, bytes, dict[bytes, bytes]], bytes]) -> int:
    """Put something else in every object's place: `change(key, value, all)`. Returns how many there are."""
    tier = open_tier(address, max_bytes=64 << 20)
    far = time.monotonic() + 60
    found = {key: bytes(value) for key, _ in tier.scan() for value in tier.load([key], far)}
    assert tier.delete(found)
    for key, value in found.items():
        assert tier.store(key, change(key, value, found), far) is None
    tier.close()
    return len(found)


def flip(key: bytes, value: bytes, found: dict[bytes, bytes]) -> bytes:
    at = random.Random(key).randrange(len(value) // 2, len(value))
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def swap(key: bytes, value: bytes, found: dict[bytes, bytes]) -> bytes:
    keys = sorted(found)
    return found[keys[(keys.index(key) + 1) % len(keys)]]


def other_namespace(key: bytes, value: bytes, found: dict[bytes, bytes]) -> bytes:
    frame = unpack(value, key[16:])
    header: FrameHeader = replace(frame.header, namespace=Namespace(bytes(32)))
    return pack(header, frame.levels)


def version(number: int) -> Callable[[bytes, bytes, dict[bytes, bytes]], bytes]:
    return lambda key, value, found: value[:6] + number.to_bytes(2, "big") + value[8:]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("truncated", lambda key, value, found: value[: len(value) // 2]),
        ("truncated", lambda key, value, found: b""),
        ("oversized", lambda key, value, found: value + b"x"),
        ("magic", lambda key, value, found: b"x" * len(value)),
        ("checksum", flip),
        ("digest", swap),
        ("version_older", version(0)),
        ("version_newer", version(99)),
        ("namespace", other_namespace),
    ],
    ids=["truncated", "empty", "longer", "garbage", "flipped", "swapped", "older", "newer", "namespace"],
)
def test_damaged_objects_are_misses_and_go(make, request, tmp_path, answers, reason, change) -> None:
    on_disk = reason in ("checksum", "oversized") or not installed_servers()
    address = f"disk://{tmp_path}" if on_disk else request.getfixturevalue("server").url
    close_after(make(address), answers)
    assert damage(address, change) > 3
    engine = make(address)
    assert run(engine) == answers
    assert misses(engine).get(reason, 0) > 0
    assert set(ends(engine)) <= {"incomplete", "absent", "loaded"}
    assert sum(engine.cold_stats().restored.tokens.values()) == 0
    close(engine)
    sound = 0
    tier = open_tier(address, max_bytes=64 << 20)
    for key, _ in tier.scan():
        (value,) = tier.load([key], time.monotonic() + 60)
        sound += bytes(value[6:8]) == b"\0\1" and bytes(value) != b"x" * len(value)
    tier.close()
    assert sound > 0 or reason == "version_newer", "what was damaged was deleted and written anew"


def test_these_tests_would_notice_wrong_chunks(make, tmp_path, answers) -> None:
    """Objects that are sound in all but the numbers, which no check can notice: then the answers are others."""

    def turned(key: bytes, value: bytes, found: dict[bytes, bytes]) -> bytes:
        frame = unpack(value, key[16:])
        (level,) = frame.levels
        return pack(frame.header, [[bytes(part[len(part) // 2 :]) + bytes(part[: len(part) // 2]) for part in level]])

    address = f"disk://{tmp_path}"
    close_after(make(address), answers)
    damage(address, turned)
    assert run(make(address)) != answers


def test_only_what_was_sealed_with_the_secret_is_used(make, address, answers) -> None:
    close_after(make(address), answers)
    engine = make(address, secret=b"s" * 32)
    assert run(engine) == answers
    assert misses(engine)["mac"] > 0
    close(engine)
    again = make(address, secret=b"s" * 32)
    assert run(again) == answers
    assert sum(again.cold_stats().restored.tokens.values()) > 0


# -- a server that fails ---------------------------------------------------------------------------------------------


@needs_redis
def test_a_server_that_is_not_there_at_first(make, answers) -> None:
    process = RedisProcess()
    engine = make(process.url)
    assert not engine.cold_stats().tiers[0].is_available
    assert run(engine) == answers
    assert engine.cold_stats().failed_writes > 0
    with process:
        until(lambda: engine.cold_stats().tiers[0].is_available)
        engine.clear_cache()
        assert run(engine) == answers
        written(engine)
        assert process.client().dbsize() > 0
        close(engine)


@needs_redis
def test_a_server_that_dies_and_comes_back_empty(make, answers) -> None:
    with RedisProcess() as process:
        close_after(make(process.url), answers)
        engine = make(process.url)
        assert run(engine, PROMPTS[:1]) == answers[:1]
        assert sum(engine.cold_stats().restored.tokens.values()) > 0
        process.kill()
        assert run(engine) == answers
        assert misses(engine)["unavailable"] > 0
        engine.clear_cache()
        assert run(engine) == answers
        process.start()
        until(lambda: engine.cold_stats().tiers[0].is_available)
        engine.clear_cache()
        assert run(engine) == answers
        written(engine)
        assert process.client().dbsize() > 0
        close(engine)


def test_a_server_that_hangs_costs_the_budget(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url, budget=HASTY)
    server.pause()
    try:
        assert run(engine) == answers
        assert ends(engine)["deadline"] >= 1
        assert {"deadline", "unavailable"} & set(misses(engine))
        engine.clear_cache()
        until(lambda: not engine.cold_stats().tiers[0].is_available)  # by writes if not by loads
        engine.clear_cache()
        assert run(engine) == answers
        assert misses(engine)["unavailable"] > 0
    finally:
        server.go_on()
    until(lambda: engine.cold_stats().tiers[0].is_available)
    engine.clear_cache()
    assert run(engine) == answers


def test_a_load_that_comes_late_writes_into_no_slot_of_others(make, tmp_path, answers, monkeypatch) -> None:
    """Budgets end while chunks are being copied: the slots are the load's until the copy is done, and not after."""
    close_after(make(f"disk://{tmp_path}"), answers)
    engine = make(f"disk://{tmp_path}", budget=HASTY)
    restorer, copy_in, whose = engine._loop.cold.restorer, KVPool.copy_in, []

    def slowly(pool: KVPool, slot: int, source: memoryview) -> None:
        time.sleep(0.03)
        copy_in(pool, slot, source)
        whose.append(any(slot in each.slots and not each.ended for each in list(restorer._active)))

    monkeypatch.setattr(KVPool, "copy_in", slowly)
    for _ in range(3):
        assert run(engine) == answers
        engine.clear_cache()
    assert ends(engine)["deadline"] >= 1
    assert whose
    assert all(whose)


@pytest.mark.parametrize("mode", ["slow", "trickle", "cut"])
def test_a_server_that_is_slow_or_trickles_or_breaks_off(make, server, answers, mode) -> None:
    close_after(make(server.url), answers)
    with FaultProxy(server.port) as proxy:
        engine = make(proxy.url, budget=LoadBudget(0.3, 0.3) if mode != "cut" else PATIENT)
        proxy.mode = mode
        assert run(engine) == answers
        assert set(ends(engine)) & ({"incomplete", "absent"} if mode == "cut" else {"deadline"})
        assert {"deadline", "unavailable"} & set(misses(engine))
        proxy.mode = "pass"
        until(lambda: engine.cold_stats().tiers[0].is_available)
        engine.clear_cache()
        assert run(engine) == answers
        close(engine)


@needs_redis
def test_a_server_that_is_full(make, answers, caplog) -> None:
    with RedisProcess("maxmemory 2mb", "maxmemory-policy noeviction") as process:
        engine = make(process.url)
        assert "allkeys-lru" in caplog.text
        assert run(engine) == answers
        written(engine)
        assert engine.cold_stats().tiers[0].refusals["full"] > 0
        assert engine.cold_stats().tiers[0].is_available, "loads go on"
        engine.clear_cache()
        assert run(engine) == answers
        close(engine)


def test_a_server_that_is_flushed(make, server, answers) -> None:
    close_after(make(server.url), answers)
    engine = make(server.url)
    server.client().flushall()
    assert run(engine) == answers
    assert ends(engine)["absent"] > 0
    assert sum(engine.cold_stats().restored.tokens.values()) == 0


@needs_redis
def test_a_wrong_password(make, answers, caplog) -> None:
    with RedisProcess("requirepass right-one") as process:
        engine = make(process.url, password="wrong-one")
        assert run(engine) == answers
        stats = engine.cold_stats().tiers[0]
        assert not stats.is_available
        assert "password" in (stats.trouble or "")
        assert "wrong-one" not in caplog.text
        assert "right-one" not in caplog.text
        close(engine)
        right = make(process.url, password="right-one")
        assert run(right) == answers
        written(right)
        assert right.cold_stats().tiers[0].stores > 0
        close(right)


def test_a_tier_with_a_bug_loses_nothing_but_chunks(make, answers, tmp_path, monkeypatch, caplog) -> None:
    engine = make(f"disk://{tmp_path}")
    for name in ("lookup", "reading", "store", "touch"):
        monkeypatch.setattr(DiskTier, name, lambda *_: 1 / 0)
    assert run(engine) == answers
    engine.clear_cache()
    assert run(engine) == answers
    written(engine)
    assert engine.cold_stats().failed_writes > 0
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    engine.clear_cache()
    assert run(engine) == answers
