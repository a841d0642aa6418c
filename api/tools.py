"""OpenAI's `tools`: what a chat request offers, and what it makes of the model's output.

Invariant: what reaches the client as a call names a function that was offered; where the request asks for it (a
required or named call, `strict`, a single call) the model can write nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from stemcache.api.request_model import RequestModel
from stemcache.api.texts import Text, json_object
from stemcache.api.tool_formats import PLAIN, Function, ToolFormat, detect
from stemcache.api.tool_parser import ToolCallParser
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.grammar import Grammar

if TYPE_CHECKING:
    from stemcache.api.schemas import ChatRequest
    from stemcache.engine.engine import Engine
    from stemcache.engine.sampling import SamplingParams

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(RequestModel):
    """A function. Without `parameters` it takes none."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(_NO_ARGUMENTS))
    strict: bool = False


class Tool(RequestModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: `strict` is nothing that a model should read."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": self.type, "function": function}


class FunctionReference(RequestModel):
    name: FunctionName


class NamedOrMode(RequestModel):
    """A tool choice. The modes, which are sent as strings, have no function."""

    type: Literal["none", "auto", "required", "function"]
    function: FunctionReference | None = None

    @model_validator(mode="after")
    def _check_function(self) -> NamedOrMode:
        if (self.function is not None) != (self.type == "function"):
            raise ValueError("a named choice is an object with the type 'function' and the function's name")
        return self


def _as_choice(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) and value != "function" else value


ToolChoice = Annotated[
    NamedOrMode,
    BeforeValidator(_as_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedOrMode),
]


class CalledFunction(RequestModel):
    """The function of a call of an earlier turn. `arguments` is JSON, as the model wrote it."""

    name: Text
    arguments: Text

    # The openai package's `parse` adds this for its caller, and sends it back with the message.
    no_ops = frozenset({"parsed_arguments"})

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        json_object(arguments)
        return arguments


class ToolCall(RequestModel):
    """A call of an earlier turn, given back as it came."""

    id: Text
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it, with the arguments as an object: many write them with `tojson`."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a chat request may do with its tools. Made by `of`.

    offered: the tools, as the chat template takes them; None to offer none. grammar: what the tools make the output
    follow; None for nothing. marker_is_special: calls begin with a special token, which has to show in the text.
    """

    offered: Sequence[dict[str, Any]] | None = None
    form: ToolFormat | None = None
    grammar: Grammar | None = None
    marker_is_special: bool = False

    @classmethod
    def of(cls, body: ChatRequest, engine: Engine) -> ToolUse:
        """Raises InvalidRequestError."""
        mode = body.tool_choice.type if body.tool_choice else "auto"
        if not body.tools:
            if mode not in ("none", "auto"):
                raise InvalidRequestError(
                    "'tool_choice' asks for a call, but there are no 'tools'.", param="tool_choice"
                )
            return cls()
        if mode == "none":
            return cls()
        template = engine.prompts.tool_template
        if template is None:
            raise InvalidRequestError(
                "This model's chat template has no place for tools: leave them out, or set 'tool_choice' to 'none'.",
                param="tools",
            )
        form = detect(template)
        if mode == "auto" and form is PLAIN:
            raise InvalidRequestError(
                "The form in which this model's chat template has tools called is not known, so free calls cannot be "
                "read: set 'tool_choice' to 'required' or to one function, which works with every template.",
                param="tool_choice",
            )
        offered = [tool.for_template() for tool in body.tools]
        return cls(offered, form, _grammar(body, form, mode, engine), engine.prompts.is_special_text(form.marker))

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """The parameters for the engine."""
        if self.form is None:
            return params
        return dataclasses.replace(
            params,
            grammar=self.grammar,
            skip_special_tokens=params.skip_special_tokens and not self.marker_is_special,
        )

    def parser(self) -> ToolCallParser | None:
        """A reader for one choice's text; None when no tools are offered."""
        if self.form is None or self.offered is None:
            return None
        return ToolCallParser(self.form, {tool["function"]["name"] for tool in self.offered})


def _grammar(body: ChatRequest, form: ToolFormat, mode: str, engine: Engine) -> Grammar | None:
    if body.structured_outputs is not None:
        raise InvalidRequestError(
            "'structured_outputs' and 'tools' cannot be combined, unless 'tool_choice' is 'none'.",
            param="structured_outputs",
        )
    required = mode != "auto"
    answer = None if body.response_format is None else body.response_format.schema_of_answer()
    if answer is not None and not required and not form.marker:
        raise InvalidRequestError(
            "This model writes tool calls as bare JSON, so they cannot be told from an answer in JSON: leave out "
            "'response_format', or set 'tool_choice'.",
            param="response_format",
        )
    if not (
        required or answer is not None or not body.parallel_tool_calls or any(t.function.strict for t in body.tools)
    ):
        return None
    functions = [
        Function(tool.function.name, _arguments(tool.function, f"tools[{i}].function.parameters", engine, required))
        for i, tool in enumerate(body.tools)
        if mode != "function" or _is_named(body, tool)
    ]
    if not functions:
        raise InvalidRequestError("'tool_choice' names a function that is not among the 'tools'.", param="tool_choice")
    parallel = body.parallel_tool_calls and mode != "function"
    lark = form.grammar(functions, engine.grammars, required=required, parallel=parallel, answer=answer)
    return Grammar.lark(lark, param="tools")


def _is_named(body: ChatRequest, tool: Tool) -> bool:
    choice = body.tool_choice
    return choice is not None and choice.function is not None and choice.function.name == tool.function.name


def _arguments(function: FunctionDefinition, param: str, engine: Engine, required: bool) -> dict[str, Any]:
    """The schema that a function's arguments have to follow: its own, where a call is required or it is strict."""
    if not (required or function.strict):
        return _ANY_ARGUMENTS
    engine.grammars.compile(Grammar.json_schema(function.parameters, param=param))  # here an error can say which it is
    return function.parameters
