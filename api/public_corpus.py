"""The public corpus of a server: prompts that its operator has read once, for all tenants.

Invariant: what the file holds is all that is ever computed in the public namespace; no request of a tenant gets there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track

from stemcache.api.cache_schemas import Prompt
from stemcache.api.encoding import chat_prompt, completion_prompts
from stemcache.api.schemas import ChatRequest, CompletionRequest
from stemcache.api.tools import ToolUse
from stemcache.engine.errors import InvalidRequestError
from stemcache.prefixtree.errors import StemcacheError

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine


class PublicCorpusError(StemcacheError):
    """The file of the public corpus cannot be used; the message names the line."""


def warm_public_corpus(engine: Engine, path: Path) -> int:
    """Compute what a file holds for all tenants, and pin it; returns how many tokens are public now.

    Each line is the body of a completion or chat request. Raises PublicCorpusError, OSError, EngineClosedError.
    """
    from stemcache.engine.engine import PUBLIC

    prompts = list(_prompts(engine, path))
    if not prompts:
        raise PublicCorpusError(f"{path} holds no request; write the body of one into each line")
    for number, prompt in track(prompts, "reading the public corpus", console=Console(stderr=True), transient=True):
        with _of_line(path, number):
            engine.share(prompt)
    return engine.cache.stats(tenant=PUBLIC).own.cached_chunks * engine.chunk_tokens


def _prompts(engine: Engine, path: Path) -> Iterator[tuple[int, list[int]]]:
    """Each prompt with the number of its line."""
    kind: TypeAdapter[CompletionRequest | ChatRequest] = TypeAdapter(Prompt)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            with _of_line(path, number):
                for prompt in asyncio.run(_tokens(engine, kind.validate_json(line))):
                    yield number, prompt


@contextmanager
def _of_line(path: Path, number: int) -> Iterator[None]:
    """Errors of a line say which one it is."""
    try:
        yield
    except (ValidationError, InvalidRequestError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        where = ".".join(str(part) for part in reason.get("loc", ()) if not str(part).startswith("["))
        raise PublicCorpusError(f"{path}, line {number}: {where and where + ': '}{reason['msg']}") from None


async def _tokens(engine: Engine, body: CompletionRequest | ChatRequest) -> list[list[int]]:
    if isinstance(body, CompletionRequest):
        return [prompt.token_ids for prompt in await completion_prompts(engine, body)]
    if body.rag is not None:
        raise InvalidRequestError("what is retrieved for one tenant is no other's: give 'documents'", param="rag")
    return [(await chat_prompt(engine, body, ToolUse.of(body, engine).offered)).token_ids]
