"""Completions: streams read to their ends.

Invariant: when the iterator is dropped or fails, no stream of it runs any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stemcache.engine.outputs import Completion, Delta
from stemcache.engine.stream import Stream


def completions(streams: Sequence[Stream]) -> Iterator[Completion]:
    """Each stream's choices by index, the streams in order. Raises the error that ends a stream."""
    try:
        for prompt_index, stream in enumerate(streams):
            choices: dict[int, list[Delta]] = {}
            for delta in stream:
                choices.setdefault(delta.index, []).append(delta)
            for index, deltas in sorted(choices.items()):
                yield _completion(deltas, index, prompt_index, stream)
    finally:
        for stream in streams:
            stream.cancel()


def _completion(deltas: list[Delta], index: int, prompt_index: int, stream: Stream) -> Completion:
    reason = deltas[-1].finish_reason
    assert reason is not None
    return Completion(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        reason,
        index,
        prompt_index,
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        stream.usage,
    )
