"""Which models' keys can be moved to other positions.

Invariant: a family is listed only if a test compares its blends with the plain form (tests/engine/test_blend.py);
everything else is refused by name and with the reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stemcache.engine.errors import BlendRefusedError
from stemcache.engine.families import rope_parameters

FAMILIES = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")

_WHY_NOT = {
    "gemma2": "every other layer sees a window only",
    "gemma3_text": "its layers rotate keys by different frequencies",
    "gpt_oss": "every other layer sees a window only",
    "smollm3": "some of its layers do not rotate keys",
}

# Rotations that multiply positions by fixed frequencies, whatever they scale these by. "dynamic" and "longrope" choose
# the frequencies by the sequence's length. (transformers.modeling_rope_utils)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def require_movable(config: Any) -> None:
    """Raise BlendRefusedError unless a token's keys at two positions differ by a rotation alone."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise BlendRefusedError(
            f"documents cannot be moved in models of type {kind!r}: {_WHY_NOT.get(kind, 'nobody has tested it')}; "
            f"they can in {', '.join(FAMILIES)}"
        )
    types = sorted({str(rope.get("rope_type", "default")) for rope in rope_parameters(config)})
    refused = [each for each in types if each not in ROPE_TYPES]
    if refused:
        raise BlendRefusedError(
            f"documents cannot be moved under rotary scaling of type {refused[0]!r}, whose angles depend on the "
            f"sequence's length; they can under {', '.join(ROPE_TYPES)}"
        )
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windowed or (getattr(config, "sliding_window", None) is not None and kind in ("mistral", "mixtral", "phi3")):
        raise BlendRefusedError(
            f"documents cannot be moved in this {kind} model: it has layers that see a window of "
            f"{config.sliding_window} tokens only"
        )


def inverse_frequencies(model: PreTrainedModel) -> Tensor | None:
    """The angles in radians per position, [r]; None unless the model has just one set of them."""
    found = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"]
    return found[0] if len(found) == 1 else None
