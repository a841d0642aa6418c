"""Randomly initialised models of real shapes: no weights are needed to measure speed and memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stemcache import Engine

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
)  # fmt: skip
"""HuggingFaceTB/SmolLM2-135M's config.json."""

QWEN3_06B = dict(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rope_theta=1000000.0, tie_word_embeddings=True,
)  # fmt: skip
"""Qwen/Qwen3-0.6B's config.json. As a Llama it lacks the norms of queries and keys, a hundredth of its operations."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_model(dtype: str, shape: dict[str, Any] = SMOLLM2_135M) -> PreTrainedModel:
    """A Llama of that shape with seeded random weights and transformers' own attention (sdpa)."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).to(DTYPES[dtype]).eval()


@contextmanager
def paired(dtype: str, *, pool_bytes: int) -> Iterator[tuple[Engine, PreTrainedModel]]:
    """An engine and transformers over the same weights: two model objects, since each has its own attention."""
    own, served = random_model(dtype), random_model(dtype)
    served.load_state_dict(own.state_dict())
    with Engine.from_model(served, pool_bytes=pool_bytes) as engine:
        yield engine, own


def random_tokens(rng: random.Random, count: int, vocabulary: int = SMOLLM2_135M["vocab_size"]) -> list[int]:  # type: ignore[assignment]
    """Token ids that nothing has seen before."""
    return [rng.randrange(vocabulary) for _ in range(count)]


def cache_of(model: PreTrainedModel, tokens: list[int]) -> DynamicCache:
    """Transformers' own cache after reading `tokens`."""
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache
