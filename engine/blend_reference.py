"""The plain form of `blend`: transformers' own model and cache, one prompt at a time. What the engine is held against.

Invariant: nothing of the pool, the plan or the kernels is used, so that a fault in them cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stemcache.engine.blend import Blend

KV = list[tuple[Tensor, Tensor]]
"""Of each layer keys and values, each [1, kv_heads, tokens, head_dim]."""


@torch.inference_mode()
def blended(model: PreTrainedModel, prompt: Sequence[int], blend: Blend) -> tuple[Tensor, KV]:
    """The logits of the prompt's last token, float32[vocabulary], and the prompt's keys and values.

    model: with attention of its own, "sdpa" or "eager". The passage right after the head is exact where it stands and
    is neither moved nor computed again.
    """
    tokens = torch.tensor([list(prompt)], device=model.device)
    logits, kv = _read(model, tokens)
    kept: set[int] = set()
    for start, stop in blend.passages:
        first = start + blend.computed_again((start, stop))
        last = min(stop, len(prompt) - 1)  # the last token is computed: its logits are wanted
        if start == blend.head or first >= last:
            continue
        _, alone = _read(model, torch.cat([tokens[:, : blend.head], tokens[:, start:stop]], dim=1))
        shift = start - blend.head
        for (key, value), (old_key, old_value) in zip(kv, alone, strict=True):
            key[:, :, first:last] = rotated(model, old_key[:, :, first - shift : last - shift], shift)
            value[:, :, first:last] = old_value[:, :, first - shift : last - shift]
        kept.update(range(first, last))
    if not kept:
        return logits, kv
    rows = torch.tensor([at for at in range(min(kept), len(prompt)) if at not in kept], device=model.device)
    visible = torch.arange(len(prompt), device=model.device) <= rows[:, None]
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=model.device).masked_fill(~visible, float("-inf"))
    output = model(
        input_ids=tokens[:, rows],
        position_ids=rows[None],
        attention_mask=mask[None, None],
        past_key_values=_Scattered(kv, rows),
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[0, -1].float(), kv


def rotated(model: PreTrainedModel, key: Tensor, shift: int) -> Tensor:
    """Keys [..., head_dim] moved on by `shift` positions: rotated by halves, as transformers' `rotate_half` does."""
    frequencies = next(each for name, each in model.named_buffers() if name.rpartition(".")[2] == "inv_freq").double()
    angles = torch.cat([frequencies, frequencies]) * shift
    turning, fixed = key[..., : len(angles)].float(), key[..., len(angles) :].float()
    first, second = turning.chunk(2, dim=-1)
    turned = turning * angles.cos().float() + torch.cat([-second, first], dim=-1) * angles.sin().float()
    return torch.cat([turned, fixed], dim=-1).to(key.dtype)


def _read(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, KV]:
    cache = DynamicCache()
    output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float(), [(layer.keys, layer.values) for layer in cache.layers]


class _Scattered(DynamicCache):  # type: ignore[misc]  # transformers' classes are untyped
    """A cache that has all tokens, and takes new keys and values of those in `rows`."""

    def __init__(self, kv: KV, rows: Tensor) -> None:
        super().__init__()
        self._kv, self._rows = kv, rows

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for whole, new in zip(self._kv[layer], (key, value), strict=True):
            whole[:, :, self._rows] = new
        return self._kv[layer]
