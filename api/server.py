"""The HTTP application: OpenAI's routes, and those of the cache, over one engine.

Invariant: every request passes the layers from the outside in: it gets an id, a tenant, a place while the server is not
draining, and a body that is not too long; only then a route sees it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from stemcache._version import __version__
from stemcache.api import answers
from stemcache.api.access import AccessMiddleware
from stemcache.api.admission import Admission
from stemcache.api.answers import documented
from stemcache.api.auth import AuthMiddleware
from stemcache.api.cache_routes import CacheRoutes
from stemcache.api.completion_routes import CompletionRoutes
from stemcache.api.document_metrics import DocumentCollector
from stemcache.api.document_routes import DocumentRoutes
from stemcache.api.drain import Drain, DrainMiddleware
from stemcache.api.errors import add_error_handlers, require_model
from stemcache.api.head import HeadAsGet
from stemcache.api.keys import Keyring, Tenant
from stemcache.api.limits import BodyLimitMiddleware, Limits
from stemcache.api.live_page import add_live_page
from stemcache.api.metrics import Metrics
from stemcache.api.retrieval import Retrieval
from stemcache.api.token_routes import TokenRoutes

if TYPE_CHECKING:
    from stemcache.api.tracing import Spans
    from stemcache.engine.engine import Engine
    from stemcache.ragcache.context_cache import ContextCache


def create_app(
    engine: Engine,
    *,
    keyring: Keyring | None = None,
    secret: bytes | None = None,
    limits: Limits | None = None,
    drain: Drain | None = None,
    spans: Spans | None = None,
    log_prompts: bool = False,
    show_cache_text: bool = False,
    documents: ContextCache | None = None,
) -> FastAPI:
    """The application that serves `engine`. Whoever made the engine closes it.

    keyring: whose API keys are let in; None for everybody, as one tenant.
    secret: what that one tenant's id is derived with; random by default. A keyring has its own.
    drain: to be begun when the server is to end. spans: where to tell traces.
    documents: what chats can retrieve from; whoever made it closes it. None: document routes answer 501.
    show_cache_text: whether GET /v1/cache/tree may show what is cached, to the tenant whose it is.
    """
    metrics, limits = Metrics(engine), limits or Limits()
    app = FastAPI(title="stemcache", version=__version__)
    # From the inside out: a body is read only for who may send one.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimitMiddleware, limits=limits)
    app.add_middleware(DrainMiddleware, drain=drain or Drain())
    app.add_middleware(AuthMiddleware, keyring=keyring, anonymous=Tenant.of("", secret or secrets.token_bytes(32)))
    app.add_middleware(AccessMiddleware, metrics=metrics, spans=spans)
    add_error_handlers(app)
    if documents is not None:
        metrics.registry.register(DocumentCollector(documents))
    admission = Admission(engine, metrics, limits, log_prompts=log_prompts)
    completions = CompletionRoutes(engine, admission, Retrieval(engine, documents))
    completions.add_to(app)
    TokenRoutes(engine).add_to(app)
    CacheRoutes(engine, admission, completions.prompts_of, documents, show_text=show_cache_text).add_to(app)
    DocumentRoutes(documents, max_documents=limits.documents).add_to(app)
    ServerRoutes(engine, completions).add_to(app)
    app.add_route("/metrics", metrics.serve)
    add_live_page(app)
    return app


class ServerRoutes:
    """What the server is, and whether it lives."""

    def __init__(self, engine: Engine, completions: CompletionRoutes) -> None:
        self._engine = engine
        self._completions = completions

    def add_to(self, app: FastAPI) -> None:
        app.get("/v1/models", **documented(answers.ModelList))(self.models)
        app.get("/v1/models/{name:path}", **documented(answers.ModelCard))(self.model)
        app.get("/health", **documented(answers.Health))(self.health)
        app.get("/ping", **documented(answers.Health))(self.health)
        app.get("/version", **documented(answers.Version))(self.version)

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The served model by its id."""
        require_model(name, self._engine.model_name)
        return self._model_card()

    async def health(self) -> dict[str, Any]:
        """Whether the engine can answer; 503 when it cannot. Does not wait for its running step.

        With nothing running or waiting, nothing is left to do for any request that was answered.
        """
        self._engine.require_alive()
        unread = self._completions.unread  # before the engine's, to which they go
        now = self._engine.activity()
        return {"status": "ok", "running": now.running, "waiting": unread + now.waiting}

    async def version(self) -> dict[str, str]:
        """Of stemcache."""
        return {"version": __version__}

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._engine.model_name,
            "object": "model",
            "created": self._engine.created,
            "owned_by": "stemcache",
            "root": self._engine.model_name,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }
