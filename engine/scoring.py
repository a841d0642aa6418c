"""Log-probabilities of a prompt's own tokens.

Invariant: entry i of a prompt's list belongs to its token i and comes from the logits of position i - 1; the first
token has no predecessor, so its entry is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stemcache.engine.errors import EngineError
from stemcache.engine.outputs import TokenLogprob

# Rows whose log-softmax is held at once; a row of a large vocabulary is half a megabyte.
_ROWS = 64


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens`, token k under row k of `logits` float32[len(tokens), vocabulary].

    alternatives: how many of the likeliest tokens to name with each.
    Raises EngineError when the model gave NaN.
    """
    scored: list[TokenLogprob] = []
    for begin in range(0, len(tokens), _ROWS):
        chosen = torch.tensor(tokens[begin : begin + _ROWS], device=logits.device)[:, None]
        logprobs = torch.log_softmax(logits[begin : begin + _ROWS], -1)
        own = logprobs.gather(-1, chosen)
        if bool(torch.isnan(own).any()):
            raise EngineError("the model produced NaN logits: its weights are broken or its dtype overflows")
        ranks = (logprobs > own).sum(-1) + 1
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]), -1)
        columns = (chosen[:, 0].tolist(), own[:, 0].tolist(), ids.tolist(), values.tolist(), ranks.tolist())
        for token, logprob, others, their, rank in zip(*columns, strict=True):
            scored.append(TokenLogprob(token, logprob, tuple(zip(others, their, strict=True)), rank))
    return scored
