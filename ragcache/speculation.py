"""Dynamic speculative pipelining: the engine reads the documents found so far, while the search goes on.

Invariant: the documents of a prompt are those of the whole search. A guess (a prompt that was submitted before the
search had ended) becomes the answer only if it holds just these; else it is cancelled after its step, and what it has
computed stays as cache. Its footprints are noted and verified like those of any prompt, so that deleted documents leave
it too.

After "Dynamic speculative pipelining" of RAGCache (arXiv 2404.12457, algorithm 2): guess when the provisional list
changed and few requests are pending. Few are none here, for one prefill keeps a CPU busy (`engine.tentative`); and
`gate` decides whether it is likely to pay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from stemcache.engine.engine import Engine
from stemcache.engine.stream import Stream
from stemcache.engine.tentative import Tentative
from stemcache.prefixtree.errors import StemcacheError
from stemcache.ragcache.documents import Retrieved
from stemcache.ragcache.gate import Gate
from stemcache.ragcache.library import Library
from stemcache.ragcache.preparation import Prepared, Space, Wish

log = logging.getLogger(__name__)

Compose = Callable[[Sequence[Retrieved]], Prepared]
Submit = Callable[[Prepared, Tentative], Stream]


@dataclass(slots=True)
class SpeculationStats:
    """Guesses since the start, and what became of them.

    stood: became the answer. cancelled: the search found other documents. gave_way: another request came.
    saved_seconds: what the engine had spent on first tokens, of those that stood, when their searches ended.
    """

    started: int = 0
    stood: int = 0
    cancelled: int = 0
    gave_way: int = 0
    saved_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Guess:
    prepared: Prepared
    keys: tuple[int, ...]
    tentative: Tentative
    stream: Stream


class Speculation:
    """The guesses of one context cache. From any thread.

    submitted: is called with every prompt that was submitted, to look for documents that were deleted meanwhile.
    """

    def __init__(self, engine: Engine, library: Library, submitted: Callable[[Prepared], None]) -> None:
        self._engine = engine
        self._library = library
        self._submitted = submitted
        self._lock = threading.Lock()
        self._stats = SpeculationStats()
        self._gates: dict[tuple[str, bool], Gate] = {}

    def stats(self) -> SpeculationStats:
        """A copy."""
        with self._lock:
            return replace(self._stats)

    def prepare(self, space: Space, question: str, wish: Wish, compose: Compose, submit: Submit) -> Prepared:
        """Search, and prepare the prompt with what was found at last.

        It has a `stream` where a guess stood: its answer is on the way. Raises EmbedderError, and as `compose` does.
        """
        gate = self._gate_of(space.owner, is_filtered=bool(wish.where))
        stages = self._library.stages(space.owner, question, wish.k, wish.where, whole=not gate.wants_stages())
        guess: _Guess | None = None
        wrong: _Guess | None = None
        seen: list[tuple[int, ...]] = []
        seconds: list[float] = []
        found: Sequence[Retrieved] = ()
        try:
            while (stage := _timed(stages, seconds)) is not None:
                found, keys = stage, tuple(each.passage.key for each in stage)
                if guess is not None and guess.keys != keys:
                    self._cancel(guess)
                    guess, wrong = None, guess
                if guess is None and found and self._has_room(wrong):
                    guess = self._guess(gate.step_tokens(len(seen)), gate, found, compose, submit)
                seen.append(keys)
            gate.searched(seconds, [keys == seen[-1] for keys in seen])
            return compose(found) if guess is None else self._settled(guess)
        except BaseException:
            if guess is not None:
                self._cancel(guess)
            raise

    def _gate_of(self, owner: str, *, is_filtered: bool) -> Gate:
        """Searches of another owner, or among other documents, take another time."""
        with self._lock:
            gate = self._gates.get((owner, is_filtered))
            if gate is None:
                engine = self._engine
                gate = Gate(engine.cost, chunk_tokens=engine.chunk_tokens, max_tokens=engine.max_model_len)
                self._gates[owner, is_filtered] = gate
            return gate

    def _has_room(self, wrong: _Guess | None) -> bool:
        """Whether the engine does nothing now, but perhaps the last step of a wrong guess. It judges again itself."""
        now = self._engine.activity()
        ending = wrong is not None and wrong.stream.timing.ended is None
        return now.running + now.waiting <= ending

    def _guess(
        self, step_tokens: int, gate: Gate, found: Sequence[Retrieved], compose: Compose, submit: Submit
    ) -> _Guess | None:
        """Have the engine begin with these documents, in steps of so many tokens; None if it cannot, or has not to."""
        if not step_tokens:
            return None
        try:
            began = time.perf_counter()
            prepared = compose(found)
            gate.composed(time.perf_counter() - began)
            tentative = Tentative(step_tokens)
            stream = submit(prepared, tentative)
        except StemcacheError as error:  # what is found at last may do better, and if not, will say so
            log.debug("no speculation: %s", error)
            return None
        with self._lock:
            self._stats.started += 1
        guess = _Guess(prepared, tuple(each.passage.key for each in found), tentative, stream)
        try:
            self._submitted(prepared)
        except BaseException:
            self._cancel(guess)
            raise
        return guess

    def _cancel(self, guess: _Guess) -> None:
        dropped_now = guess.tentative.is_open
        guess.tentative.drop()
        guess.stream.cancel()
        with self._lock:
            self._stats.cancelled += dropped_now
            self._stats.gave_way += not dropped_now

    def _settled(self, guess: _Guess) -> Prepared:
        """The guess was right: its prompt, with its stream unless it had to give way."""
        now, times = time.perf_counter(), guess.stream.timing
        kept = guess.tentative.keep()
        with self._lock:
            self._stats.stood += kept
            self._stats.gave_way += not kept
            if kept and times.started is not None:
                self._stats.saved_seconds += max(0.0, min(now, times.first_token or now) - times.started)
        return replace(guess.prepared, stream=guess.stream) if kept else guess.prepared


def _timed(stages: Iterator[Sequence[Retrieved]], seconds: list[float]) -> Sequence[Retrieved] | None:
    """The next stage, whose seconds are appended; None after the last."""
    began = time.perf_counter()
    stage = next(stages, None)
    if stage is not None:
        seconds.append(time.perf_counter() - began)
    return stage
