"""Passages read alone: each right after the head of its prompt, into the ordinary cache, so that they can be moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stemcache.engine.blend import Blend
from stemcache.engine.engine import Engine
from stemcache.engine.sampling import SamplingParams

_READ = SamplingParams(max_tokens=0)


def alone(engine: Engine, prompt: Sequence[int], blend: Blend) -> list[list[int]]:
    """What is read of each passage of a prompt."""
    return [blend.alone(prompt, passage, engine.chunk_tokens) for passage in blend.passages]


def read_alone(
    engine: Engine, prompts: Iterable[tuple[Sequence[int], Blend]], tenant: bytes, cache_salt: bytes
) -> None:
    """Have the engine read what is not cached of the prompts' passages, all at once, and wait for it.

    Raises what `Engine.submit` raises.
    """
    wanted = [tokens for prompt, blend in prompts for tokens in alone(engine, prompt, blend)]
    cached = engine.cache.cached_of(wanted, tenant=tenant, cache_salt=cache_salt)
    streams = []
    try:
        for tokens, n_cached in zip(wanted, cached, strict=True):
            if n_cached < len(tokens):
                streams.append(engine.submit(tokens, _READ, tenant=tenant, cache_salt=cache_salt))
        for stream in streams:
            for _ in stream:
                pass
    finally:
        for stream in streams:
            stream.cancel()
