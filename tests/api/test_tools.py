"""`tools` through the openai client, on a server whose chat template takes them, and on engines with other templates.

The demo model has never seen a tool: only grammars make its calls right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from forked import ForkedServer
from transformers import AutoTokenizer

from stemcache import Engine
from stemcache.api.schemas import ChatRequest
from stemcache.api.server_process import ServerProcess
from stemcache.api.tool_calls import ToolCallWriter
from stemcache.api.tools import ToolUse
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.errors import InvalidRequestError

TEMPLATE = """
{{- '<|begin|>' }}
{%- if tools %}{{ '<|system|>Call as SIGN: ' + tools | tojson + '<|end|>' }}{% endif %}
{%- for message in messages %}
{{- '<|' + ('user' if message.role == 'tool' else message.role) + '|>' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- 'OPENING' + call.function | tojson + 'CLOSING' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
ADD = {
    "type": "object",
    "properties": {
        "$a": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["$a", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["km", "Grad °C"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD, "strict": True}},
    {"type": "function", "function": {"name": "get-time"}},
]
SCHEMAS = {"add": ADD, "get-time": {"type": "object"}}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "The code?"}]


# The model was never taught JSON: without this it may indent, and invent keys, until its tokens are used up.
NEW_LINE, CLOSE = map(str, AutoTokenizer.from_pretrained(MODEL_PATH).convert_tokens_to_ids(["\u010a", "}"]))
TIDY = {NEW_LINE: -100, CLOSE: 50}


def checkpoint(folder: Path, sign: str) -> Path:
    """The demo model with a template that teaches calls as `sign` is."""
    shutil.copytree(MODEL_PATH, folder)
    around = ("<tool_call>\\n", "\\n</tool_call>") if sign == "<tool_call>" else ("", "")
    template = TEMPLATE.replace("SIGN", sign).replace("OPENING", around[0]).replace("CLOSING", around[1])
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = checkpoint(tmp_path_factory.mktemp("tools") / "caller", "<tool_call>")
    with ForkedServer("--model", str(model), "--dtype", "float32", "--pool-bytes", "128MiB") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture
def caller(tool_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "caller", "messages": MESSAGES, "max_tokens": 300, "temperature": 0, "tools": TOOLS, **fields}
    given["logit_bias"] = TIDY | fields.get("logit_bias", {})
    return client.chat.completions.create(**given)


def check_calls(message: Any, at_least: int = 1) -> list[str]:
    """The names of the calls, whose arguments must conform."""
    assert len(message.tool_calls) >= at_least
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in message.tool_calls]


def put_together(chunks: list[Any]) -> tuple[str | None, list[dict[str, str]], str | None]:
    """Content, calls and finish reason of a stream of one choice."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            if delta.id:
                assert (delta.index, delta.type, delta.function.arguments) == (len(calls), "function", "")
                calls.append({"name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments
    return content or None, calls, reason


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_come_conforms_whole_and_streamed(caller: openai.OpenAI, choice: Any) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False}
    whole = chat(caller, **fields).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    names = check_calls(whole.message)
    assert len(names) == 1
    assert choice == "required" or names == ["add"]
    content, calls, reason = put_together(list(chat(caller, stream=True, **fields)))
    assert (content, reason) == (None, "tool_calls")
    assert calls == [{"name": c.function.name, "arguments": c.function.arguments} for c in whole.message.tool_calls]
    if names == ["add"]:
        deltas = [d for c in chat(caller, stream=True, **fields) for d in c.choices[0].delta.tool_calls or ()]
        assert len(deltas) > 2, "the arguments came in one piece"


def test_every_choice_calls_for_itself(caller: openai.OpenAI) -> None:
    choices = chat(caller, tool_choice=NAMED, n=4, temperature=1, seed=1).choices
    assert len({choice.message.tool_calls[0].function.arguments for choice in choices}) > 1
    for choice in choices:
        assert check_calls(choice.message) == ["add"]


def test_several_calls_in_one_answer(caller: openai.OpenAI, demo_tokenizer: Any) -> None:
    never_end = {str(demo_tokenizer.eos_token_id): -100, NEW_LINE: 0}
    fields = {"tool_choice": "required", "tools": TOOLS[:1], "logit_bias": never_end, "max_tokens": 400}
    answer = chat(caller, **fields).choices[0]
    assert answer.finish_reason == "length", "nothing ends the calls but the limit"
    assert len(answer.message.tool_calls) > 1


def test_free_text_stays_text(caller: openai.OpenAI) -> None:
    free = [TOOLS[1]]
    without = chat(caller, tools=free, tool_choice="auto", max_tokens=12).choices[0]
    assert without.message.content
    assert without.message.tool_calls is None
    strict = chat(caller, max_tokens=12).choices[0]
    assert strict.message.tool_calls is None
    content, calls, reason = put_together(list(chat(caller, max_tokens=12, stream=True)))
    assert (content, calls, reason) == (strict.message.content, [], strict.finish_reason)


def test_an_answer_in_json_or_a_call(caller: openai.OpenAI, demo_tokenizer: Any) -> None:
    """In either case what comes conforms; a bias on the first character decides which."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [[1], [2]]}}}
    for first, called in (("[", False), ("<", True)):
        [token] = demo_tokenizer.encode(first, add_special_tokens=False)
        bias = {str(token): 100}
        choice = chat(caller, response_format=form, parallel_tool_calls=False, logit_bias=bias).choices[0]
        if called:
            check_calls(choice.message)
        else:
            assert json.loads(choice.message.content) in ([1], [2])


