"""Blends: what was moved equals the plain form, and nobody else ever gets it."""

from __future__ import annotations

import random
from typing import Any

import equivalence
import pytest
import torch
from equivalence import VOCABULARY, Reference, random_models
from transformers import LlamaConfig, Phi3Config, PreTrainedModel

from stemcache import Engine, SamplingParams
from stemcache.engine.blend import Blend, Moved
from stemcache.engine.blend_reference import blended
from stemcache.engine.errors import BlendRefusedError, InvalidRequestError
from stemcache.engine.movable import FAMILIES, require_movable

CHUNK = 16
READ = SamplingParams(max_tokens=0)
ONE = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "half of the head": {"rope_type": "default", "partial_rotary_factor": 0.5},
}  # fmt: skip


def random_tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]


def random_blend(rng: random.Random, share: float, head: list[int] | None = None) -> tuple[list[int], Blend]:
    """Two to five passages, some right after one another, some not right after the head, one perhaps at the end."""
    prompt = random_tokens(rng, 1, 40) if head is None else list(head)
    n_head, passages = len(prompt), []
    for _ in range(rng.randint(2, 5)):
        prompt += random_tokens(rng, 0, 3)
        passages.append((len(prompt), len(prompt) + rng.randint(1, 40)))
        prompt += random_tokens(rng, 40, 40)[: passages[-1][1] - passages[-1][0]]
    prompt += random_tokens(rng, 0, 6)
    return prompt, Blend(n_head, tuple(passages), share)


def read_alone(engine: Engine, prompt: list[int], blend: Blend) -> None:
    for passage in blend.passages:
        list(engine.submit(blend.alone(prompt, passage, engine.chunk_tokens), READ))


def require_equal(engine: Engine, own: PreTrainedModel, prompt: list[int], blend: Blend) -> tuple[Moved, ...]:
    """The engine's log-probabilities after a blended prompt are the plain form's; returns what was moved."""
    read_alone(engine, prompt, blend)
    stream = engine.submit(prompt, ONE, blend=blend)
    (delta,) = stream
    expected = blended(own, prompt, blend)[0].log_softmax(-1)
    for token, logprob in delta.logprobs[0].top:
        assert abs(logprob - float(expected[token])) < 2e-4
    exact = blended(own, prompt, Blend(0, ()))[0].log_softmax(-1)
    if sum(len(moved.kept) for moved in stream.usage.moved) > 10:
        assert (expected - exact).abs().max() > 2e-3, "the test could not tell a blend from the whole computation"
    return stream.usage.moved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_plain_form(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, extra = equivalence.FAMILIES[family]
    windowless = {
        name: False if name.startswith("use") else None if name == "sliding_window" else value
        for name, value in extra.items()
    }
    monkeypatch.setitem(equivalence.FAMILIES, family, (kind, windowless))
    served, own = random_models(family)
    rng = random.Random(family)
    with Engine.from_model(served, pool_bytes=2 << 20, chunk_tokens=CHUNK) as engine:
        moved = [require_equal(engine, own, *random_blend(rng, share)) for share in (0, 0.15, 0.5, 1)]
        assert all(moved[:2]), "passages were moved"
        assert not moved[3], "all of each was computed, so none was moved"
        engine.check()


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rotations_equal_the_plain_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "phi3" if "half" in name else "llama"
    kind, _ = equivalence.FAMILIES[family]
    rope = {"rope_theta": 10_000.0, **SCALED[name]}
    monkeypatch.setitem(equivalence.FAMILIES, family, (kind, {"rope_parameters": rope}))
    served, own = random_models(family)
    with Engine.from_model(served, pool_bytes=2 << 20, chunk_tokens=CHUNK) as engine:
        assert require_equal(engine, own, *random_blend(random.Random(name), 0.15))


@pytest.mark.parametrize("max_step_tokens", [5, 23, 2048])
def test_small_steps_change_nothing(max_step_tokens: int) -> None:
    served, own = random_models("llama")
    rng = random.Random(max_step_tokens)
    with Engine.from_model(served, pool_bytes=1 << 20, chunk_tokens=CHUNK, max_step_tokens=max_step_tokens) as engine:
        for _ in range(4):
            require_equal(engine, own, *random_blend(rng, rng.choice([0, 0.15, 0.3])))
        engine.check()


def test_only_what_is_not_moved_is_computed(llama_engine: Any) -> None:
    engine = llama_engine()
    head, first, second, question = [5] * 20, [6] * 30, [7] * 40, [8] * 3
    prompt = head + first + second + question
    blend = Blend(20, ((20, 50), (50, 90)), 0.25)
    read_alone(engine, prompt, blend)
    rows = []
    run = engine._runner.run
    engine._runner.run = lambda step: (rows.append([entry.runs for entry in step]), run(step))[1]
    with engine.submit(prompt, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), blend=blend) as stream:
        list(stream)
    assert rows == [[(range(50, 60), range(90, 93))], [(range(93, 94),)]]
    assert stream.usage.cached_tokens == 50, "head and first passage are exact, where they stand"
    assert stream.usage.moved == (Moved(50, 90, 10),)
    assert (stream.usage.moved_tokens, engine.activity().moved_tokens) == (30, 30)


