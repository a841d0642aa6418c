"""The cost surface: how long a step takes, learned from the steps themselves.

Invariant: all coefficients are finite and not negative, so computing more never looks cheaper.

    seconds = base + per_token * new tokens + per_pair * (new token, visible token) pairs

RAGCache (arXiv 2404.12457) profiles T(cached, new) offline on a grid and interpolates; but a step's time follows from
what it computes, so three numbers do, and they stay right when the machine gets busy or the model is another. They are
fitted by least squares of the relative error, in which a step that was disturbed counts less than one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Final

_N: Final = 3
# A step of a kind that comes often must not drown the others: decoding steps outnumber prefills a hundred to one. Kinds
# are powers of two of tokens and pairs; each remembers about so many of its last steps.
_MEMORY: Final = 32
_SOLVE_EVERY: Final = 16  # steps; solving takes as long as a decoding step of a very small model
# In these units all three features of an ordinary step are around 1, which keeps the equations well conditioned.
_UNITS: Final = (1.0, 256.0, 256.0 * 1024.0)
_RIDGE: Final = 1e-9
# What a token costs after so many cached ones is averaged over a piece of this length, a document's more or less.
_PIECE: Final = 512

Vector = list[float]
Matrix = list[list[float]]


class CostSurface:
    """T(cached, new), in seconds. Costs nothing per step but a few multiplications; solved anew when asked."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], tuple[Matrix, Vector]] = {}
        self._solution: Vector | None = [0.0] * _N
        self.observed = 0
        self.largest_step = 0  # in new tokens

    def observe(self, work: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a step that computed `new` tokens after `cached` ones, for each (cached, new) of `work`.

        A time that is not positive says nothing and is ignored.
        """
        if not 0.0 < seconds < float("inf"):
            return
        n_tokens, n_pairs = _count(work)
        row = [feature / unit / seconds for feature, unit in zip((1.0, n_tokens, n_pairs), _UNITS, strict=True)]
        kind = (n_tokens.bit_length(), int(n_pairs).bit_length())
        matrix, vector = self._kinds.setdefault(kind, ([[0.0] * _N for _ in range(_N)], [0.0] * _N))
        for i in range(_N):
            vector[i] += row[i] - vector[i] / _MEMORY
            for j in range(_N):
                matrix[i][j] += row[i] * row[j] - matrix[i][j] / _MEMORY
        self.observed += 1
        self.largest_step = max(self.largest_step, n_tokens)
        if self.observed <= _SOLVE_EVERY or self.observed % _SOLVE_EVERY == 0:
            self._solution = None

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """base, per_token and per_pair, in seconds; all 0 before the first step."""
        if self._solution is None:
            kinds = list(self._kinds.values())
            matrix = [[sum(m[i][j] for m, _ in kinds) for j in range(_N)] for i in range(_N)]
            self._solution = _least_squares(matrix, [sum(v[i] for _, v in kinds) for i in range(_N)])
        base, per_token, per_pair = (value / unit for value, unit in zip(self._solution, _UNITS, strict=True))
        return base, per_token, per_pair

    def seconds(self, cached: int, new: int) -> float:
        """Return T(cached, new): what computing `new` tokens after `cached` ones takes in a step of its own."""
        base, per_token, per_pair = self.coefficients
        n_tokens, n_pairs = _count([(cached, new)])
        return base + per_token * n_tokens + per_pair * n_pairs

    def relative(self, cached: int) -> float:
        """Return what a token costs after `cached` others, relative to one at the beginning; 1 before the first step.

        Relative, because priorities that were given earlier must stay comparable while the surface is learned.
        """
        first = self.seconds(0, _PIECE)
        return self.seconds(cached, _PIECE) / first if first > 0.0 else 1.0


def _count(work: Iterable[tuple[int, int]]) -> tuple[int, float]:
    """Return how many tokens are new, and how many (token, visible token) pairs their attention has."""
    n_tokens, n_pairs = 0, 0.0
    for cached, new in work:
        n_tokens += new
        n_pairs += new * (cached + (new + 1) / 2)
    return n_tokens, n_pairs


def _least_squares(matrix: Matrix, vector: Vector) -> Vector:
    """Minimise x'Ax - 2b'x over x >= 0, by trying which coefficients are above 0: there are 7 ways."""
    best, best_value = [0.0] * _N, 0.0
    for size in range(1, _N + 1):
        for chosen in combinations(range(_N), size):
            x = _solve([[matrix[i][j] for j in chosen] for i in chosen], [vector[i] for i in chosen])
            if min(x) < 0.0:
                continue
            value = -sum(vector[i] * each for i, each in zip(chosen, x, strict=True))  # x'Ax = b'x where Ax = b
            if value < best_value:
                best, best_value = [0.0] * _N, value
                for i, each in zip(chosen, x, strict=True):
                    best[i] = each
    return best


def _solve(matrix: Matrix, vector: Vector) -> Vector:
    """Solve a symmetric positive semidefinite system; a hair of ridge makes it definite. Gauss without pivoting."""
    n = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(n):
        rows[i][i] += _RIDGE * rows[i][i] + 1e-300
    for i in range(n):
        for below in range(i + 1, n):
            factor = rows[below][i] / rows[i][i]
            for j in range(i, n + 1):
                rows[below][j] -= factor * rows[i][j]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x
