"""The tenant of the running request: the bytes that keep its cache apart from everybody else's."""

from __future__ import annotations

from stemcache.api.context import current


def tenant_id() -> bytes:
    """What `Engine.submit` takes as `tenant`. To be called while a request is served."""
    tenant = current().tenant
    assert tenant is not None, "authentication comes before every route"
    return tenant.id
