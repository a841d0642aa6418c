"""Sizes in bytes as people write them on a command line."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for name, base in ((f"{letter}IB", 1024), (f"{letter}B", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "500MB" or "1048576". Raises ValueError; "2G" is refused, as half the world means 1000 by it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"not a size: {text!r}; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
