"""The picture of `stemcache bench`: each request as a dot, by how much of its prompt was computed.

Invariant: the same points give the same SVG; no library draws it, as it is forty lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

_WIDTH: Final = 640
_HEIGHT: Final = 360
_LEFT: Final = 64
_BOTTOM: Final = 48
_TOP: Final = 34


def chart(points: Sequence[tuple[int, float]]) -> str:
    """points: (tokens that were computed, seconds to the first token)."""
    most_tokens = _ceiling(max([tokens for tokens, _ in points] + [1]))
    most_ms = _ceiling(max([1000 * seconds for _, seconds in points] + [1]))

    def x(tokens: float) -> float:
        return _LEFT + tokens / most_tokens * (_WIDTH - _LEFT - 24)

    def y(ms: float) -> float:
        return _HEIGHT - _BOTTOM - ms / most_ms * (_HEIGHT - _BOTTOM - _TOP)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-weight="bold">Time to the first token, by what was not cached</text>',
    ]
    for tokens in _marks(most_tokens):
        lines.append(f'<line x1="{x(tokens):.1f}" x2="{x(tokens):.1f}" y1="{_TOP}" y2="{y(0):.1f}" stroke="#eeeeee"/>')
        lines.append(f'<text x="{x(tokens):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{tokens:g}</text>')
    for ms in _marks(most_ms):
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 24}" y1="{y(ms):.1f}" y2="{y(ms):.1f}" stroke="#eeeeee"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y(ms) + 4:.1f}" text-anchor="end">{ms:g} ms</text>')
    lines.append(f'<text x="{_WIDTH - 24}" y="{_HEIGHT - 10}" text-anchor="end">tokens of the prompt computed</text>')
    for tokens, seconds in points:
        place = f'cx="{x(tokens):.1f}" cy="{y(1000 * seconds):.1f}"'
        lines.append(f'<circle {place} r="4" fill="#0072b2" fill-opacity="0.5"/>')
    return "\n".join([*lines, "</svg>", ""])


def _ceiling(value: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _marks(most: float) -> Iterator[float]:
    yield from (most * part / 4 for part in range(5))
