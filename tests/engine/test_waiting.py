"""The waiting queue: order within a tenant, equal service between tenants that ask for more than there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.engine.detokenizer import Detokenizer
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.sequence import Request, Sequence
from stemcache.engine.stream import Stream
from stemcache.engine.turns import WINDOW
from stemcache.engine.waiting import WaitingQueue
from stemcache.prefixtree.namespace import Namespace

NAMESPACE = Namespace.of(model="m", dtype="float32")
TENANTS = [b"a", b"b", b"c", b"d"]
LARGEST = 50

SETTINGS = settings(max_examples=60)
costs = st.integers(1, LARGEST)


def sequence(tenant=b"", priority=0):
    request = Request([1], SamplingParams(), NAMESPACE, 1, Stream(1, lambda: None), tenant, priority)
    return Sequence(request, 0, [1], Detokenizer(None, [1], ()), None)


def start_next(queue, cost):
    """Let whoever's turn it is start, and be charged for it; returns its tenant."""
    chosen = next(queue.in_turn())
    queue.start(chosen)
    queue.charge(chosen.request.tenant, cost)
    return chosen.request.tenant


@SETTINGS
@given(st.lists(st.integers(-3, 3), max_size=20))
def test_within_a_tenant_priority_goes_before_arrival(priorities):
    queue = WaitingQueue()
    arrived = [sequence(priority=priority) for priority in priorities]
    for each in reversed(arrived):  # a preempted sequence returns late, to its old place
        queue.add(each)
    assert list(queue.in_turn()) == sorted(arrived, key=lambda s: s.request.priority)
    assert len(queue) == len(arrived)


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(-1, 1), costs), max_size=40))
def test_each_waiting_sequence_has_one_turn(entries):
    queue = WaitingQueue()
    arrived = {sequence(tenant, priority): cost for tenant, priority, cost in entries}
    for each in arrived:
        queue.add(each)
    seen = []
    for each in queue.in_turn():
        seen.append(each)
        queue.charge(each.request.tenant, arrived[each])
    assert len(seen) == len(arrived)
    assert set(seen) == set(queue) == set(arrived)


@SETTINGS
@given(st.lists(costs, min_size=30, max_size=80), st.integers(2, 4))
def test_tenants_that_always_ask_are_served_alike(charges, n_tenants):
    """Whatever their requests cost, no two are ever further apart than one request."""
    queue, served = WaitingQueue(), dict.fromkeys(TENANTS[:n_tenants], 0)
    for tenant in served:
        for _ in charges:
            queue.add(sequence(tenant))
    for cost in charges:
        served[start_next(queue, cost)] += cost
        assert max(served.values()) - min(served.values()) <= LARGEST


@SETTINGS
@given(st.lists(costs, min_size=60, max_size=60), st.integers(1, 50))
def test_one_who_asks_rarely_waits_for_one_request_of_another_at_most(charges, period):
    """A flood of one tenant's requests does not delay another's few, also when it was there long before."""
    queue = WaitingQueue()
    for _ in charges:
        queue.add(sequence(b"flood"))
    waited = 0
    for index, cost in enumerate(charges):
        if index % period == 0 and not any(each.request.tenant == b"rare" for each in queue):
            queue.add(sequence(b"rare"))
        if start_next(queue, cost if waited == 0 else 1) == b"rare":
            waited = 0
        elif any(each.request.tenant == b"rare" for each in queue):
            waited += 1
            assert waited <= LARGEST


@SETTINGS
@given(costs, st.integers(1, 500))
def test_idle_time_is_no_credit(cost, rounds):
    queue = WaitingQueue()
    queue.add(sequence(b"late"))
    start_next(queue, 1)
    for _ in range(rounds):
        queue.add(sequence(b"busy"))
        start_next(queue, cost)
    turns = []
    for _ in range(10):
        queue.add(sequence(b"busy"))
        queue.add(sequence(b"late"))
    for _ in range(10):
        turns.append(start_next(queue, cost))
    assert abs(turns.count(b"late") - turns.count(b"busy")) <= 2


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(["add", "start", "drop", "charge"]), st.sampled_from(TENANTS), costs)))
def test_nobody_is_lost_and_nobody_starves(events):
    queue, waiting = WaitingQueue(), []
    for action, tenant, cost in events:
        if action == "add":
            waiting.append(sequence(tenant))
            queue.add(waiting[-1])
        elif action == "charge":  # what decodes is charged whether or not its tenant waits
            queue.charge(tenant, cost)
        elif waiting and action == "drop":
            queue.remove(waiting.pop())
        elif waiting:
            chosen = next(queue.in_turn())
            queue.start(chosen)
            queue.charge(chosen.request.tenant, cost)
            waiting.remove(chosen)
        assert set(queue) == set(waiting)
        assert len(queue) == len(waiting)
        assert all(each in queue for each in waiting)
    while waiting:
        chosen = next(queue.in_turn())
        queue.start(chosen)
        waiting.remove(chosen)
    assert not list(queue)


