"""`response_format` and `structured_outputs` through the openai client. The demo model knows no JSON: only the grammar
makes its answers right."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import date
from enum import Enum
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.engine import Engine

MESSAGES = [{"role": "user", "content": "The code?"}]

# Short strings and lists throughout: an untrained model ends them when it must.
AWKWARD: dict[str, dict[str, Any]] = {
    "enum of all kinds": {"enum": ["a", 1, None, True, {"x": [1.5]}, 'ü\n"\\']},
    "nested arrays": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "numbers": {
        "type": "object",
        "properties": {
            "i": {"type": "integer", "minimum": -7, "maximum": 12},
            "m": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
            "f": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
        },
        "required": ["i", "m", "f"],
        "additionalProperties": False,
    },
    "references": {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/leaf"}, "two": {"$ref": "#/$defs/leaf"}},
        "required": ["one", "two"],
        "additionalProperties": False,
    },
    "recursion": {
        "$defs": {
            "node": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}]}
        },
        "$ref": "#/$defs/node",
    },
    "unicode": {
        "type": "object",
        "properties": {"größe": {"const": "日本"}, 'quo"te\\': {"enum": ["\u2028", "🙂"]}},
        "required": ["größe", 'quo"te\\'],
        "additionalProperties": False,
    },
    "strings": {
        "type": "object",
        "properties": {
            "p": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$", "maxLength": 6},
            "d": {"type": "string", "format": "date"},
            "l": {"type": "string", "minLength": 3, "maxLength": 5},
        },
        "required": ["p", "d", "l"],
        "additionalProperties": False,
    },
    "optional and nullable": {
        "type": "object",
        "properties": {"a": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": 0}, "maxItems": 2}]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}},
        ],
        "maxProperties": 1,
    },
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 3},
        "minProperties": 1,
        "maxProperties": 1,
    },
    "a tuple": {"type": "array", "prefixItems": [{"const": "x"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "nothing but an empty object": {"type": "object", "additionalProperties": False},
}


# Without it the model, which was never taught JSON, may indent until its tokens are used up.
NO_LINES = {str(AutoTokenizer.from_pretrained(MODEL_PATH).convert_tokens_to_ids("\u010a")): -100}
FORMATS = jsonschema.FormatChecker()
FORMATS.checks("date", ValueError)(lambda text: date.fromisoformat("2" + text[1:]))  # JSON's dates have a year 0


def json_format(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | fields}


def chat(client: openai.OpenAI | openai.AsyncOpenAI, model: str, **fields: Any) -> Any:
    given = {"model": model, "messages": MESSAGES, "max_tokens": 300, "temperature": 0, **fields}
    return client.chat.completions.create(**given | {"logit_bias": NO_LINES | fields.get("logit_bias", {})})


@pytest.mark.parametrize("name", AWKWARD)
def test_answers_conform_to_awkward_schemas(client: openai.OpenAI, model: str, name: str) -> None:
    """Keys that are not named may be long: with a temperature this low the model soon ends them, or is helped to."""
    quote = {"logit_bias": {"8": 12}} if name == "a map" else {}
    choices = chat(
        client, model, response_format=json_format(AWKWARD[name]), n=3, temperature=1, seed=1, **quote
    ).choices
    for choice in choices:
        assert choice.finish_reason == "stop", choice.message.content
        jsonschema.validate(json.loads(choice.message.content), AWKWARD[name], format_checker=FORMATS)


def test_json_objects(client: openai.OpenAI, model: str, engine: Engine) -> None:
    [close] = engine.encode("}", add_special_tokens=False)
    bias = {str(close): 20}
    for fields in ({"temperature": 0}, {"seed": 2, "temperature": 1}):
        choice = chat(client, model, response_format={"type": "json_object"}, logit_bias=bias, **fields).choices[0]
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content), dict)


def test_json_that_is_cut_by_the_limit_says_so(client: openai.OpenAI, model: str, engine: Engine) -> None:
    [close] = engine.encode("}", add_special_tokens=False)
    form = {"type": "json_object"}
    choice = chat(client, model, response_format=form, max_tokens=2, logit_bias={str(close): -100}).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")


def test_the_stream_says_the_same(client: openai.OpenAI, model: str) -> None:
    form = json_format(AWKWARD["strings"], strict=True, description="three strings")
    whole = chat(client, model, response_format=form).choices[0]
    chunks = list(chat(client, model, response_format=form, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"


class Colour(Enum):
    red = "red"
    green = "green"


class Item(BaseModel):
    colour: Colour
    count: int = Field(ge=0, le=20)


class Order(BaseModel):
    items: list[Item] = Field(min_length=1, max_length=2)
    note: str | None = Field(max_length=4)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the openai package's own, for its own message
def test_parse_into_a_model_of_pydantics(client: openai.OpenAI, model: str) -> None:
    parsed = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Order, max_tokens=300, seed=3, temperature=1
    )
    assert isinstance(parsed.choices[0].message.parsed, Order)
    messages = [*MESSAGES, parsed.choices[0].message, {"role": "user", "content": "Sure?"}]
    assert chat(client, model, messages=messages, max_tokens=2).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[ab]{3}!"}, r"[ab]{3}!"),
        ({"choice": ["yes", "no\n", 'may"be']}, 'yes|no\n|may"be'),
        ({"grammar": 'start: "x" ("-" /[0-9]/){2}'}, r"x(-[0-9]){2}"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, r"x[0-9]y"),
        ({"json": {"const": 12}}, "12"),
        ({"json": '{"enum": [1, 2]}'}, "[12]"),
    ],
)
def test_structured_outputs_on_both_routes(
    client: openai.OpenAI, model: str, constraint: dict[str, Any], pattern: str
) -> None:
    extra = {"extra_body": {"structured_outputs": constraint}}
    text = client.completions.create(model=model, prompt="The code", max_tokens=50, **extra).choices[0].text
    assert re.fullmatch(pattern, text)
    assert re.fullmatch(pattern, chat(client, model, **extra).choices[0].message.content)


def test_response_format_on_completions(client: openai.OpenAI, model: str) -> None:
    extra = {"response_format": json_format(AWKWARD["numbers"])}
    answer = client.completions.create(model=model, prompt="The code", max_tokens=200, extra_body=extra)
    jsonschema.validate(json.loads(answer.choices[0].text), AWKWARD["numbers"])


def test_plain_requests_beside_constrained_ones_say_what_they_say_alone(client: openai.OpenAI, model: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as asynchronous:
            form = json_format(AWKWARD["references"])
            plain = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
            alone = [await chat(asynchronous, model, **plain), await chat(asynchronous, model, response_format=form)]
            mixed = [chat(asynchronous, model, **(plain if i % 2 else {"response_format": form})) for i in range(8)]
            for i, answer in enumerate(await asyncio.gather(*mixed)):
                assert answer.choices[0].message.content == alone[not i % 2].choices[0].message.content

    asyncio.run(run())


BAD = [
    ({"response_format": json_format({"not": {"type": "string"}})}, "response_format", "not"),
    ({"response_format": json_format({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
    ({"response_format": json_format({"type": "wrong"})}, "response_format", "wrong"),
    ({"response_format": json_format({"$ref": "#/$defs/none"})}, "response_format", "none"),
    ({"response_format": json_format({"x-guidance": {"lenient": True}})}, "response_format", "x-guidance"),
    ({"response_format": json_format({"const": "\ud800"})}, "response_format", "hex"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": json_format({}, name="a b")}, "response_format.json_schema.name", ""),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, None, "json_schema"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", ""),
    ({"response_format": "json"}, "response_format", ""),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs", "nowhere"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "both"),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("change", "param", "says"), BAD)
def test_what_cannot_be_enforced_is_refused(
    http: httpx.Client, path: str, change: dict[str, Any], param: str | None, says: str
) -> None:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "a"}
    content = json.dumps(prompt | {"max_tokens": 2} | change)
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert says in error["message"]
    if param is not None:
        assert error["param"] == param
    assert http.get("/health").json()["running"] == 0


def test_text_is_the_default(client: openai.OpenAI, model: str) -> None:
    plain = chat(client, model, max_tokens=12).choices[0].message.content
    assert chat(client, model, max_tokens=12, response_format={"type": "text"}).choices[0].message.content == plain
