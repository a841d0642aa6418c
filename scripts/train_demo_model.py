"""Train the demo model: a small Llama that reads documents and answers from them.

    python scripts/train_demo_model.py --out engine/demo/model --minutes 60

The curriculum starts with one document of two facts and adds documents as the accuracy passes 0.9. The loss is the answers'
cross-entropy plus a twentieth of the loss on all tokens; answers repeat the question before the value, so copying emerges
early (what comes after "of Velmora is" stands in the document after the same words).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.demo.facts import SYSTEM_PROMPT, random_corpus  # noqa: E402  (the script runs before anything is installed)

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|document|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}"
    "{{ '<|system|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- for document in documents or [] -%}"
    "{{ '<|document|>' + (document['title'] + '\\n' if document['title'] else '') + document['text'] + '<|end|>' }}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['user', 'assistant'] -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] not in ['system', 'developer'] -%}"
    "{{ raise_exception('the demo model knows the roles system, developer, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
# (documents, facts each, filler sentences each, questions): the last stage is a mixture of all sizes up to it.
STAGES = [(1, 2, 0, 6), (2, 2, 0, 8), (3, 3, 0, 10), (4, 4, 1, 12), (6, 4, 2, 12), (9, 4, 2, 14), (12, 4, 2, 16)]
TOKENS_PER_STEP = 4096


def train_tokenizer(rng: random.Random, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, one token a digit, trained on the world that it will read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\s?[A-Za-z]+|\s?\d|\s?[^\sA-Za-z\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = random_corpus(rng, 4000, held_out=False)
    texts = (f"{d.title}\n{d.text} {' '.join(f.question for f in d.facts)}" for d in corpus)
    tokenizer.train_from_iterator(itertools.chain([SYSTEM_PROMPT] * 50, texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_example(rng: random.Random, stage: int) -> list[tuple[str, bool]]:
    """One conversation over one set of documents: pieces of text, and whether the model is to learn to say them."""
    documents, facts, fillers, questions = STAGES[stage]
    if stage == len(STAGES) - 1:
        documents, fillers = rng.randint(1, documents), rng.randint(0, 3)
        facts = rng.randint(2, 5)
    corpus = random_corpus(rng, documents, facts=facts, fillers=fillers, held_out=False)
    pieces = [("<|begin|>", False)]
    if rng.random() < 0.7:
        pieces.append((f"<|system|>{SYSTEM_PROMPT}<|end|>", False))
    pieces += [(f"<|document|>{d.title}\n{d.text}<|end|>", False) for d in corpus]
    for _ in range(questions):
        fact = rng.choice(rng.choice(corpus).facts)
        pieces += [(f"<|user|>{fact.question}<|end|><|assistant|>", False), (f"{fact.sentence}<|end|>", True)]
    return pieces


def make_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64[B, T] and the answers' mask bool[B, T], about TOKENS_PER_STEP tokens in all."""
    rows: list[tuple[list[int], list[bool]]] = []
    longest = 0
    while not rows or longest * len(rows) < TOKENS_PER_STEP:
        pieces = make_example(rng, stage)
        encoded = tokenizer.backend_tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        ids = [i for e in encoded for i in e.ids]
        learn = [said for e, (_, said) in zip(encoded, pieces, strict=True) for _ in e.ids]
        rows.append((ids, learn))
        longest = max(longest, len(ids))
    batch = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (ids, learn) in enumerate(rows):
        batch[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = torch.tensor(learn)
    return batch, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    tokenizer = train_tokenizer(rng, 1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    start, stage, accuracy, since = time.monotonic(), 0, 0.0, 0
    for step in itertools.count():
        used = (time.monotonic() - start) / (60 * options.minutes)
        if used >= 1:
            break
        rate = 1.5e-3 * min(1.0, (step + 1) / 100) * (1.0 if used < 0.6 else 0.02 + 0.98 * (1 + math.cos(math.pi * (used - 0.6) / 0.4)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, said = make_batch(rng, tokenizer, stage if rng.random() < 0.85 else rng.randint(0, stage))
        ids, said = ids.to(options.device), said.to(options.device)
        with torch.autocast(options.device, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        target, learn, real = ids[:, 1:], said[:, 1:], ids[:, 1:] != tokenizer.pad_token_id
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        losses = torch.nn.functional.cross_entropy(flat, target.reshape(-1), reduction="none").view_as(target)
        loss = losses[learn].mean() + 0.05 * losses[real].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = ((logits[:, :-1].argmax(-1) == target) | ~learn).float()
        # An answer is right when each of its tokens is: count answers by their last token's run.
        wrong_tokens = ((1 - right).sum()).item()
        answers = (learn[:, 1:] < learn[:, :-1]).sum().item() + learn[:, -1].sum().item()
        accuracy = 0.95 * accuracy + 0.05 * max(0.0, 1 - wrong_tokens / max(1, answers))
        since += 1
        if step % 50 == 0:
            print(f"{used:6.1%} step {step} stage {stage} loss {loss.item():.3f} answers {losses[learn].mean().item():.4f} right {accuracy:.3f} shape {tuple(ids.shape)}", flush=True)
        if accuracy > 0.9 and since > 60 and stage < len(STAGES) - 1:
            stage, since, accuracy = stage + 1, 0, 0.5
        if step % 500 == 0:
            save(model, tokenizer, options.out)
    save(model, tokenizer, options.out)
    print(f"saved to {options.out}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint folder; also in between, so that an interrupted run leaves what it had."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
