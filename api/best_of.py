"""OpenAI's `best_of`: more choices are generated than are returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stemcache.api.generation import Choice


def best_choices(choices: Sequence[Choice], *, n: int, best_of: int) -> list[Choice]:
    """Of each prompt's `best_of` choices the `n` with the highest mean log-probability, the best first."""
    best: list[Choice] = []
    for first in range(0, len(choices), best_of):
        ranked = sorted(choices[first : first + best_of], key=_mean_logprob, reverse=True)
        best += ranked[:n]
    return [dataclasses.replace(choice, index=index) for index, choice in enumerate(best)]


def _mean_logprob(choice: Choice) -> float:
    return sum(token.logprob for token in choice.logprobs) / max(1, len(choice.logprobs))
