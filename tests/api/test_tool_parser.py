"""Tool calls read out of growing text: the same events however it is cut, and what is no call stays as it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemcache.api.tool_calls import ToolCallWriter
from stemcache.api.tool_formats import HERMES, LLAMA, MISTRAL, PLAIN, ToolFormat, detect
from stemcache.api.tool_parser import ToolCallParser

NAMES = {"get_time", "add"}
ARGUMENTS = '{"text": "a \\"}] \\\\", "list": [1, {"x": "</tool_call>"}]}'
BARE = '{"name": "add", "parameters": {"a": 1}}'

CASES = [
    (HERMES, "Just text.\n", "Just text.\n", []),
    (HERMES, "a <b> < <tool_cal", "a <b> < <tool_cal", []),
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", '{"a": 1}')]),
    (
        HERMES,
        'Wait. \n<tool_call>{"name":"add","arguments":{}}</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": '
        + ARGUMENTS
        + "}\n</tool_call>\n then",
        "Wait.then",
        [("add", "{}"), ("get_time", ARGUMENTS)],
    ),
    (HERMES, '<tool_call>\n{"name": "rm", "arguments": {}}', '<tool_call>\n{"name": "rm", "arguments": {}}', []),
    (HERMES, "say <tool_call> <tool_call>\n[1]", "say <tool_call> <tool_call>\n[1]", []),
    (HERMES, 'x <tool_call> <tool_call>{"name": "add", "arguments": {}}', "x <tool_call>", [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "a"}', '<tool_call>{"name": "add", "arguments": "a"}', []),
    (HERMES, '<tool_call>{"name": "add", "arg', '<tool_call>{"name": "add", "arg', []),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "1', "", [("add", '{"a": "1')]),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": [1]}}]', "", [("add", '{"a": [1]}')]),
    (
        MISTRAL,
        'Hm [TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "get_time", "arguments": {"b": {}}} ] ',
        "Hm",
        [("add", "{}"), ("get_time", '{"b": {}}')],
    ),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {}}, {"name": "rm"', ', {"name": "rm"', [("add", "{}")]),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (MISTRAL, "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    (LLAMA, BARE, "", [("add", '{"a": 1}')]),
    (LLAMA, "\n\n " + BARE + "\n", "", [("add", '{"a": 1}')]),
    (LLAMA, "Here: " + BARE, "Here: " + BARE, []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '{"name": "Ada"}\n', '{"name": "Ada"}\n', []),
    (LLAMA, "", "", []),
    (PLAIN, '{"name": "add", "arguments": {"ü": "ü"}}', "", [("add", '{"ü": "ü"}')]),
]


def read(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, put together from a stream's deltas as a client does it."""
    writer = ToolCallWriter(ToolCallParser(form, NAMES))
    content, calls = "", []
    for position, piece in enumerate(pieces):
        for part in writer.parts(piece, final=position == len(pieces) - 1):
            content += part.get("content", "")
            for call in part.get("tool_calls", ()):
                if "id" in call:
                    assert (call["index"], call["type"]) == (len(calls), "function")
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_every_cut_reads_the_same(form, text, content, calls):
    assert read(form, [text]) == (content, calls)
    assert read(form, [*text, ""]) == (content, calls)
    for cut in range(len(text) + 1):
        assert read(form, [text[:cut], text[cut:]]) == (content, calls), text[:cut]


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "add", "arguments": ',
    "{}",
    "}",
    "\n",
    " ",
    "a",
    "<",
    '"',
    "[",
    "]",
    ",",
]


@given(
    st.sampled_from([HERMES, MISTRAL, LLAMA]), st.lists(st.sampled_from([*PIECES, "[TOOL_CALLS]", BARE]), max_size=12)
)
def test_any_text_reads_the_same_at_once_and_by_character(form, pieces):
    text = "".join(pieces)
    whole, by_character = read(form, [text]), read(form, [*text, ""])
    assert whole == by_character
    if not whole[1]:
        assert whole[0] == text


def test_the_message_is_the_deltas_put_together():
    for form, text, content, calls in CASES:
        message = ToolCallWriter(ToolCallParser(form, NAMES)).message(text)
        assert (message["content"] or "") == content
        found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        assert found == calls
        assert (message["content"] is None) == (content == "" and bool(calls))


def test_finish_reasons():
    writer = ToolCallWriter(ToolCallParser(HERMES, NAMES))
    assert writer.finish_reason("stop") == "stop"
    writer.message('<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert [writer.finish_reason(reason) for reason in ("stop", "length", None)] == ["tool_calls", "length", None]


def test_ids_have_the_one_form_that_mistrals_templates_take():
    message = ToolCallWriter(ToolCallParser(LLAMA, NAMES)).message(BARE)
    [call] = message["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    assert json.loads(call["function"]["arguments"]) == {"a": 1}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("... return a json object within <tool_call></tool_call> XML tags: <tool_call>\n{...}", HERMES),
        ("{{ '[TOOL_CALLS] [' }}", MISTRAL),
        (
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}',
            LLAMA,
        ),
        ('\'{\\"name\\": function name, \\"parameters\\": dictionary}\'', LLAMA),
        ("<tool_call>\n<function=example>", PLAIN),
        ("<tool_call>{function-name}<arg_key>", PLAIN),
        ("[TOOL_CALLS]{{ name }}[ARGS]", PLAIN),
        ("{{ tools | tojson }}", PLAIN),
    ],
)
def test_formats_are_known_by_their_templates(template, form):
    assert detect(template) is form
