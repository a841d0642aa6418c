"""Greedy float32 tokens of the engine against transformers' own `generate`, over random workloads of every family.

    python benchmarks/equivalence.py --workloads 200

A workload is a pool of a few chunks, prompts that share prefixes and diverge inside chunks, arrivals in mid-flight,
forks (n = 2), cancellations, small steps, and too little room, so that it evicts and preempts. Each finished choice
must equal what `generate` gives for its prompt alone. The tests run a few workloads of each family; this runs many
and counts.
"""

from __future__ import annotations

import argparse
import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from harness import table, write_results
from rich.progress import track
from transformers import PreTrainedModel

from stemcache import Engine, SamplingParams
from stemcache.engine.stream import Stream

VOCABULARY = 128
CHUNK = 16
LONGEST_PROMPT = 96

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2)

# Windows are shorter than the prompts and fall inside chunks; every other layer is windowed where a family mixes them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": 21}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 4}),
    "gemma2": ("Gemma2Config", {"sliding_window": 23, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 13, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    "phi3": ("Phi3Config", {"sliding_window": 33}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 17, "num_local_experts": 4, **_EXPERTS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS}),
}


def random_models(
    family: str, *, dtype: torch.dtype = torch.float32, head_dim: int = 16
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of a family with the same random weights: one to serve, one with transformers' own attention."""
    kind, extra = FAMILIES[family]
    config_class = getattr(transformers, kind)
    own_attention = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    models = []
    for _ in range(2):
        config = config_class(**{**_COMMON, **extra, "head_dim": head_dim})
        config._attn_implementation = own_attention
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=own_attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:  # the default of 0.02 would leave attention with next to no say in the logits
                    parameter.normal_(std=1.4 * parameter.shape[-1] ** -0.5)
                elif name.endswith("sinks"):
                    parameter.normal_()
        models.append(model.eval())
    return models[0], models[1]


@dataclass
class Tally:
    """What a number of workloads did. `differences` holds one line for each choice that was not equal."""

    choices: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    cancelled: int = 0
    differences: list[str] = field(default_factory=list)

    def compare(self, tokens: list[int], expected: list[int], limit: int, where: str) -> None:
        self.choices += 1
        self.tokens += len(tokens)
        if len(tokens) != limit or tokens != expected:
            self.differences.append(f"{where}: {tokens} is not {expected}")

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Reference:
    """Greedy continuations by transformers' own model: its `generate`, remembered by prompt, or one forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: dict[tuple[int, ...], list[int]] = {}

    def continuation(self, prompt: list[int], n_tokens: int) -> list[int]:
        key = tuple(prompt)
        if len(self._known.get(key, ())) < n_tokens:
            with torch.inference_mode():
                output = self._model.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=n_tokens, do_sample=False, eos_token_id=None,
                )  # fmt: skip
            self._known[key] = output[0, len(prompt) :].tolist()
        return self._known[key][:n_tokens]

    @torch.inference_mode()
    def judge(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """The best token after the prompt, and after each of `tokens` but the last, without any cache: `tokens`
        themselves exactly if they are the greedy continuation. A tenth of `generate`'s time."""
        logits = self._model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0]
        best: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
        return best


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of 1 to LONGEST_PROMPT tokens; most continue a cut of an earlier one."""
    prompts: list[list[int]] = []
    for _ in range(count):
        stem: list[int] = []
        if prompts and rng.random() < 0.75:
            parent = rng.choice(prompts)
            stem = parent[: rng.choice([len(parent), rng.randint(0, len(parent)), len(parent) // CHUNK * CHUNK])]
        room = LONGEST_PROMPT - len(stem)
        fresh = rng.randint(0 if stem else 1, max(1, min(room, rng.choice([3, 20, 60]))))
        prompts.append(stem + [rng.randrange(3, VOCABULARY) for _ in range(fresh)])
    return prompts


def run_workload(served: PreTrainedModel, reference: Reference, seed: int, *, by_generate: bool = True) -> Tally:
    """One random workload; compares every choice that was not cancelled, and checks the store afterwards.

    by_generate: with `Reference.continuation`, else with `Reference.judge`.
    """
    rng = random.Random(seed)
    prompts = random_prompts(rng, rng.randint(2, 7))
    limits = [rng.choice([1, 5, 12, 30]) for _ in prompts]
    longest = max(-(-(len(p) + n) // CHUNK) for p, n in zip(prompts, limits, strict=True))
    tally = Tally()
    chunk_bytes = CHUNK * 2 * served.config.num_hidden_layers * served.config.num_key_value_heads * 16 * 4
    with Engine.from_model(
        served,
        pool_bytes=chunk_bytes * (longest + rng.choice([0, 1, 2, 8])),
        chunk_tokens=CHUNK,
        max_step_tokens=rng.choice([5, 16, 64, 512]),
    ) as engine:
        streams = []
        for prompt, limit in zip(prompts, limits, strict=True):
            params = SamplingParams(max_tokens=limit, temperature=0, n=rng.choice([1, 1, 2]), ignore_eos=True)
            streams.append((prompt, limit, engine.submit(prompt, params), rng.random() < 0.1))
            if rng.random() < 0.4:  # let the earlier ones get going, so that this one arrives in mid-flight
                engine.stats()
        for prompt, limit, stream, cancel in streams:
            if cancel:
                _cancel(stream, tally)
                continue
            choices = _choices(stream)
            tally.cached_tokens += stream.usage.cached_tokens
            for index, tokens in choices.items():
                expected = reference.continuation(prompt, limit) if by_generate else reference.judge(prompt, tokens)
                tally.compare(tokens, expected, limit, f"workload {seed}, choice {index}, prompt {prompt}")
        stats = engine.stats()
        engine.check()
        assert stats.running == stats.waiting == 0, "cancelled or finished requests are still scheduled"
        tally.preemptions, tally.evictions = stats.preemptions, stats.store.evicted_chunks
    return tally


def _cancel(stream: Stream, tally: Tally) -> None:
    stream.cancel()
    tally.cancelled += 1
    for _ in stream:
        pass


def _choices(stream: Stream) -> dict[int, list[int]]:
    """Each choice's tokens, by its index."""
    choices: dict[int, list[int]] = {}
    for delta in stream:
        choices.setdefault(delta.index, []).extend(delta.token_ids)
    return choices