def test_who_does_not_wait_cannot_be_removed():
    with pytest.raises(ValueError, match="not in list"):
        WaitingQueue().remove(sequence())


def test_tenants_that_are_gone_take_no_memory():
    queue = WaitingQueue()
    for number in range(1000):
        queue.add(sequence(b"%d" % number))
        start_next(queue, 1)
    assert len(queue._served) > 1  # who was served last is not yet where the others are
    queue.forget()
    assert len(queue._served) == 0
    for number in range(1000):  # nor do counters pile up while somebody is always there
        queue.add(sequence(b"always"))
        queue.add(sequence(b"%d" % number))
        start_next(queue, 1)
        start_next(queue, 1)
    assert len(queue._served) < 10


# -- the order of what is cached ---------------------------------------------------------------------------------------


@SETTINGS
@given(
    st.lists(st.tuples(st.sampled_from(TENANTS[:2]), st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_cached_requests_go_first_within_tenant_and_priority(entries, random):
    """Whenever one starts, it is the most cached of its tenant's most urgent, unless another was overtaken enough."""
    share = {}
    queue = WaitingQueue(share.__getitem__)
    waiting = []
    for tenant, priority, cached in entries:
        waiting.append(sequence(tenant, priority))
        share[waiting[-1]] = cached
        queue.add(waiting[-1])
    while waiting:
        chosen = next(queue.in_turn())
        rivals = [s for s in waiting if (s.request.tenant, s.request.priority) == _group(chosen)]
        own = [s for s in waiting if s.request.tenant == chosen.request.tenant]
        assert chosen.request.priority == min(s.request.priority for s in own)
        due = [s for s in rivals[:WINDOW] if s.overtaken >= WINDOW]
        best = due[0] if due else max(rivals[:WINDOW], key=share.__getitem__)
        assert chosen is best
        queue.start(chosen)
        queue.charge(chosen.request.tenant, random.randint(1, LARGEST))
        waiting.remove(chosen)


def _group(each):
    return each.request.tenant, each.request.priority


@SETTINGS
@given(st.lists(st.booleans(), min_size=35, max_size=60))
def test_nobody_is_overtaken_more_often_than_the_bound(arrivals):
    """A stream of requests that are all cached, before one that is not and a few more like it."""
    overtaken, share = {}, {}
    queue = WaitingQueue(share.__getitem__)
    waiting = []
    for is_cached in [False, *arrivals]:
        for cached in (is_cached, True):
            waiting.append(sequence())
            share[waiting[-1]], overtaken[waiting[-1]] = float(cached), 0
            queue.add(waiting[-1])
        chosen = next(queue.in_turn())
        for earlier in waiting[: waiting.index(chosen)]:
            overtaken[earlier] += 1
        queue.start(chosen)
        waiting.remove(chosen)
    assert max(overtaken.values()) <= WINDOW
    if all(arrivals):
        assert max(overtaken.values()) == WINDOW, "the bound was never reached"


@SETTINGS
@given(st.lists(costs, min_size=10, max_size=25), st.integers(2, 4), st.randoms(use_true_random=False))
def test_the_order_of_what_is_cached_changes_no_tenants_turn(charges, n_tenants, random):
    shares = {}
    by_arrival, by_cached = WaitingQueue(), WaitingQueue(lambda each: shares[each])
    for tenant in TENANTS[:n_tenants]:
        for _ in charges:
            each = sequence(tenant)
            shares[each] = random.random()
            by_arrival.add(each)
            by_cached.add(each)
    for cost in charges:
        assert start_next(by_arrival, cost) == start_next(by_cached, cost)


def test_prompts_are_looked_up_for_the_tenant_in_turn_only():
    asked = []
    queue = WaitingQueue(lambda each: asked.append(each.request.tenant) or 0.0)
    for tenant in TENANTS * 50:
        queue.add(sequence(tenant))
    next(queue.in_turn())
    assert asked == [TENANTS[0]] * WINDOW
