"""Documents go from the tiers below the device too; where a tier does not answer, later, and that is said."""

from __future__ import annotations

import time
from random import Random

import pytest
from redis_process import RedisProcess, installed_servers
from waiting import until

from stemcache.engine.cold import ColdOptions
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.engine import Engine
from stemcache.engine.sampling import SamplingParams
from stemcache.prefixtree.errors import TierError
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.documents import Document

SHORT = SamplingParams(max_tokens=4, temperature=0)


class Clock:
    """Seconds since 1970, as the test turns them."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def _stored(engine: Engine) -> int:
    (tier,) = engine._loop.cold.tiers
    return sum(1 for _ in tier.scan(engine.namespace().digest))


@pytest.mark.skipif(not installed_servers(), reason="neither redis-server nor valkey-server is installed")
@pytest.mark.parametrize("restarts", [False, True], ids=["same process", "after a restart"])
def test_a_tier_that_does_not_answer_forgets_when_it_does(tmp_path, restarts):
    facts = random_corpus(Random(3), 6)
    documents = [Document(id=f.title, title=f.title, text=f.text) for f in facts]
    question, clock = facts[0].facts[0].question, Clock()

    def cache_over(engine: Engine) -> ContextCache:
        return ContextCache(engine, folder=tmp_path, system_prompt=SYSTEM_PROMPT, clock=clock)

    with (
        RedisProcess("maxmemory 64mb", "maxmemory-policy allkeys-lru") as server,
        Engine.load(MODEL_PATH, dtype="float32", pool_bytes=16 << 20, cold=ColdOptions(server.url)) as engine,
    ):
        cache = cache_over(engine)
        cache.add(documents)
        cache.ask(question, params=SHORT)
        engine._loop.cold.spiller.writes.drain(60)
        assert _stored(engine) > 0
        server.pause()
        with pytest.raises(TierError, match="the documents are changed, but the redis tier did not answer"):
            cache.delete(documents[0].id)
        assert not cache.has(documents[0].id)
        assert cache._catalogue.trail.doomed()
        if restarts:
            cache.close()
            cache = cache_over(engine)  # still no answer: it opens all the same
        server.go_on()
        until(lambda: engine.cold_stats().tiers[0].is_available)
        assert _stored(engine) > 0
        clock.now += 10
        cache.expire()  # as every method does that looks at documents
        assert not cache._catalogue.trail.doomed()
        assert _stored(engine) == 0
        assert cache.ask(question, params=SHORT).sources[0].document_id != documents[0].id
        cache.close()
