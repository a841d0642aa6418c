"""Vector indexes: which passages are nearest to a question. FAISS, behind a small protocol.

Invariant: a key that was removed is never found again, and the last of `stages` is what `search` gives. Provisional
stages may be wrong; that is what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stemcache.ragcache.errors import MissingExtraError

try:
    import faiss
except ImportError:
    raise MissingExtraError("faiss-cpu", "rag") from None

Vectors = NDArray[np.float32]
Kind = Literal["flat", "ivf", "hnsw"]
KINDS: Final[tuple[Kind, ...]] = ("flat", "ivf", "hnsw")

# FAISS warns of fewer training points per list.
_PER_LIST: Final = 39
# Under so many vectors an exhaustive search takes less than a millisecond, and there is little to train lists with.
_TRAIN_AT: Final = 1024
_STAGES: Final = 4


@dataclass(frozen=True, slots=True)
class Found:
    """A key and the inner product of its vector with the question's."""

    key: int
    score: float


class VectorIndex(Protocol):
    """Vectors by key. Not thread-safe."""

    def __len__(self) -> int: ...

    def add(self, keys: Sequence[int], vectors: Vectors) -> None:
        """Add vectors `[n, dimensions]` under keys that are not in use."""
        ...

    def remove(self, keys: Sequence[int]) -> None:
        """Remove vectors; keys that are unknown are ignored."""
        ...

    def search(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> list[Found]:
        """Up to `k` of the (allowed) keys, the best first; equals by key."""
        ...

    def stages(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> Iterator[list[Found]]:
        """`search` in steps: after each what is known so far, at last the result."""
        ...

    def save(self, path: Path) -> None: ...


class FlatIndex:
    """Compares with every vector: exact. The right choice up to some 100,000 passages."""

    def __init__(self, dimensions: int, loaded: Any = None) -> None:
        self._index: Any = loaded or faiss.IndexIDMap2(faiss.IndexFlatIP(dimensions))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, keys: Sequence[int], vectors: Vectors) -> None:
        self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.asarray(keys, np.int64))

    def remove(self, keys: Sequence[int]) -> None:
        if keys:
            self._index.remove_ids(_batch(keys))

    def search(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> list[Found]:
        if k < 1 or (allowed is not None and not allowed):
            return []
        chosen = None if allowed is None else faiss.SearchParameters(sel=_batch(allowed))
        return _found(*self._index.search(_row(vector), k, params=chosen))

    def stages(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> Iterator[list[Found]]:
        yield self.search(vector, k, allowed)

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


class IVFIndex:
    """Vectors in lists around centroids; a search looks into the nearest `n_probe` lists, an eighth unless given.

    Flat until there are 1,024 vectors; lists are made anew each time that their number has grown fourfold. A filtered
    search looks into all lists, so it misses nothing.
    """

    def __init__(self, dimensions: int, loaded: Any = None, *, n_probe: int | None = None) -> None:
        self._dimensions = dimensions
        self._n_probe = n_probe
        is_flat = not isinstance(loaded, faiss.IndexIVFFlat)
        self._flat = FlatIndex(dimensions, loaded if is_flat else None)
        self._index: Any = None if is_flat else loaded
        self._trained_with = 0 if is_flat else int(loaded.ntotal)

    def __len__(self) -> int:
        return len(self._flat) if self._index is None else int(self._index.ntotal)

    @property
    def n_lists(self) -> int:
        """0 while the index is flat."""
        return 0 if self._index is None else int(self._index.nlist)

    def add(self, keys: Sequence[int], vectors: Vectors) -> None:
        if self._index is None:
            self._flat.add(keys, vectors)
        else:
            self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.asarray(keys, np.int64))
        if len(self) >= max(_TRAIN_AT, 4 * self._trained_with):
            self._train()

    def remove(self, keys: Sequence[int]) -> None:
        if self._index is None:
            self._flat.remove(keys)
        elif keys:
            self._index.remove_ids(_batch(keys))

    def search(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> list[Found]:
        return list(self.stages(vector, k, allowed))[-1]

    def stages(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> Iterator[list[Found]]:
        """The centroids are searched once, then the lists in slices, the nearest first."""
        if self._index is None or k < 1 or (allowed is not None and not allowed):
            yield from self._flat.stages(vector, k, allowed)
            return
        query = _row(vector)
        n_lists = self.n_lists if allowed is not None else min(self.n_lists, self._n_probe or max(8, self.n_lists // 8))
        distances, lists = self._index.quantizer.search(query, n_lists)
        best: list[Found] = []
        for part in np.array_split(np.arange(n_lists), min(_STAGES, n_lists)):
            best = _merge(best, self._look_into(query, k, lists[:, part], distances[:, part], allowed), k)
            yield best

    def save(self, path: Path) -> None:
        if self._index is None:
            self._flat.save(path)
        else:
            faiss.write_index(self._index, str(path))

    def _look_into(
        self, query: Vectors, k: int, lists: NDArray[np.int64], distances: Vectors, allowed: Sequence[int] | None
    ) -> list[Found]:
        """The best of some lists. By FAISS's own call, as its Python wrapper takes no parameters."""
        selector = None if allowed is None else _batch(allowed)
        chosen = faiss.SearchParametersIVF(nprobe=lists.shape[1], sel=selector)
        scores, keys = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
        lists, distances = np.ascontiguousarray(lists), np.ascontiguousarray(distances)
        pointers = [faiss.swig_ptr(array) for array in (query, lists, distances, scores, keys)]
        row, at, near, out_scores, out_keys = pointers
        self._index.search_preassigned_c(1, row, k, at, near, out_scores, out_keys, False, chosen)
        return _found(scores, keys)

    def _train(self) -> None:
        keys, vectors = _contents(self._flat._index if self._index is None else self._index)
        n_lists = max(1, min(int(4 * len(keys) ** 0.5), len(keys) // _PER_LIST))
        quantizer = faiss.IndexFlatIP(self._dimensions)
        index = faiss.IndexIVFFlat(quantizer, self._dimensions, n_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add_with_ids(vectors, keys)
        self._index, self._flat = index, FlatIndex(self._dimensions)
        self._trained_with = len(keys)


class HNSWIndex:
    """A graph of near neighbours: the fastest for very many passages, and the slowest to build.

    A graph loses no node, so removed keys are only left out of what is found, until they are as many as the others;
    then the graph is made anew. A filtered search compares with every allowed vector: in a graph it might find none.
    """

    _EFFORT: Final = 128  # FAISS's efSearch: how many candidates a search keeps

    def __init__(self, dimensions: int, loaded: Any = None) -> None:
        self._dimensions = dimensions
        self._index: Any = loaded or self._empty()
        self._dead: set[int] = set()

    def __len__(self) -> int:
        return int(self._index.ntotal) - len(self._dead)

    def add(self, keys: Sequence[int], vectors: Vectors) -> None:
        self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.asarray(keys, np.int64))

    def remove(self, keys: Sequence[int]) -> None:
        known = set(faiss.vector_to_array(self._index.id_map).tolist())
        self._dead |= known & set(keys)
        if len(self._dead) * 2 > self._index.ntotal:
            self._rebuild()

    def search(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> list[Found]:
        return self._search(vector, k, allowed, self._EFFORT)

    def stages(self, vector: Vectors, k: int, allowed: Sequence[int] | None = None) -> Iterator[list[Found]]:
        """Each with twice the effort of the one before: together as much again as the last one alone.

        FAISS's search of a graph cannot be stopped and gone on with, so time is sliced by effort.
        """
        if allowed is None:
            for step in range(_STAGES - 1, 0, -1):
                yield self._search(vector, k, None, self._EFFORT >> step)
        yield self.search(vector, k, allowed)

    def save(self, path: Path) -> None:
        if self._dead:
            self._rebuild()
        faiss.write_index(self._index, str(path))

    def _search(self, vector: Vectors, k: int, allowed: Sequence[int] | None, effort: int) -> list[Found]:
        if k < 1 or not len(self):
            return []
        if allowed is not None:
            return self._among(vector, k, allowed)
        selector = faiss.IDSelectorNot(_batch(sorted(self._dead))) if self._dead else None
        chosen = faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort, k + len(self._dead)))
        return _found(*self._index.search(_row(vector), min(k, len(self)), params=chosen))

    def _among(self, vector: Vectors, k: int, allowed: Sequence[int]) -> list[Found]:
        known = set(faiss.vector_to_array(self._index.id_map).tolist()) - self._dead
        keys = sorted(known & set(allowed))
        if not keys:
            return []
        scores = self._index.reconstruct_batch(np.asarray(keys, np.int64)) @ vector
        return _merge([], [Found(key, float(score)) for key, score in zip(keys, scores, strict=True)], k)

    def _rebuild(self) -> None:
        keys, vectors = _contents(self._index)
        alive = np.array([key not in self._dead for key in keys.tolist()], bool)
        self._index, self._dead = self._empty(), set()
        if alive.any():
            self.add(keys[alive].tolist(), vectors[alive])

    def _empty(self) -> Any:
        return faiss.IndexIDMap2(faiss.IndexHNSWFlat(self._dimensions, 32, faiss.METRIC_INNER_PRODUCT))


def new_index(kind: Kind, dimensions: int) -> VectorIndex:
    """An empty index."""
    match kind:
        case "flat":
            return FlatIndex(dimensions)
        case "ivf":
            return IVFIndex(dimensions)
        case _:
            return HNSWIndex(dimensions)


def load_index(kind: Kind, dimensions: int, path: Path) -> VectorIndex | None:
    """The index that `save` wrote; None if there is none of this kind that can be read. Then it is made anew."""
    try:
        loaded = faiss.read_index(str(path))
    except RuntimeError:  # missing, cut off, or not FAISS's
        return None
    if loaded.d != dimensions:
        return None
    inner = faiss.downcast_index(loaded.index) if isinstance(loaded, faiss.IndexIDMap2) else loaded
    match kind, inner:
        case "flat", faiss.IndexFlat():
            return FlatIndex(dimensions, loaded)
        case "ivf", faiss.IndexIVFFlat() | faiss.IndexFlat():
            return IVFIndex(dimensions, loaded)
        case "hnsw", faiss.IndexHNSWFlat():
            return HNSWIndex(dimensions, loaded)
        case _:
            return None


def _batch(keys: Sequence[int]) -> Any:
    return faiss.IDSelectorBatch(np.asarray(keys, np.int64))


def _row(vector: Vectors) -> Vectors:
    return np.ascontiguousarray(vector, np.float32).reshape(1, -1)


def _found(scores: Vectors, keys: NDArray[np.int64]) -> list[Found]:
    """FAISS fills up with -1."""
    pairs = zip(keys[0].tolist(), scores[0].tolist(), strict=True)
    return _merge([], [Found(key, score) for key, score in pairs if key >= 0], len(keys[0]))


def _merge(first: list[Found], second: list[Found], k: int) -> list[Found]:
    return sorted((*first, *second), key=lambda each: (-each.score, each.key))[:k]


def _contents(index: Any) -> tuple[NDArray[np.int64], Vectors]:
    """Keys `[n]` and vectors `[n, dimensions]` of a flat, HNSW or IVF index of FAISS."""
    if not isinstance(index, faiss.IndexIVFFlat):
        return faiss.vector_to_array(index.id_map), index.index.reconstruct_n(0, index.ntotal)
    lists = index.invlists
    keys, vectors = [np.empty(0, np.int64)], [np.empty((0, index.d), np.float32)]
    for number in range(index.nlist):
        size = lists.list_size(number)
        if size:
            keys.append(np.array(faiss.rev_swig_ptr(lists.get_ids(number), size)))
            codes = np.array(faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size))
            vectors.append(codes.view(np.float32).reshape(size, index.d))
    return np.concatenate(keys), np.concatenate(vectors)
