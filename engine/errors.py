"""The engine's branch of the error tree (its root stands in stemcache.prefixtree.errors).

EngineError
├── InvalidRequestError        the caller's prompt or parameters are wrong; names the parameter
│   ├── ContextLengthError     prompt longer than the model or the pool can hold
│   └── GrammarError           the request's grammar led where no token can follow, or to a limit, while it ran
├── ModelLoadError             the checkpoint folder is missing, broken or of a kind that cannot be served exactly
├── BlendRefusedError          documents cannot be moved in this model, or its answers suffer from it
└── EngineClosedError          the engine was closed, or its thread died
"""

from __future__ import annotations

from stemcache.prefixtree.errors import StemcacheError


class EngineError(StemcacheError):
    """Base of the engine's errors."""


class InvalidRequestError(EngineError):
    """A request that can never be served. `param` is the parameter's name, `code` OpenAI's error code or None."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt, with at least one token to generate, does not fit the model's context or the pool."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class GrammarError(InvalidRequestError):
    """A request whose grammar could not be followed to its end."""


class ModelLoadError(EngineError):
    """The model cannot be loaded, or cannot be served exactly; the message says why and what to do."""


class BlendRefusedError(EngineError):
    """Position-independent reuse cannot be switched on for this model; the message says why, with figures."""


class EngineClosedError(EngineError):
    """The engine no longer runs; the message carries the cause if it died."""
