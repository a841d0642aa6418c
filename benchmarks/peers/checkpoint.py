"""The checkpoint that all servers load: random weights, and a tokenizer in which every word is one token.

Invariant: a text of N words is N tokens on every server, and what the model says are such words again, so an answer
that comes back as part of the next prompt is found in a cache, as it would be in use.

Every token but the words has an embedding of zeros. As input and output embeddings are tied, its logit is 0, and
among ten thousand others some are always greater: no answer ends early, and none holds half a character. The words'
logits deviate so much (LOGIT_DEVIATION) that samples at temperature 1 are words too, yet differ.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import SMOLLM2_135M
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY = SMOLLM2_135M | dict(
    vocab_size=20_480, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
"""For smoke runs: the same heads, a hundredth of the work."""

END = "<|end|>"
LOGIT_DEVIATION = 5.0  # of words: one in a hundred thousand samples is another token

_SYLLABLES = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]
WORDS = [a + b for a, b in itertools.product(_SYLLABLES, repeat=2)]


def text_of(rng: random.Random, n_tokens: int) -> str:
    """Random text of exactly `n_tokens` tokens, to be put after any other."""
    return "".join(f" {word}" for word in rng.choices(WORDS, k=n_tokens))


def write_checkpoint(folder: Path, *, dtype: str, shape: dict[str, Any] = SMOLLM2_135M) -> Path:
    """Write it into `folder` as transformers does (`config.json`, `model.safetensors`, `tokenizer.json`), once.

    dtype: of weights and computation, float32 or bfloat16. Returns the folder.
    """
    if not (folder / "config.json").exists():
        tokenizer = build_tokenizer(shape["vocab_size"])
        tokenizer.save_pretrained(folder)
        random_weights(tokenizer, shape).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the merges that make a word and the space before it one token; unused tokens fill it up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "Ġ"  # how byte-level tokenizers write a space
    merges = [(syllable[0], syllable[1]) for syllable in _SYLLABLES]
    merges += [(word[:2], word[2:]) for word in WORDS]
    merges += [(space, word) for word in WORDS]
    tokens = [*alphabet, *("".join(merge) for merge in merges), END]
    tokens += [f"<|unused{i}|>" for i in range(vocab_size - len(tokens))]
    bare = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, pad_token=END)


def random_weights(tokenizer: PreTrainedTokenizerFast, shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of that shape, seeded, with the embeddings that the module describes."""
    torch.manual_seed(0)
    end = tokenizer.convert_tokens_to_ids(END)
    # With the usual 0.02 each token would only repeat itself: tied embeddings, and layers that add next to nothing.
    config = LlamaConfig(**shape | dict(bos_token_id=end, eos_token_id=end, pad_token_id=end, initializer_range=0.1))
    model = LlamaForCausalLM(config)
    words = torch.tensor(list(word_ids(tokenizer)))
    table = torch.zeros_like(model.model.embed_tokens.weight)
    table[words] = torch.randn(len(words), table.shape[1]) * LOGIT_DEVIATION / table.shape[1] ** 0.5
    model.model.embed_tokens.weight.data.copy_(table)
    model.generation_config.do_sample = False
    return model


def word_ids(tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """The tokens that are a word with its space."""
    yield from tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in WORDS])