def test_none_offers_nothing(caller: openai.OpenAI) -> None:
    plain = chat(caller, tools=openai.omit, max_tokens=8)
    none = chat(caller, tool_choice="none", max_tokens=8)
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < chat(caller, max_tokens=1).usage.prompt_tokens
    assert none.choices[0].message.content == plain.choices[0].message.content


def test_a_conversation_with_calls_goes_on_from_the_cache(caller: openai.OpenAI) -> None:
    first = chat(caller, tool_choice=NAMED)
    call = first.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    second = chat(caller, messages=[*MESSAGES, first.choices[0].message, result], max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 64 * 64


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the openai package's own, for its own message
def test_the_clients_own_tools_and_parse(caller: openai.OpenAI) -> None:
    class Add(pydantic.BaseModel):
        a: int = pydantic.Field(ge=0, le=9)

    tool = openai.pydantic_function_tool(Add)
    parsed = caller.chat.completions.parse(
        model="caller", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    message = parsed.choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Add)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}
    following = caller.chat.completions.create(
        model="caller", messages=[*MESSAGES, message, result], tools=[tool], max_tokens=2
    )
    assert following.usage.completion_tokens > 0


def bad_tool(parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD = [
    ({"tools": [bad_tool({"not": {}}, strict=True)]}, "tools[0].function.parameters"),
    ({"tools": [TOOLS[1], bad_tool({"type": "x"})], "tool_choice": "required"}, "tools[1].function.parameters"),
    ({"tools": [bad_tool({}, name="a b")]}, "tools[0].function.name"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
    ({"tool_choice": "function"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice.type"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}]}, None),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "1"}}]}]}, None),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
]


@pytest.mark.parametrize(("change", "param"), BAD)
def test_what_cannot_be_honoured_is_refused(
    tool_server: ServerProcess, change: dict[str, Any], param: str | None
) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 2} | change
    with httpx.Client(base_url=tool_server.url, trust_env=False, timeout=60) as http:
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == (param or "messages[0].tool_calls[0].function.arguments"), error
        assert http.get("/health").json()["running"] == 0


def test_a_template_without_a_place_for_tools(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 2}
    for choice in ("auto", "required"):
        response = http.post("/v1/chat/completions", json=body | {"tool_choice": choice})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert http.post("/v1/chat/completions", json=body | {"tool_choice": "none"}).status_code == 200


# -- other templates -------------------------------------------------------------------------------------------------

LLAMA_SIGN = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'


SIGNS = {"mistral": "[TOOL_CALLS]", "qwen": "<tool_call>", "llama": LLAMA_SIGN, "plain": "<function=x>"}


def rename_token(model: Path, old: str, new: str, *, special: bool) -> None:
    """Give one of the demo tokenizer's special tokens another name, and perhaps make it one that shows in texts."""
    file, configuration = model / "tokenizer.json", model / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text().replace(json.dumps(old), json.dumps(new)))
    for token in tokenizer["added_tokens"]:
        token["special"] = special if token["content"] == new else token["special"]
    file.write_text(json.dumps(tokenizer))
    config = json.loads(configuration.read_text())
    others = [token for token in config["extra_special_tokens"] if token != old]
    configuration.write_text(json.dumps(config | {"extra_special_tokens": others + [new] * special}))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """Engines by format. Mistral's marker is a special token, and Qwen's are added ones, as in their own models."""
    folder = tmp_path_factory.mktemp("formats")
    made: dict[str, Engine] = {}
    for name, sign in SIGNS.items():
        model = checkpoint(folder / name, sign)
        if name == "mistral":
            rename_token(model, "<|document|>", "[TOOL_CALLS]", special=True)
        if name == "qwen":
            for old, new in (("<|document|>", "<tool_call>"), ("<|system|>", "</tool_call>"), ("<|user|>", "<think>")):
                rename_token(model, old, new, special=False)
        made[name] = Engine.load(model, dtype="float32", pool_bytes=32 << 20)
    yield made
    for engine in made.values():
        engine.check()
        engine.close()


def request(**fields: Any) -> ChatRequest:
    fields["logit_bias"] = TIDY | fields.get("logit_bias", {})
    return ChatRequest.model_validate(
        {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "temperature": 0} | fields
    )


def answer(engine: Engine, body: ChatRequest) -> dict[str, Any]:
    tools = ToolUse.of(body, engine)
    prompt = engine.encode_chat([m.for_template() for m in body.messages], tools=tools.offered)
    [completion] = engine.generate([prompt], tools.constrain(body.sampling_params()))
    return ToolCallWriter(tools.parser()).message(completion.text)


@pytest.mark.parametrize("name", SIGNS)
def test_required_calls_in_other_formats(engines: dict[str, Engine], name: str) -> None:
    message = answer(engines[name], request(tool_choice=NAMED))
    [call] = message["tool_calls"]
    assert message["content"] is None
    assert call["function"]["name"] == "add"
    jsonschema.validate(json.loads(call["function"]["arguments"]), ADD)


def test_strict_free_calls_where_the_marker_is_a_special_token(engines: dict[str, Engine]) -> None:
    engine = engines["mistral"]
    [marker] = engine.encode("[TOOL_CALLS]", add_special_tokens=False)
    message = answer(engine, request(logit_bias={str(marker): 100}, parallel_tool_calls=False))
    [call] = message["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    assert "tool_calls" not in answer(engine, request(logit_bias={str(marker): -100}, max_tokens=10))


def test_markers_that_are_tokens_are_written_as_tokens(engines: dict[str, Engine]) -> None:
    """Spelled out in other tokens they would be new to the model, and the next turn would not find them cached."""
    engine = engines["qwen"]
    opening, closing, think = (engine.encode(t, False) for t in ("<tool_call>", "</tool_call>", "<think>"))
    for body in (request(tool_choice=NAMED), request(parallel_tool_calls=False, logit_bias={str(opening[0]): 100})):
        tools = ToolUse.of(body, engine)
        prompt = engine.encode_chat(MESSAGES, tools=tools.offered)
        [completion] = engine.generate([prompt], tools.constrain(body.sampling_params()))
        assert [completion.token_ids[0], completion.token_ids[-1]] == opening + closing
        assert ToolCallWriter(tools.parser()).message(completion.text)["tool_calls"]
    thinking = answer(engine, request(logit_bias={str(think[0]): 100}, max_tokens=3))
    assert thinking == {"content": "<think>" * 3}


def test_strict_free_calls_in_bare_json(engines: dict[str, Engine]) -> None:
    engine = engines["llama"]
    [brace] = engine.encode("{", add_special_tokens=False)
    [call] = answer(engine, request(logit_bias={str(brace): 100}))["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    assert "tool_calls" not in answer(engine, request(logit_bias={str(brace): -100}, max_tokens=10))
    with pytest.raises(InvalidRequestError) as caught:
        ToolUse.of(request(response_format={"type": "json_object"}), engine)
    assert caught.value.param == "response_format"


def test_free_calls_of_unknown_form_are_refused(engines: dict[str, Engine]) -> None:
    with pytest.raises(InvalidRequestError, match="required") as caught:
        ToolUse.of(request(), engines["plain"])
    assert caught.value.param == "tool_choice"
