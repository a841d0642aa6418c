"""From logits to tokens.

Invariant: what a sequence draws depends on its own logits, history and seed only, never on what else is in the batch.

Temperature, top-k, top-p, min-p and the repetition penalty are transformers' own logits processors, so they mean what
they mean in `generate`; OpenAI's penalties and the logit bias are two lines each and stand here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stemcache.engine.errors import EngineError, GrammarError
from stemcache.engine.grammar import GrammarMatcher
from stemcache.engine.outputs import TokenLogprob
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.token_rules import TokenRules


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token and, where the request asked, its log-probability."""

    token_id: int
    logprob: TokenLogprob | None


class TokenChooser:
    """Chooses the tokens of one sequence; owns its random state and its grammar's, which survive preemption."""

    def __init__(
        self,
        params: SamplingParams,
        index: int,
        device: torch.device,
        *,
        rules: TokenRules | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params = params
        self._rules = rules
        self._matcher = matcher
        self._generated = 0
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((params.seed + index) % 2**63)
        self._repetition = (
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty) if params.repetition_penalty != 1.0 else None
        )
        self._warpers = LogitsProcessorList()
        if params.temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(params.top_p)))
        if params.min_p > 0:
            self._warpers.append(MinPLogitsWarper(float(params.min_p)))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return self.params.is_plain_greedy and self._rules is None

    def note(self, token: int) -> None:
        """Record a generated token for the penalties, rules and grammar that look at them. Raises GrammarError."""
        self._counts[token] += 1
        self._generated += 1
        if self._matcher is not None:
            self._matcher.advance(token)

    @property
    def is_complete(self) -> bool:
        """Whether there is a grammar, and nothing may follow what was generated."""
        return self._matcher is not None and self._matcher.is_complete

    def choose(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token from raw logits float32[vocabulary], after `history` (prompt and output). Raises GrammarError.

        The grammar comes before temperature and filters, so that `top_k` and the like choose among what it allows.
        """
        scores = self._penalised(logits, history)
        if self._rules is not None:
            scores = self._rules.apply(scores, history[len(history) - self._generated :])
        if self._matcher is not None:
            scores = scores.masked_fill(~self._matcher.allowed().to(scores.device), -torch.inf)
            if bool(scores.max() == -torch.inf):
                raise GrammarError(
                    "every token that the grammar allows next is ruled out, by the model or by token rules"
                )
        if self.params.temperature == 0:
            return int(scores.argmax())
        scores = self._warpers(None, scores[None])[0]
        return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=self._generator))

    def _penalised(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        if not self.params.reshapes_logits:
            return logits
        scores = logits.clone()
        if self._repetition is not None:
            seen = torch.tensor([history], device=logits.device)
            scores = self._repetition(seen, scores[None])[0]
        if self._counts and (self.params.presence_penalty or self.params.frequency_penalty):
            tokens = torch.tensor(list(self._counts), device=logits.device)
            times = torch.tensor(list(self._counts.values()), device=logits.device, dtype=scores.dtype)
            scores[tokens] -= self.params.presence_penalty + self.params.frequency_penalty * times
        if self.params.logit_bias:
            tokens = torch.tensor(list(self.params.logit_bias), device=logits.device)
            scores[tokens] += torch.tensor(
                list(self.params.logit_bias.values()), device=logits.device, dtype=scores.dtype
            )
        return scores


def choose_tokens(
    logits: Tensor, choosers: Sequence[TokenChooser], histories: Sequence[Sequence[int]]
) -> list[Chosen | GrammarError]:
    """One token for each row of `logits` float32[n, vocabulary], or the error that ends its request alone.

    Raises EngineError when the model gave NaN, which no sampling rule can mend.
    """
    best, greedy = logits.max(-1)
    # A maximum is NaN exactly when its row holds one, so this costs no pass of its own.
    if bool(torch.isnan(best).any()):
        raise EngineError(
            "the model produced NaN logits: its weights are broken or its dtype overflows; try --dtype float32"
        )
    greedy_ids = greedy.tolist()
    chosen: list[Chosen | GrammarError] = []
    for row, (chooser, history) in enumerate(zip(choosers, histories, strict=True)):
        try:
            token = greedy_ids[row] if chooser.is_plain_greedy else chooser.choose(logits[row], history)
            chooser.note(token)
        except GrammarError as error:
            chosen.append(error)
            continue
        chosen.append(Chosen(token, _logprob(logits[row], token, chooser.params.logprobs)))
    return chosen


def _logprob(logits: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs = torch.log_softmax(logits, -1)
    values, tokens = logprobs.topk(min(alternatives, logprobs.shape[-1]))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
