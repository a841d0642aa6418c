"""OpenAI's `response_format` and vLLM's `structured_outputs`, and the grammar that they ask for.

Invariant: what is asked for is enforced in full or refused; `strict` changes nothing, as every schema is.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stemcache.api.request_model import RequestModel
from stemcache.api.texts import Text, json_object
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.grammar import Grammar

Schema = dict[str, Any]


class JsonSchema(RequestModel):
    """The schema of a `response_format`."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    json_schema: Schema = Field(alias="schema")
    description: Text | None = None
    strict: bool = False


class ResponseFormat(RequestModel):
    """The form of the answer. JSON may be cut by the token limit or a stop string, and by nothing else."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidRequestError(
                "'json_schema' belongs to the type 'json_schema', and that type needs it.",
                param="response_format.json_schema",
            )
        return self

    def grammar(self) -> Grammar | None:
        """None for text. Raises InvalidRequestError."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Grammar.json_object(param="response_format")
        return Grammar.json_schema(self.json_schema.json_schema, param="response_format")

    def schema_of_answer(self) -> Schema | None:
        """The schema that the answer follows; None for text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.json_schema


class StructuredOutputs(RequestModel):
    """vLLM's constraints, of which one is to be given."""

    json_: Schema | str | None = Field(default=None, alias="json", union_mode="left_to_right")
    json_object: bool = False
    regex: Text | None = None
    choice: list[Text] | None = Field(default=None, min_length=1)
    grammar: Text | None = Field(default=None, description="In GBNF, or in llguidance's variant of Lark's syntax.")

    @field_validator("json_")
    @classmethod
    def _parse_json(cls, schema: Schema | str | None) -> Schema | str | None:
        return json_object(schema) if isinstance(schema, str) else schema

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise InvalidRequestError(
                "'structured_outputs' needs exactly one of 'json', 'json_object', 'regex', 'choice' and 'grammar'.",
                param="structured_outputs",
            )
        return self

    def to_grammar(self) -> Grammar:
        """Raises InvalidRequestError."""
        param = "structured_outputs"
        if isinstance(self.json_, dict):
            return Grammar.json_schema(self.json_, param=param)
        if self.regex is not None:
            return Grammar.regex(self.regex, param=param)
        if self.choice is not None:
            return Grammar.choice(self.choice, param=param)
        if self.grammar is not None:
            return Grammar.lark(self.grammar, param=param)
        return Grammar.json_object(param=param)


def grammar_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> Grammar | None:
    """What a request's text has to follow, if anything. Raises InvalidRequestError."""
    grammar = None if response_format is None else response_format.grammar()
    if structured_outputs is None:
        return grammar
    if grammar is not None:
        raise InvalidRequestError(
            "'response_format' and 'structured_outputs' both say what the answer has to follow; give one of them.",
            param="structured_outputs",
        )
    return structured_outputs.to_grammar()
