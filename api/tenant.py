"""The tenant of a request: the bytes that keep its cache apart from everybody else's."""

from __future__ import annotations

from starlette.requests import Request


def tenant_of(request: Request) -> bytes:
    """What `Engine.submit` takes as `tenant`; without authentication everybody is the same tenant."""
    tenant: bytes = getattr(request.state, "tenant", b"")
    return tenant
