"""The engine's thread: schedule, run, choose, deliver, again.

Invariant: store, pool, scheduler and sequences are touched by this thread only; everybody else posts functions to its
inbox. Whatever goes wrong in a step ends the requests of that step and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from stemcache.engine.cold import ColdCache
from stemcache.engine.cost import CostSurface
from stemcache.engine.delivery import Delivery
from stemcache.engine.errors import EngineClosedError, EngineError
from stemcache.engine.forget import Forgetting
from stemcache.engine.mover import Mover
from stemcache.engine.pins import Pins
from stemcache.engine.policies import eviction_policy
from stemcache.engine.prompts import Prompts
from stemcache.engine.runner import ModelRunner
from stemcache.engine.scheduler import Scheduler
from stemcache.engine.sequence import Request
from stemcache.prefixtree.store import PrefixStore

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineLoop:
    """Runs requests until it is closed. `submit`, `cancel`, `call` and `close` may be called from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        prompts: Prompts,
        eos: frozenset[int],
        cold: ColdCache,
        cost: CostSurface,
        *,
        max_step_tokens: int,
        max_running: int,
        max_logit_rows: int,
        eviction: str,
        cache_first: bool,
    ) -> None:
        self._runner = runner
        pool = runner.pool
        self.cold = cold
        self._cost = cost
        self.store = PrefixStore(
            pool.n_chunks,
            runner.layout.chunk_tokens,
            pool.copy_tokens,
            eviction_policy(eviction, pool.n_chunks, runner.layout.chunk_tokens, cost),
            watcher=cold.spiller if cold.tiers else None,
        )
        self.pins = Pins(self.store)
        self.mover = Mover(self.store, pool, runner.inverse_frequencies)
        self.scheduler = Scheduler(
            self.store,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_logit_rows=max_logit_rows,
            cache_first=cache_first,
            give_way=lambda: cold.restorer.give_way(),
            mover=self.mover,
        )
        self.forgetting = Forgetting(self.store, pool, self.scheduler, self.pins)
        cold.spiller.keeps_out = self.forgetting.is_isolated
        self.delivery = Delivery(self.scheduler, prompts, eos, runner.device)
        self._tentative: Request | None = None  # the one that may have to give way
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.arriving: set[Request] = set()  # posted, and not yet with the scheduler
        cold.attach(self.store, self._inbox.put)
        self._awaits_chunks = False  # nothing can be computed until chunks arrive from a tier
        self._closing = False
        self._stopped = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stemcache-engine", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; its deltas go to its stream. Raises EngineClosedError."""
        self.require_alive()
        self.arriving.add(request)
        self._inbox.put(lambda: self._arrive(request))
        if self._stopped:  # it ended in between and may have read its inbox for the last time
            self.arriving.discard(request)
            request.stream.end(EngineClosedError("the engine is closed"))

    def cancel(self, request: Request) -> None:
        """Stop a request after the running step."""
        self._inbox.put(lambda: self.delivery.end(request))

    def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps, on the engine's thread, and give back what it returns or raises."""
        self.require_alive()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                if not future.done():
                    self.require_alive()

    def close(self) -> None:
        """End all requests and the thread; idempotent."""
        self._inbox.put(self._request_close)
        self._thread.join()
        self.cold.close()

    def require_alive(self) -> None:
        """Raise EngineClosedError unless the thread runs."""
        if self._death is not None:
            raise EngineClosedError(f"the engine died: {self._death}") from self._death
        if self._closing or not self._thread.is_alive():
            raise EngineClosedError("the engine is closed")

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._read_inbox()
                if not self.scheduler.is_idle and not self._closing:
                    self._step()
        except BaseException as error:  # a bug of ours: say so to everybody who waits, instead of letting them hang
            log.exception("the engine's thread died")
            self._death = error
        self._stopped = True
        cause = self._death or EngineClosedError("the engine was closed before the request was finished")
        while not self._inbox.empty():  # requests posted since, and callers that wait for an answer
            self._inbox.get()()
        for request in self.scheduler.requests():
            self.delivery.end(
                request, cause if isinstance(cause, EngineError) else EngineClosedError(f"the engine died: {cause}")
            )
        self.pins.clear()
        self.forgetting.sweep()
        self.cold.flush(self.store.chunks())

    def _read_inbox(self) -> None:
        """Do what others asked for; with nothing to compute, wait for it."""
        self.forgetting.sweep()
        wish = self._next_wish() if self.scheduler.is_idle or self._awaits_chunks else None
        self.pins.expire()  # an idle engine may have slept past the end of a pin
        self.cold.restorer.expire()
        if wish is not None:
            wish()
        while not self._inbox.empty():
            self._inbox.get()()

    def _next_wish(self) -> Callable[[], None] | None:
        """Wait for one; None if the time of a load from a tier is over before there is any."""
        try:
            return self._inbox.get(timeout=self.cold.restorer.seconds_left)
        except queue.Empty:
            return None

    def _request_close(self) -> None:
        self._closing = True

    def _arrive(self, request: Request) -> None:
        try:
            self._accept(request)
        finally:
            self.arriving.discard(request)  # only now: somebody who counts finds it twice rather than nowhere

    def _accept(self, request: Request) -> None:
        """Let a request wait. A tentative one has to be alone."""
        if not self.scheduler.is_idle:
            if request.drop():
                self.delivery.end(request)
                return
            if self._tentative is not None and self._tentative.drop():
                self.delivery.end(self._tentative)
        self._tentative = None if request.tentative is None else request
        self.scheduler.add(self.delivery.new_sequence(request))

    def _step(self) -> None:
        self.cold.look_ahead(self.scheduler.waiting.in_turn())
        step = self.scheduler.schedule()
        self._awaits_chunks = not step and self.cold.restorer.is_busy
        if self._awaits_chunks:
            return
        while not step and self.pins.give_way():
            step = self.scheduler.schedule()
        assert step, "requests wait, none runs and none can start"
        try:
            began = time.perf_counter()
            logits = self._runner.run(step)  # done when it returns; a device that runs behind must be waited for here
            self._cost.observe([(e.stop - e.n_rows, e.n_rows) for e in step], time.perf_counter() - began)
            choices = self.delivery.choose(step, logits)
        except Exception as error:
            log.exception("a step failed")
            failure = error if isinstance(error, EngineError) else EngineError(f"the step failed: {error}")
            for request in {entry.sequence.request: None for entry in step}:
                self.delivery.end(request, failure)
            return
        self.delivery.deliver(choices)
