"""Our errors as HTTP replies with OpenAI's error body, `{"error": {"message", "type", "param", "code"}}`.

Invariant: `describe` is the only place that knows which status and code an error has, so a reply and an error inside a
running stream say the same. What is not ours is answered with 500 and no detail: the cause goes to the log, not to the
client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from stemcache.engine.errors import EngineClosedError, InvalidRequestError
from stemcache.prefixtree.errors import StemcacheError, TierError
from stemcache.ragcache.errors import CatalogueError, DocumentNotFoundError, EmbedderError

# nginx's status for a client that went away. Nobody reads it; it tells the access log apart from an answer.
CLIENT_CLOSED_REQUEST = 499


class NotFoundError(InvalidRequestError):
    """What the request names is not there: 404."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not serve."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"The model '{asked}' does not exist; this server has '{served}'.", param="model", code="model_not_found"
        )


class ApiError(StemcacheError):
    """What the HTTP layer itself refuses, with the status and headers to say so. Subclasses fill in the fields."""

    status: ClassVar[int]
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str]

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = headers


class NoDocumentServiceError(ApiError):
    """Documents are asked for, and the server has none of their libraries."""

    status = 501
    code = "documents_unavailable"

    def __init__(self) -> None:
        super().__init__("This server keeps no documents; install what it needs: pip install 'stemcache[rag]'")


def require_model(asked: str | None, served: str) -> None:
    """Raise ModelNotFoundError if a request names another model than the one that is served."""
    if asked is not None and asked != served:
        raise ModelNotFoundError(asked, served)


_ROUTING: Final = {404: "There is no such route.", 405: "This route does not take this method."}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as OpenAI tells it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        # A request can hold what is no valid Unicode, and its errors quote it.
        message, param = (text and text.encode(errors="replace").decode() for text in (self.message, self.param))
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


def describe(error: Exception) -> ErrorReply:
    """The reply for any error that a request can end with."""
    match error:
        case ApiError():
            return ErrorReply(error.status, str(error), type=error.type, code=error.code)
        case InvalidRequestError():
            status = 404 if isinstance(error, NotFoundError | DocumentNotFoundError) else 400
            return ErrorReply(status, str(error), param=error.param, code=error.code)
        case RequestValidationError():
            return _describe_validation(error.errors()[0])
        case HTTPException():
            return ErrorReply(error.status_code, _ROUTING.get(error.status_code, str(error.detail)))
        case EmbedderError():
            return ErrorReply(502, str(error), type="server_error", code="embedder_failed")
        case CatalogueError():
            return ErrorReply(503, str(error), type="server_error", code="catalogue_failed")
        case TierError():
            return ErrorReply(503, str(error), type="server_error", code="tier_failed")
        case EngineClosedError():
            return ErrorReply(503, str(error), type="server_error", code="engine_closed")
        case _:
            message = "The server failed while it worked on this request; its log has the details."
            return ErrorReply(500, message, type="server_error")


def _describe_validation(problem: Mapping[str, Any]) -> ErrorReply:
    """One of pydantic's error details, as a 400: OpenAI does not answer 422 for these."""
    param = _param_name(problem["loc"][1:])
    match problem["type"]:
        case "json_invalid":
            reason = problem.get("ctx", {}).get("error", "invalid JSON")
            return ErrorReply(400, f"The request body is not valid JSON: {reason}.")
        case "extra_forbidden":
            message = f"'{param}' is not supported here, or not with this value."
            return ErrorReply(400, message, param=param, code="unsupported_parameter")
        case "missing" if param is not None:
            return ErrorReply(400, f"'{param}' is required.", param=param, code="missing_required_parameter")
        case _ if param is None:
            return ErrorReply(400, "The request body must be a JSON object, sent as application/json.")
        case _:
            reason = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
            return ErrorReply(400, f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")


def _param_name(location: Sequence[str | int]) -> str | None:
    """("messages", 0, "content") as messages[0].content; None for the body itself."""
    # "[key]" is pydantic's mark for a fault of a dictionary's key; our unions name their variants in the same way.
    named = [part for part in location if not str(part).startswith("[")]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in named]
    return "".join(parts).removeprefix(".") or None


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's form."""
    ours = (ApiError, InvalidRequestError, EngineClosedError, EmbedderError, CatalogueError, TierError)
    for kind in (*ours, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _reply)
    app.add_exception_handler(HTTPStatus.METHOD_NOT_ALLOWED, _other_methods)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)


async def _reply(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _other_methods(request: Request, error: Exception) -> Response:
    """Starlette names the methods of the path's first route only, and ours have one each."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods}
    response = error_response(error)
    response.headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return response


def error_response(error: Exception) -> Response:
    """The answer that says what `describe` does."""
    reply = describe(error)
    return JSONResponse(reply.body, reply.status, headers=getattr(error, "headers", None))


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
