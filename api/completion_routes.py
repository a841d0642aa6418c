"""The two completion routes.

Invariant: a request that cannot be served is refused before anything is generated, and whatever happens to a request or
its client, the engine lives on and the request's slots are freed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from stemcache.api import answers
from stemcache.api.admission import Admission, Admitted
from stemcache.api.answers import documented
from stemcache.api.best_of import best_choices
from stemcache.api.disconnect import until_disconnect
from stemcache.api.encoding import completion_prompts
from stemcache.api.errors import require_model
from stemcache.api.follow_up import read_as_next_turn
from stemcache.api.formats import AnswerOptions, ChatFormat, CompletionFormat, Format
from stemcache.api.generation import Choice, Generation, Prompt
from stemcache.api.retrieval import Retrieval, report
from stemcache.api.schemas import ChatRequest, CompletionRequest, SamplingRequest
from stemcache.api.sse import EventStream
from stemcache.api.tools import ToolUse
from stemcache.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine
    from stemcache.engine.outputs import Usage
    from stemcache.engine.sampling import SamplingParams
    from stemcache.engine.stream import Stream
    from stemcache.ragcache.preparation import Prepared

FormatOf = Callable[["Engine", Generation, AnswerOptions], Format]
FollowUp = Callable[[Generation, Choice], None]


class CompletionRoutes:
    """Each route is a translation: its fields to an engine's call, the engine's deltas to its format."""

    def __init__(self, engine: Engine, admission: Admission, retrieval: Retrieval) -> None:
        self._engine = engine
        self._retrieval = retrieval
        self._admission = admission
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unread(self) -> int:
        """Answered conversations that the engine may still be asked to read for their next turn."""
        return len(self._tasks)

    def add_to(self, app: FastAPI) -> None:
        app.post("/v1/completions", **documented(answers.TextAnswer, streamed=True))(self.complete)
        app.post("/v1/chat/completions", **documented(answers.ChatAnswer, streamed=True))(self.chat)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """OpenAI's text completions."""
        require_model(body.model, self._engine.model_name)
        params = body.sampling_params()
        prompts = await completion_prompts(self._engine, body)
        admitted = self._admission.admit(body, len(prompts))
        return await self._answer(body, admitted, prompts, params, CompletionFormat, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, with vLLM's `documents`."""
        require_model(body.model, self._engine.model_name)
        submitted: Stream | None = None
        try:
            tools = await self._tools_of(body)
            params = tools.constrain(body.sampling_params())
            admitted = self._admission.admit(body, 1)
            submit = partial(admitted.submit_tentatively, params)
            made = await self._retrieval.prompt(body, tools.offered, params.max_tokens, submit)
            prepared, documents, submitted = made.prepared, None, made.prompt.stream
            # What the server retrieves for the next turn stands elsewhere, or is other documents.
            follow_up = None if prepared is not None else self._follow_up_of(body, tools)
            if prepared is not None and body.rag is not None:
                documents = partial(_documents_used, prepared)
            format_of = partial(ChatFormat, tools=tools, documents=documents)
            return await self._answer(body, admitted, [made.prompt], params, format_of, request, follow_up)
        except BaseException as error:
            if submitted is not None:
                submitted.cancel()
            if isinstance(error, InvalidRequestError):
                error.param = body.name_of(error.param)
            raise

    async def prompts_of(self, body: CompletionRequest | ChatRequest) -> list[Prompt]:
        """The prompts of a request of either route, as that route reads them. Raises InvalidRequestError."""
        require_model(body.model, self._engine.model_name)
        if isinstance(body, CompletionRequest):
            return await completion_prompts(self._engine, body)
        offered = (await self._tools_of(body)).offered
        return [(await self._retrieval.prompt(body, offered, body.sampling_params().max_tokens)).prompt]

    async def _answer(
        self,
        body: SamplingRequest,
        admitted: Admitted,
        prompts: list[Prompt],
        params: SamplingParams,
        format_of: FormatOf,
        request: Request,
        follow_up: FollowUp | None = None,
    ) -> Response:
        if params.grammar is not None:  # kept for the submissions, so that the event loop does not wait for it
            await asyncio.to_thread(self._engine.grammars.compile, params.grammar)
        generation = Generation.submit(admitted, prompts, params)
        if follow_up is not None:
            generation.when_complete = lambda choices: follow_up(generation, choices[0])
        shape = format_of(self._engine, generation, body.answer_options(params))
        if body.stream:
            return EventStream(generation, shape.chunks())
        async with generation:
            choices = await until_disconnect(generation.collect(), request.receive)
        if params.n != body.choices_wanted:
            choices = best_choices(choices, n=body.choices_wanted, best_of=params.n)
        return JSONResponse(shape.response(choices))

    async def _tools_of(self, body: ChatRequest) -> ToolUse:
        if not body.tools:
            return ToolUse.of(body, self._engine)
        return await asyncio.to_thread(ToolUse.of, body, self._engine)  # it reads the chat template

    def _follow_up_of(self, body: ChatRequest, tools: ToolUse) -> FollowUp | None:
        """What to do when the answer is complete; nothing where it is not known how the next turn will begin."""
        if body.choices_wanted > 1 or body.continue_final_message or body.truncate_prompt_tokens is not None:
            return None

        def prepare(generation: Generation, answer: Choice) -> None:
            task = asyncio.create_task(read_as_next_turn(self._engine, body, tools, generation, answer))
            self._tasks.add(task)  # the event loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

        return prepare


def _documents_used(prepared: Prepared, usage: Usage) -> dict[str, Any]:
    return report(prepared, usage)
