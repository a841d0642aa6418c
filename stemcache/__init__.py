"""stemcache: shared context is read once, answers never change.

The public names are loaded on first use, so that `stemcache.prefixtree` can be used without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stemcache._version import __version__

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine
    from stemcache.engine.grammar import Grammar
    from stemcache.engine.sampling import SamplingParams

__all__ = ["Engine", "Grammar", "SamplingParams", "__version__"]

_HOMES = {
    "Engine": "stemcache.engine.engine",
    "Grammar": "stemcache.engine.grammar",
    "SamplingParams": "stemcache.engine.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stemcache' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
