"""The lock that many may share or one may hold alone."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from stemcache.prefixtree.shared_lock import SharedLock


def test_nobody_shares_it_while_one_has_it_alone() -> None:
    lock, inside, seen = SharedLock(), [0], set()
    counting = threading.Lock()

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            if rng.random() < 0.3:
                with lock.alone():
                    assert inside[0] == 0
                    time.sleep(0)
                    assert inside[0] == 0
            else:
                with lock, lock:  # twice by the same thread, while others want it alone
                    with counting:
                        inside[0] += 1
                        seen.add(inside[0])
                    time.sleep(0)
                    with counting:
                        inside[0] -= 1

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(visit, seed) for seed in range(6)]:
            done.result(timeout=60)
    assert len(seen) > 1, "it was shared"


def test_who_does_not_want_to_wait_is_told() -> None:
    lock = SharedLock()
    with lock.alone_now() as nobody_else:
        assert nobody_else
    with lock, lock.alone_now() as nobody_else:
        assert not nobody_else


def test_it_is_given_back_after_an_error() -> None:
    lock = SharedLock()
    for way in (lambda: lock, lock.alone):
        try:
            with way():
                raise KeyError
        except KeyError:
            pass
    with lock.alone_now() as nobody_else:
        assert nobody_else