def test_exact_requests_never_see_a_blend() -> None:
    """Both kinds at once, sharing heads and passages, with too little room, forks and cancellations."""
    served, own = random_models("llama")
    reference, preempted, moved = Reference(own), 0, 0
    for seed in range(3):
        rng = random.Random(seed)
        with Engine.from_model(
            served, pool_bytes=(72, 400, 110)[seed] << 10, chunk_tokens=CHUNK, max_step_tokens=rng.choice([9, 64])
        ) as engine:
            head, running = random_tokens(rng, 10, 30), []
            prompts = [random_blend(rng, rng.choice([0, 0.15]), head) for _ in range(4)]
            for _ in range(24):
                prompt, blend = rng.choice(prompts)
                params = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True, n=rng.choice([1, 1, 2]))
                if rng.random() < 0.5:
                    for passage in blend.passages:
                        running.append((engine.submit(blend.alone(prompt, passage, CHUNK), READ), None))
                    running.append((engine.submit(prompt, params, blend=blend), None))
                    if rng.random() < 0.2:
                        running[-1][0].cancel()
                else:
                    cut = prompt[: rng.randint(len(prompt) // 2, len(prompt))]
                    running.append((engine.submit(cut, params), cut))
            for stream, exact in running:
                choices: dict[int, list[int]] = {}
                for delta in stream:
                    choices.setdefault(delta.index, []).extend(delta.token_ids)
                moved += stream.usage.moved_tokens
                if exact is not None:
                    assert all(tokens == reference.continuation(exact, 14) for tokens in choices.values())
            engine.check()
            stats = engine.stats()
            assert (stats.store.leases, stats.store.claims, stats.store.private_chunks) == (0, 0, 0)
            preempted += stats.preemptions
    assert moved > 200
    assert preempted > 0


def test_what_is_not_cached_is_computed_exactly(llama_engine: Any, models: Any) -> None:
    engine, (prompt, blend) = llama_engine(), random_blend(random.Random(4), 0)
    stream = engine.submit(prompt, ONE, blend=blend)
    (delta,) = stream
    assert stream.usage.moved == ()
    assert list(delta.token_ids) == models("llama")[1].continuation(prompt, 1)
    assert engine.cache.cached_tokens(prompt) >= len(prompt) // CHUNK * CHUNK, "an exact prompt is published"


def test_a_passage_that_was_evicted_in_part_is_moved_in_part(llama_engine: Any) -> None:
    engine = llama_engine()
    prompt, blend = [5] * 16 + [6] * 10 + [9] * 40 + [7] * 3, Blend(16, ((26, 66),), 0)
    list(engine.submit(blend.alone(prompt, (26, 66), CHUNK)[:32], READ))
    stream = engine.submit(prompt, ONE, blend=blend)
    list(stream)
    assert stream.usage.moved == (Moved(26, 42, 0),)


def test_choices_of_a_blend_are_those_of_one_alone(llama_engine: Any) -> None:
    engine, (prompt, blend) = llama_engine(), random_blend(random.Random(8), 0.15)
    read_alone(engine, prompt, blend)
    params = dict(max_tokens=8, seed=3, ignore_eos=True)
    both = engine.submit(prompt, SamplingParams(n=2, **params), blend=blend)
    found: dict[int, list[int]] = {0: [], 1: []}
    for delta in both:
        found[delta.index] += delta.token_ids
    alone = [t for delta in engine.submit(prompt, SamplingParams(**params), blend=blend) for t in delta.token_ids]
    assert found[0] == alone
    assert found[1] != alone


def test_wrong_blends_are_refused(llama_engine: Any) -> None:
    engine = llama_engine()
    for head, passages, share in [(3, ((2, 5),), 0), (3, ((3, 5), (4, 9)), 0), (3, ((5, 5),), 0), (3, (), 1.5)]:
        with pytest.raises(InvalidRequestError):
            Blend(head, passages, share)
    with pytest.raises(InvalidRequestError, match="ends at 9"):
        engine.submit([5] * 8, ONE, blend=Blend(2, ((3, 9),)))
    with pytest.raises(InvalidRequestError, match="log-probabilities of the prompt"):
        engine.submit([5] * 9, SamplingParams(prompt_logprobs=1), blend=Blend(2, ((3, 9),)))


@pytest.mark.parametrize("family", sorted(set(equivalence.FAMILIES) - set(FAMILIES) | {"mistral", "qwen2", "phi3"}))
def test_families_are_refused_by_name(family: str) -> None:
    """Those of the list because of their windows."""
    with Engine.from_model(random_models(family)[0], pool_bytes=1 << 20, chunk_tokens=CHUNK) as engine:
        with pytest.raises(BlendRefusedError, match=f"'{family}'|this {family} model: .* window of"):
            engine.submit([5] * 9, ONE, blend=Blend(2, ((3, 9),)))
        assert len(list(engine.submit([5] * 9, ONE))) == 1, "everything else goes on"


def test_rotations_that_depend_on_the_length_are_refused() -> None:
    factors = [1.0] * 48
    longrope = {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 10_000.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    for config in (Phi3Config(rope_parameters=longrope), LlamaConfig(rope_parameters=dynamic)):
        with pytest.raises(BlendRefusedError, match=f"type '{config.rope_parameters['rope_type']}'"):
            require_movable(config)


def test_a_wrong_rotation_is_found_out(llama_engine: Any) -> None:
    for wrong in (lambda f: -f, lambda f: f.flip(0), lambda f: f * 1.001, lambda f: f[: len(f) // 2], lambda f: None):
        engine = llama_engine()
        right = engine._loop.mover.frequencies
        engine._loop.mover.frequencies = wrong(right)
        with pytest.raises(BlendRefusedError, match="rota"):
            engine.require_movable()
        engine._loop.mover.frequencies = right
        engine.require_movable()
    with torch.no_grad():
        assert torch.equal(right, engine._loop.mover.frequencies)
