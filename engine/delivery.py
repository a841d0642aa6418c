"""From a step's logits to the requests' streams: publish, score, choose, deliver.

Invariant: belongs to the engine's thread. What a step computed is published before anything is chosen from it, and a
request's stream ends exactly once, when its last choice has or when an error does.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from stemcache.engine.detokenizer import Detokenizer
from stemcache.engine.errors import GrammarError
from stemcache.engine.outputs import Delta, FinishReason
from stemcache.engine.prompts import Prompts
from stemcache.engine.sampler import Chosen, TokenChooser, choose_tokens
from stemcache.engine.scheduler import Scheduled, Scheduler
from stemcache.engine.scoring import score
from stemcache.engine.sequence import Request, Sequence

log = logging.getLogger(__name__)


class Delivery:
    """What is done with a step's logits. `generated_tokens` counts since it was made; anybody may read it.

    eos: tokens that end a sequence. device: where the logits lie.
    """

    def __init__(self, scheduler: Scheduler, prompts: Prompts, eos: frozenset[int], device: torch.device) -> None:
        self._scheduler = scheduler
        self._prompts = prompts
        self._eos = eos
        self._device = device
        self.generated_tokens = 0

    def new_sequence(self, request: Request) -> Sequence:
        """The next choice of a request."""
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
            TokenChooser(params, index, self._device, rules=request.rules, matcher=matcher),
        )
        request.sequences.append(sequence)
        return sequence

    def end(self, request: Request, error: BaseException | None = None) -> None:
        """Take a request's sequences out of the schedule and end its stream."""
        for sequence in request.sequences:
            self._scheduler.remove(sequence)
        request.stream.end(error)

    def choose(self, step: list[Scheduled], logits: Tensor) -> list[tuple[Sequence, Chosen | GrammarError]]:
        """Publish what a step computed, and choose the next tokens from its logits, float[rows, vocabulary].

        Requests that wanted none have ended when it returns.
        """
        self._commit(step)
        self._score_prompts(step, logits)
        self._end_unanswered(step)
        rows = self._rows_to_choose(step)
        if not rows:
            return []
        sequences, picked = list(rows), list(rows.values())
        chosen = choose_tokens(
            logits if picked == list(range(len(logits))) else logits[picked],
            [sequence.chooser for sequence in sequences],
            [sequence.tokens for sequence in sequences],
        )
        return list(zip(sequences, chosen, strict=True))

    def deliver(self, choices: list[tuple[Sequence, Chosen | GrammarError]]) -> None:
        """Push what was chosen into the streams; a request whose grammar fails in one choice ends with that error."""
        failed = {sequence.request: chosen for sequence, chosen in choices if isinstance(chosen, GrammarError)}
        for request, error in failed.items():
            log.warning("a request's grammar could not be followed: %s", error)
            self.end(request, error)
        for sequence, chosen in choices:
            if isinstance(chosen, Chosen) and sequence.request not in failed:
                self._deliver(sequence, chosen)

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
            self.end(request)

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
                child = self.new_sequence(request)
                self._scheduler.fork(entry.sequence, child)
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
            self._scheduler.remove(sequence)
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
