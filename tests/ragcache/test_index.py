"""Every index against comparing with all vectors, through random additions, removals and restarts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from stemcache.ragcache.index import KINDS, HNSWIndex, IVFIndex, load_index, new_index

DIMENSIONS = 24


def unit(rng, n):
    vectors = rng.normal(size=(n, DIMENSIONS)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors, query, k, allowed=None):
    keys = [key for key in vectors if allowed is None or key in allowed]
    return sorted(keys, key=lambda key: (-float(vectors[key] @ query), key))[:k]


@pytest.mark.parametrize("kind", KINDS)
def test_random_changes(kind, tmp_path):
    rng, random = np.random.default_rng(3), Random(3)
    index, model, last = new_index(kind, DIMENSIONS), {}, 0
    agreed = asked = 0
    for turn in range(40):
        if random.random() < 0.6 or not model:
            n = random.randint(1, 200)
            vectors, keys = unit(rng, n), list(range(last + 1, last + n + 1))
            index.add(keys, vectors)
            model |= dict(zip(keys, vectors, strict=True))
            last += n
        else:
            gone = random.sample(sorted(model), random.randint(0, len(model) // 2))
            index.remove([*gone, 10**9])
            model = {key: value for key, value in model.items() if key not in set(gone)}
        assert len(index) == len(model)
        if turn % 13 == 12:
            index.save(tmp_path / "index")
            index = load_index(kind, DIMENSIONS, tmp_path / "index")
        query, k = unit(rng, 1)[0], random.randint(1, 8)
        found = index.search(query, k)
        assert [each.score for each in found] == pytest.approx(
            [float(model[each.key] @ query) for each in found], abs=1e-5
        )
        assert len(found) == min(k, len(model)) or kind != "flat"
        agreed += len({each.key for each in found} & set(nearest(model, query, k)))
        asked += min(k, len(model))
        allowed = set(random.sample(sorted(model), min(len(model), random.randint(0, 30))))
        assert [f.key for f in index.search(query, k, sorted(allowed))] == nearest(model, query, k, allowed)
    assert agreed / asked >= {"flat": 1.0, "ivf": 0.6, "hnsw": 0.95}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 30, 3000])
def test_the_last_stage_is_the_search(kind, n):
    rng = np.random.default_rng(n)
    index = new_index(kind, DIMENSIONS)
    index.add(list(range(n)), unit(rng, n))
    improved = 0
    for query in unit(rng, 20):
        stages = list(index.stages(query, 5))
        assert stages[-1] == index.search(query, 5)
        assert all(len(stage) <= 5 for stage in stages)
        improved += stages[0] != stages[-1]
    if n == 3000 and kind != "flat":
        assert len(stages) == 4
        assert improved, "the first stage was always right: nothing was staged"


def test_ivf_looking_into_all_lists_is_exact():
    rng = np.random.default_rng(9)
    vectors = unit(rng, 2500)
    index = IVFIndex(DIMENSIONS, n_probe=10**6)
    index.add(list(range(2500)), vectors)
    assert index.n_lists > 30
    for query in unit(rng, 20):
        assert [f.key for f in index.search(query, 7)] == nearest(dict(enumerate(vectors)), query, 7)


def test_a_graph_finds_its_living_among_many_dead():
    rng = np.random.default_rng(2)
    vectors = unit(rng, 600)
    index = HNSWIndex(DIMENSIONS)
    index.add(list(range(600)), vectors)
    index.remove(list(range(299)))
    alive = {key: vectors[key] for key in range(299, 600)}
    for query in unit(rng, 10):
        assert [f.key for f in index.search(query, 4)] == nearest(alive, query, 4)


def test_equal_vectors_come_by_key():
    for kind in KINDS:
        index = new_index(kind, 2)
        index.add([5, 3, 9], np.array([[1, 0]] * 3, np.float32))
        assert [f.key for f in index.search(np.array([1, 0], np.float32), 3)] == [3, 5, 9]


def test_what_cannot_be_loaded_is_none(tmp_path):
    index = new_index("flat", DIMENSIONS)
    index.add([1], unit(np.random.default_rng(0), 1))
    index.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    assert load_index("flat", DIMENSIONS, tmp_path / "cut") is None
    assert load_index("flat", DIMENSIONS, tmp_path / "missing") is None
    assert load_index("flat", DIMENSIONS + 1, tmp_path / "good") is None
    assert load_index("hnsw", DIMENSIONS, tmp_path / "good") is None
    assert len(load_index("flat", DIMENSIONS, tmp_path / "good")) == 1
