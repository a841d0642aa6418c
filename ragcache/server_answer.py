"""What a server answers over HTTP, for the command line and the plugins.

Invariant: an answer that is not the server's yes is a ServerAnswerError that says what to do.
"""

from __future__ import annotations

from typing import Any

import httpx

from stemcache.ragcache.errors import ServerAnswerError


def base_of(url: str) -> str:
    """The server's address, without the /v1 that clients of OpenAI's are given."""
    return url.rstrip("/").removesuffix("/v1")


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """Raises ServerAnswerError."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServerAnswerError(
            f"what answers at {response.url} is no stemcache server (status {response.status_code})"
        )
    if response.is_success:
        return answer
    error = answer.get("error")
    known = error if isinstance(error, dict) else {}
    hint = "; put your key into STEMCACHE_API_KEY" if response.status_code == 401 else ""
    reason = known.get("message", f"status {response.status_code}")
    raise ServerAnswerError(f"the server refuses: {reason}{hint}", code=known.get("code"))


def nobody(url: str, error: Exception) -> ServerAnswerError:
    """The error where nothing answers."""
    return ServerAnswerError(
        f"no server answers at {url} ({error}): start one with `stemcache serve`, or name its address"
    )
