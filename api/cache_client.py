"""One question to a running server, for the command line.

Invariant: whatever goes wrong is one sentence that says what to do.
"""

from __future__ import annotations

from typing import Any

import httpx

from stemcache.api.settings import client_api_key
from stemcache.ragcache.server_answer import answer_of, base_of, nobody

_TIMEOUT_SECONDS = 120  # a step of a large model on a CPU, which the answer waits for, can take a while


def ask_cache(url: str, method: str, route: str, **request: Any) -> dict[str, Any]:
    """The answer of `/v1/cache/{route}`. `request` as httpx takes it. Raises ServerAnswerError."""
    return ask_server(url, method, f"cache/{route}", **request)


def ask_server(url: str, method: str, route: str, **request: Any) -> dict[str, Any]:
    """The answer of `/v1/{route}`. `request` as httpx takes it. Raises ServerAnswerError."""
    try:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_SECONDS, headers=key_headers()) as client:
            response = client.request(method, f"{base_of(url)}/v1/{route}", **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise nobody(url, error) from error
    return answer_of(response)


def key_headers() -> dict[str, str]:
    """Of a request with the key of the environment, if there is one."""
    key = client_api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}
