"""Which models can be served exactly, and what of their configuration the engine needs.

Invariant: a model is listed only if tests compare its tokens with transformers' own `generate`
(tests/engine/test_families.py); everything else is refused by name, because a cache that is almost right is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stemcache.engine.errors import ModelLoadError

FAMILIES = (
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)

# These change the rotation of all keys when a sequence grows past the original length, so keys computed before and
# after do not belong together; up to that length they are ordinary. (transformers.modeling_rope_utils:
# dynamic_rope_update)
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def require_served(config: Any) -> None:
    """Raise ModelLoadError unless the configuration is of a family that is served exactly."""
    if config.model_type not in FAMILIES:
        raise ModelLoadError(
            f"models of type {config.model_type!r} are not served, because their answers have not been shown to equal "
            f"transformers' own; served are: {', '.join(FAMILIES)}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelLoadError("bidirectional attention cannot be cached by prefix: this checkpoint is an encoder")


def context_length(config: Any) -> int:
    """Tokens that a sequence may have: the model's positions, or fewer where its rotation depends on the length."""
    length = int(config.max_position_embeddings)
    for rope in rope_parameters(config):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            length = min(length, int(original or length))
    return length


def rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The rotation's parameters; models with mixed windows have one set for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, dict))


def head_dim(config: Any) -> int:
    """Width of one key or value head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
