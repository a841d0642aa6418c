"""Authentication: who asks. Everything but health and the live page's files needs a key, what does not exist included.

Invariant: past this point a request has a tenant, unless it is for one of these.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stemcache.api.context import current
from stemcache.api.errors import ApiError, error_response
from stemcache.api.keys import Keyring, Tenant
from stemcache.api.live_page import PATHS

# What load balancers ask, /ping being the same for those of some clouds; and the page that asks for a key.
_OPEN = PATHS | {"/health", "/ping"}


class InvalidKeyError(ApiError):
    """No API key, or one that this server does not know."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, {"WWW-Authenticate": "Bearer"})


class AuthMiddleware:
    """Lets requests in that bring a key of `keyring`; without a keyring everybody, as the tenant `anonymous`."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring | None, anonymous: Tenant) -> None:
        self._app = app
        self._keyring = keyring
        self._anonymous = anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            try:
                current().tenant = self._tenant(Headers(scope=scope).get("authorization"))
            except InvalidKeyError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _tenant(self, authorization: str | None) -> Tenant:
        if self._keyring is None:  # a client that was told to bring any key may bring any
            return self._anonymous
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidKeyError("This server needs an API key: send it as 'Authorization: Bearer KEY'.")
        tenant = self._keyring.find(key.strip())
        if tenant is None:
            raise InvalidKeyError("The API key is not known here: ask whoever runs this server for one.")
        return tenant
