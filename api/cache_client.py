"""One question to a running server, for the command line.

Invariant: whatever goes wrong is one sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from stemcache.api.settings import client_api_key
from stemcache.prefixtree.errors import StemcacheError

_TIMEOUT_SECONDS = 120  # a step of a large model on a CPU, which the answer waits for, can take a while


class ServerAnswerError(StemcacheError):
    """No server answers, or it refuses."""


def ask_cache(url: str, method: str, route: str, **request: Any) -> dict[str, Any]:
    """The answer of `/v1/cache/{route}`. `request` as httpx takes it. Raises ServerAnswerError."""
    return ask_server(url, method, f"cache/{route}", **request)


def ask_server(url: str, method: str, route: str, **request: Any) -> dict[str, Any]:
    """The answer of `/v1/{route}`. `request` as httpx takes it. Raises ServerAnswerError."""
    try:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_SECONDS, headers=key_headers()) as client:
            response = client.request(method, f"{base_of(url)}/v1/{route}", **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerAnswerError(
            f"no server answers at {url} ({error}): start one with `stemcache serve`, or name its address with --url"
        ) from error
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServerAnswerError(f"what answers at {url} is no stemcache server (status {response.status_code})")
    if not response.is_success:
        hint = "; put your key into STEMCACHE_API_KEY" if response.status_code == 401 else ""
        raise ServerAnswerError(f"the server refuses: {_message(answer, response.status_code)}{hint}")
    return answer


def base_of(url: str) -> str:
    """The server's address, without the /v1 that clients of OpenAI's are given."""
    return url.rstrip("/").removesuffix("/v1")


def key_headers() -> dict[str, str]:
    """Of a request with the key of the environment, if there is one."""
    key = client_api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _message(answer: Mapping[str, Any], status: int) -> str:
    error = answer.get("error")
    return str(error["message"]) if isinstance(error, dict) and "message" in error else f"status {status}"