@torch.inference_mode()
def bfloat16_errors(family: str, *, prompts: int, head_dim: int = 16) -> tuple[float, list[float]]:
    """Root mean square errors of bfloat16 logits against float32 on the same weights: ours, and transformers' own.

    Ours are those of cached, chunked and batched steps; transformers' those of one forward pass, of a batch padded on
    the left, and of a prefill in two parts with its cache.
    """
    served, own = random_models(family, dtype=torch.bfloat16, head_dim=head_dim)
    exact = copy.deepcopy(own).float()
    rng = random.Random(0)
    texts = random_prompts(rng, prompts)
    expected = [exact(torch.tensor([text])).logits[0, -1] for text in texts]
    got = _served_logits(served, texts)
    ours = _rms(got, expected)
    whole = [own(torch.tensor([text])).logits[0, -1].float() for text in texts]
    longest = max(map(len, texts))
    padded = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    batched = own(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1].float()
    parts = []
    for text in texts:
        half = own(torch.tensor([text[: len(text) // 2]]), use_cache=True) if len(text) > 1 else None
        cache = half.past_key_values if half is not None else None
        rest = text[len(text) // 2 :] if len(text) > 1 else text
        parts.append(own(torch.tensor([rest]), past_key_values=cache, use_cache=True).logits[0, -1].float())
    return ours, [_rms(whole, expected), _rms(list(batched), expected), _rms(parts, expected)]


def _served_logits(served: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits from which the engine chooses each prompt's first token, prompt by prompt, in steps of 16 tokens."""
    rows: list[torch.Tensor] = []
    with Engine.from_model(served, pool_bytes=1 << 22, chunk_tokens=CHUNK, max_step_tokens=16) as engine:
        run = engine._runner.run

        def record(step: list[Any]) -> torch.Tensor:
            logits = run(step)
            rows.extend(logits.clone())  # the next step may overwrite them
            return logits

        engine._runner.run = record  # type: ignore[method-assign, assignment]
        for prompt in prompts:
            list(engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0)))
    return rows


def _rms(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return float((torch.stack(got) - torch.stack(expected)).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=200)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for family in options.families:
        served, own = random_models(family)
        reference, total = Reference(own), Tally()
        for seed in track(range(options.workloads), description=family):
            total.add(run_workload(served, reference, seed))
        counts = {name: value for name, value in vars(total).items() if name != "differences"}
        rows.append({"family": family, **counts, "differences": len(total.differences)})
        for line in total.differences[:3]:
            print(line)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    write_results("equivalence", {"workloads": options.workloads, "rows": rows})
    if any(row["differences"] for row in rows):
        raise SystemExit("the engine's tokens differ from generate's")


if __name__ == "__main__":
    main()
