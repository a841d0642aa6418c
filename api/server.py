"""The HTTP application: OpenAI's completion routes over one engine.

Invariant: a request that cannot be served is refused before anything is generated, and whatever happens to a request or
its client, the engine lives on and the request's slots are freed.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from stemcache._version import __version__
from stemcache.api.access import AccessMiddleware
from stemcache.api.admission import Admission
from stemcache.api.auth import AuthMiddleware
from stemcache.api.cache_routes import CacheEndpoint
from stemcache.api.disconnect import until_disconnect
from stemcache.api.drain import Drain, DrainMiddleware
from stemcache.api.errors import ModelNotFoundError, add_error_handlers
from stemcache.api.formats import ChatFormat, CompletionFormat, Format
from stemcache.api.generation import Generation
from stemcache.api.keys import Keyring, Tenant
from stemcache.api.limits import BodyLimitMiddleware, Limits
from stemcache.api.metrics import Metrics
from stemcache.api.schemas import ChatRequest, CompletionRequest, SamplingRequest
from stemcache.api.sse import EventStream
from stemcache.api.tools import ToolUse
from stemcache.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from stemcache.api.tracing import Spans
    from stemcache.engine.engine import Engine
    from stemcache.engine.sampling import SamplingParams

# Tokenising some kilobytes takes less time than the way to another thread and back.
_LONG_TEXT = 8192


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
) -> FastAPI:
    """The application that serves `engine`. Whoever made the engine closes it.

    keyring: whose API keys are let in; None for everybody, as one tenant.
    secret: what that one tenant's id is derived with; random by default. A keyring has its own.
    drain: to be begun when the server is to end. spans: where to tell traces.
    show_cache_text: whether GET /v1/cache/tree may show what is cached, to the tenant whose it is.
    """
    metrics, limits = Metrics(engine), limits or Limits()
    endpoint = Endpoint(engine, Admission(engine, metrics, limits, log_prompts=log_prompts))
    app = FastAPI(title="stemcache", version=__version__)
    # From the inside out: a body is read only for who may send one.
    app.add_middleware(BodyLimitMiddleware, limits=limits)
    app.add_middleware(DrainMiddleware, drain=drain or Drain())
    app.add_middleware(AuthMiddleware, keyring=keyring, anonymous=Tenant.of("", secret or secrets.token_bytes(32)))
    app.add_middleware(AccessMiddleware, metrics=metrics, spans=spans)
    add_error_handlers(app)
    app.post("/v1/completions")(endpoint.complete)
    app.post("/v1/chat/completions")(endpoint.chat)
    app.get("/v1/models")(endpoint.models)
    app.get("/v1/models/{name:path}")(endpoint.model)
    app.get("/health")(endpoint.health)
    app.add_route("/metrics", metrics.serve)
    CacheEndpoint(engine, endpoint.tokens_of, show_text=show_cache_text).add_to(app)
    return app


class Endpoint:
    """The routes. Each one is a translation: its fields to an engine's call, the engine's deltas to its format."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """OpenAI's text completions."""
        self._require_model(body.model)
        params = body.sampling_params()
        prompts = [await self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        shape = CompletionFormat(self._engine, logprobs=params.logprobs is not None)
        return await self._answer(body, prompts, params, shape, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, with vLLM's `documents`."""
        self._require_model(body.model)
        tools = await self._tools_of(body)
        params = tools.constrain(body.sampling_params())
        prompt = await self._encode_chat(body, tools)
        shape = ChatFormat(self._engine, logprobs=body.logprobs, tools=tools)
        try:
            return await self._answer(body, [prompt], params, shape, request)
        except InvalidRequestError as error:
            if error.param == "prompt":  # the engine knows nothing of messages
                error.param = "messages"
            raise

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._require_model(name)
        return self._model_card()

    async def health(self) -> dict[str, Any]:
        """Whether the engine can answer; 503 when it cannot. Does not wait for its running step."""
        self._engine.require_alive()
        now = self._engine.activity()
        return {"status": "ok", "running": now.running, "waiting": now.waiting}

    async def tokens_of(self, body: CompletionRequest | ChatRequest) -> list[int]:
        """The one prompt of a request of either route, as that route reads it."""
        self._require_model(body.model)
        if body.cache_salt is not None:
            raise InvalidRequestError(
                "'cache_salt' is not supported by this route: it looks after the cache without a salt.",
                param="cache_salt",
                code="unsupported_parameter",
            )
        if isinstance(body, ChatRequest):
            return await self._encode_chat(body, await self._tools_of(body))
        if len(body.prompt) > 1:
            raise InvalidRequestError("this route takes one prompt, not a list of them", param="prompt")
        prompt = body.prompt[0]
        return await self._encode(prompt) if isinstance(prompt, str) else prompt

    async def _answer(
        self,
        body: SamplingRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        shape: Format,
        request: Request,
    ) -> Response:
        if params.grammar is not None:  # kept for the submissions, so that the event loop does not wait for it
            await asyncio.to_thread(self._engine.compile_grammar, params.grammar)
        generation = Generation.submit(self._admission.admit(body, len(prompts)), prompts, params)
        if body.stream:
            return EventStream(generation, shape.chunks(generation, include_usage=body.include_usage))
        async with generation:
            choices = await until_disconnect(generation.collect(), request.receive)
        return JSONResponse(shape.response(choices, generation.usage))

    async def _tools_of(self, body: ChatRequest) -> ToolUse:
        if not body.tools:
            return ToolUse.of(body, self._engine)
        return await asyncio.to_thread(ToolUse.of, body, self._engine)  # it reads the chat template

    async def _encode(self, text: str) -> list[int]:
        if len(text) < _LONG_TEXT:
            return self._engine.encode(text)
        return await asyncio.to_thread(self._engine.encode, text)

    async def _encode_chat(self, body: ChatRequest, tools: ToolUse) -> list[int]:
        messages = [message.for_template() for message in body.messages]
        documents = None if body.documents is None else [document.model_dump() for document in body.documents]
        length = sum(len(text) for part in (*messages, *(documents or ())) for text in part.values())
        if length < _LONG_TEXT and not tools.offered:
            return self._engine.encode_chat(messages, documents=documents)
        return await asyncio.to_thread(self._engine.encode_chat, messages, documents=documents, tools=tools.offered)

    def _require_model(self, name: str | None) -> None:
        if name is not None and name != self._engine.model_name:
            raise ModelNotFoundError(name, self._engine.model_name)

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
