"""`/tokenize` and `/detokenize`, in vLLM's shapes.

Invariant: `/tokenize` gives exactly the tokens that a completion of the same prompt or messages would read, and
`/detokenize` gives back every character of them, special tokens included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import Field, model_validator

from stemcache.api import answers
from stemcache.api.answers import documented
from stemcache.api.encoding import encode_messages, encode_text
from stemcache.api.errors import require_model
from stemcache.api.messages import Message, TemplateFields
from stemcache.api.request_model import RequestModel, with_examples
from stemcache.api.texts import Text
from stemcache.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine


class TokenizeRequest(TemplateFields):
    """POST /tokenize. Either a prompt or messages; the template's fields go with messages."""

    model_config = with_examples(
        {"prompt": "The code of Velmora is", "return_token_strs": True},
        {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False},
    )

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
        of_template = self.model_fields_set & (TemplateFields.model_fields.keys() - {"add_special_tokens"})
        if self.prompt is not None and of_template:
            name = min(of_template)
            raise InvalidRequestError(f"'{name}' goes with 'messages', not with 'prompt'.", param=name)
        return self


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    model_config = with_examples({"tokens": [5, 6, 7]})

    model: str | None = None
    tokens: list[int]


class TokenRoutes:
    """The two routes over one engine's tokenizer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_to(self, app: FastAPI) -> None:
        for root in ("", "/v1"):  # vLLM's place, and the one that OpenAI's client finds
            app.post(f"{root}/tokenize", **documented(answers.Tokens))(self.tokenize)
            app.post(f"{root}/detokenize", **documented(answers.Detokenized))(self.detokenize)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt or of a conversation."""
        require_model(body.model, self._engine.model_name)
        if body.messages is not None:
            tools = [tool.for_template() for tool in body.tools]
            tokens = await encode_messages(self._engine, body.messages, body, tools=tools)
        else:
            assert body.prompt is not None
            special = body.add_special_tokens is not False
            tokens = await encode_text(self._engine, body.prompt, add_special_tokens=special)
        return {
            "count": len(tokens),
            "max_model_len": self._engine.max_model_len,
            "tokens": tokens,
            "token_strs": [self._engine.prompts.token_text(token) for token in tokens]
            if body.return_token_strs
            else None,
        }

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        require_model(body.model, self._engine.model_name)
        if self._engine.prompts.backend is None:
            raise InvalidRequestError("this model has no tokenizer, so its tokens are no text", param="tokens")
        return {"prompt": self._engine.decode(body.tokens, skip_special_tokens=False)}
