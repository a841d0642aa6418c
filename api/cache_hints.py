"""OpenAI's and Anthropic's ways to say what of a prompt is to be cached.

Invariant: these are hints and change no answer. stemcache caches every prompt to the token and finds it again by its
tokens, so a breakpoint has nothing to add; what would promise more than that is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from stemcache.engine.errors import InvalidRequestError

Ttl = Literal["30m", "12h"]


class Hint(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PromptCacheBreakpoint(Hint):
    """OpenAI's mark on a content part: the prompt up to its end is worth caching. It is, with or without the mark."""

    mode: Literal["explicit"]
    ttl: Ttl | None = None


class CacheControl(Hint):
    """Anthropic's mark on a content part; means what the breakpoint means."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class PromptCacheOptions(Hint):
    """OpenAI's options of a whole request."""

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: Ttl | None = None


def _not_explicit(options: PromptCacheOptions | None) -> PromptCacheOptions | None:
    if options is not None and options.mode == "explicit":
        raise InvalidRequestError(
            "prompt_cache_options.mode 'explicit' is not supported, as it would keep the prompt after the last "
            "breakpoint out of the cache, and stemcache caches whole prompts; leave it out or say 'implicit'.",
            param="prompt_cache_options.mode",
            code="unsupported_parameter",
        )
    return options


ImplicitCacheOptions = Annotated[PromptCacheOptions | None, AfterValidator(_not_explicit)]
