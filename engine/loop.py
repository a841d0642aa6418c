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

from torch import Tensor

from stemcache.engine.cold import ColdCache
from stemcache.engine.cost import CostSurface
from stemcache.engine.detokenizer import Detokenizer
from stemcache.engine.errors import EngineClosedError, EngineError, GrammarError
from stemcache.engine.forget import Forgetting
from stemcache.engine.mover import Mover
from stemcache.engine.outputs import Delta, FinishReason
from stemcache.engine.pins import Pins
from stemcache.engine.policies import eviction_policy
from stemcache.engine.prompts import Prompts
from stemcache.engine.runner import ModelRunner
from stemcache.engine.sampler import Chosen, TokenChooser, choose_tokens
from stemcache.engine.scheduler import Scheduled, Scheduler
from stemcache.engine.scoring import score
from stemcache.engine.sequence import Request, Sequence
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
        self._prompts = prompts
        self._eos = eos
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
        self.generated_tokens = 0
        self._tentative: Request | None = None  # the one that may have to give way
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
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
        self._inbox.put(lambda: self._accept(request))
        if self._stopped:  # it ended in between and may have read its inbox for the last time
            request.stream.end(EngineClosedError("the engine is closed"))

    def cancel(self, request: Request) -> None:
        """Stop a request after the running step."""
        self._inbox.put(lambda: self._end(request))

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
            self._end(
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

    def _accept(self, request: Request) -> None:
        """Let a request wait. A tentative one has to be alone."""
        if not self.scheduler.is_idle:
            if request.drop():
                self._end(request)
                return
            if self._tentative is not None and self._tentative.drop():
                self._end(self._tentative)
        self._tentative = None if request.tentative is None else request
        self.scheduler.add(self._new_sequence(request))

    def _new_sequence(self, request: Request) -> Sequence:
        index, params = len(request.sequences), request.params
        matcher = None
        if request.grammar is not None:
            matcher = request.grammar.start(stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos)
        sequence = Sequence(
            request,
            index,
            list(request.prompt),
            Detokenizer(
                self._prompts.backend,
                request.prompt,
                params.stop,
                skip_special_tokens=params.skip_special_tokens,
                include_stop=params.include_stop_str_in_output,
            ),
            TokenChooser(params, index, self._runner.device, rules=request.rules, matcher=matcher),
        )
        request.sequences.append(sequence)
        return sequence

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        for sequence in request.sequences:
            self.scheduler.remove(sequence)
        request.stream.end(error)

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
            self._commit(step)
            self._score_prompts(step, logits)
            self._end_unanswered(step)
            rows = self._rows_to_choose(step)
            if not rows:
                return
            sequences, picked = list(rows), list(rows.values())
            chosen = choose_tokens(
                logits if picked == list(range(len(logits))) else logits[picked],
                [sequence.chooser for sequence in sequences],
                [sequence.tokens for sequence in sequences],
            )
        except Exception as error:
            log.exception("a step failed")
            failure = error if isinstance(error, EngineError) else EngineError(f"the step failed: {error}")
            for request in {entry.sequence.request: None for entry in step}:
                self._end(request, failure)
            return
        results = list(zip(sequences, chosen, strict=True))
        failed = {sequence.request: result for sequence, result in results if isinstance(result, GrammarError)}
        for request, grammar_error in failed.items():
            log.warning("a request's grammar could not be followed: %s", grammar_error)
            self._end(request, grammar_error)
        for sequence, result in results:
            if isinstance(result, Chosen) and sequence.request not in failed:
                self._deliver(sequence, result)

    def _commit(self, step: list[Scheduled]) -> None:
        """Publish what the step computed; only now may others find it."""
        for entry in step:
            sequence = entry.sequence
            sequence.computed = entry.stop
            lease = sequence.lease
            assert lease is not None
            written = lease.written_tokens
            lease.commit(sequence.tokens if entry.completes else sequence.tokens[: entry.stop])
            if entry.stop <= len(sequence.request.prompt):
                sequence.request.written_tokens += lease.written_tokens - written

    def _score_prompts(self, step: list[Scheduled], logits: Tensor) -> None:
        """Note the log-probabilities of prompts' own tokens, where the step gave logits before them."""
        row = 0
        for entry in step:
            request = entry.sequence.request
            known = request.stream.prompt_logprobs
            if 0 < len(known) < len(request.prompt):
                alternatives = request.params.prompt_logprobs
                assert alternatives is not None
                tokens = request.prompt[entry.logits.start + 1 : entry.logits.stop + 1]
                known += score(logits[row : row + len(tokens)], tokens, alternatives)
            row += len(entry.logits)

    def _end_unanswered(self, step: list[Scheduled]) -> None:
        """End the requests that wanted their prompt read and nothing generated."""
        for request in [e.sequence.request for e in step if e.completes and e.sequence.request.max_tokens == 0]:
            for index in range(request.params.n):
                request.stream.push(Delta(index, "", (), (), "length"), request.usage)
            self._end(request)

    def _rows_to_choose(self, step: list[Scheduled]) -> dict[Sequence, int]:
        """The sequences that get a token now, with the row of their logits. A prompt's choices fork here."""
        rows: dict[Sequence, int] = {}
        row = -1
        for entry in step:
            row += len(entry.logits)
            request = entry.sequence.request
            if not entry.completes or not request.max_tokens:
                continue
            rows[entry.sequence] = row
            while len(request.sequences) < request.params.n:
                child = self._new_sequence(request)
                self.scheduler.fork(entry.sequence, child)
                if child.lease is not None:
                    rows[child] = row
        return rows

    def _deliver(self, sequence: Sequence, chosen: Chosen) -> None:
        request = sequence.request
        sequence.tokens.append(chosen.token_id)
        request.completion_tokens += 1
        self.generated_tokens += 1
        reason, text = self._judge(sequence, chosen.token_id)
        sequence.finish_reason = reason
        logprobs = () if chosen.logprob is None else (chosen.logprob,)
        delta = Delta(sequence.index, text, (chosen.token_id,), logprobs, reason)
        if reason is not None:
            self.scheduler.remove(sequence)
        request.stream.push(delta, request.usage)
        if request.is_finished:
            request.stream.end()

    def _judge(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, str]:
        """Whether `token` ends its sequence, and the text that it makes certain."""
        params = sequence.request.params
        ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        if ends:
            last = sequence.detokenizer.add(token).text if params.include_stop_str_in_output else ""
            return "stop", last + sequence.detokenizer.finish().text
        piece = sequence.detokenizer.add(token, may_stop=sequence.generated >= params.min_tokens)
        if piece.stopped:
            return "stop", piece.text
        complete = sequence.chooser.is_complete
        if complete or sequence.generated >= sequence.request.max_tokens:
            rest = sequence.detokenizer.finish()
            return ("stop" if complete or rest.stopped else "length"), piece.text + rest.text
        return None, piece.text
