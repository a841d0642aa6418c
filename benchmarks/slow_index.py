"""A search that takes long: a few hundred documents among hundreds of thousands of other vectors.

Invariant: the other vectors are no document's, and are never among the nearest: the same documents are found as
without them, only later. They are those of the documents with their dimensions exchanged at random, so that their lists
in an IVF index look like the documents' own.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.index import IVFIndex

LISTS = 1024
_FIRST_KEY = 1 << 40


def slow_index(cache: ContextCache, n: int) -> Callable[[int], IVFIndex]:
    """Make indexes of the cache's documents among `n` vectors, by the number of lists that a search looks into."""
    library = cache._library
    dimensions = library._embedder.dimensions
    keys, vectors = library.catalogue.vectors("", dimensions)
    rng = np.random.default_rng(0)

    def others() -> np.ndarray:
        return np.ascontiguousarray(vectors[:, rng.permutation(dimensions)])

    quantizer = faiss.IndexFlatIP(dimensions)
    sample = np.concatenate([vectors, *(others() for _ in range(LISTS // len(keys) + 1))])
    quantizer.add(np.ascontiguousarray(sample[rng.permutation(len(sample))[:LISTS]]))
    index = faiss.IndexIVFFlat(quantizer, dimensions, LISTS, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.add_with_ids(np.ascontiguousarray(vectors), np.asarray(keys, np.int64))
    while index.ntotal < n:
        first = _FIRST_KEY + index.ntotal
        index.add_with_ids(others(), np.arange(first, first + len(keys), dtype=np.int64))
    return lambda n_probe: IVFIndex(dimensions, index, n_probe=n_probe)
