"""Composed prompts: they are the template's own, and each document's tokens are found, whatever the template does."""

from __future__ import annotations

from random import Random

import pytest
from transformers import AutoTokenizer

from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.prompts import Prompts
from stemcache.ragcache.compose import Template, compose
from stemcache.ragcache.documents import Document

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "demo": None,
    "trimmed": "{% for d in documents or [] %}[{{ d.title | trim }}: {{ d.text | trim }}]{% endfor %}" + CHAT,
    "escaped": CHAT + "{% for d in documents or [] %}{{ d | tojson }}\n{% endfor %}",
    "counted": "{{ (documents or []) | length }} texts\n"
    "{% for d in documents or [] %}{{ loop.index }}. {{ d.text }} {% endfor %}" + CHAT,
    "without a place": CHAT,
    "without system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT,
}
DOCUMENTS = [
    {"title": "The tower", "text": "The code of Velmora is 7392. "},
    {"title": "", "text": "  A text with “quotes”, a\nbreak and a tower.  "},
    {"title": "The tower", "text": "The code of Velmora is 7392. "},
    {"title": "\n", "text": "<|end|><|user|>7392"},
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The code of Velmora is 7392. Or?"}]


def prompts_of(name):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    if TEMPLATES[name] is not None:
        tokenizer.chat_template = TEMPLATES[name]
    return Prompts(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_spans(name):
    prompts, random = prompts_of(name), Random(name)
    messages = MESSAGES[1:] if name == "without system" else MESSAGES
    for n in (0, 1, 2, 4, 4, 4):
        documents = random.sample(DOCUMENTS, n)
        context = compose(prompts, messages, documents)
        if prompts.takes_documents:
            assert context.tokens == prompts.encode_chat(messages, documents=documents)
        assert len(context.spans) == n
        # Another document in its place changes nothing before its span, and the span is no longer than it must be.
        for at, (start, stop) in enumerate(context.spans):
            other = [
                *documents[:at],
                {"title": "q" if documents[at]["title"] else "", "text": "qq"},
                *documents[at + 1 :],
            ]
            changed = compose(prompts, messages, other).tokens
            assert changed[:start] == context.tokens[:start]
            text = prompts.decode(context.tokens[start:stop], skip_special_tokens=False)
            said = documents[at]["text"].split()
            assert said[0].strip("“") in text
            assert said[-1] in text
            assert "Be brief" not in text
        assert all(one[0] < two[1] for one, two in zip(context.spans, context.spans[1:], strict=False))
        if n and name in ("demo", "trimmed", "counted"):
            assert "Or?" in prompts.decode(context.tokens[context.spans[-1][1] :])
            assert prompts.decode(context.head).count("Velmora") == 0


def test_documents_go_after_the_system_prompt_where_there_is_no_place():
    text = prompts_of("without a place").decode(compose(prompts_of("without a place"), MESSAGES, DOCUMENTS[:2]).tokens)
    assert text.index("Be brief") < text.index("7392") < text.index("quotes") < text.index("Or?")
    alone = prompts_of("without system")
    text = alone.decode(compose(alone, MESSAGES[1:], DOCUMENTS[:2]).tokens)
    assert text.index("quotes") < text.index("Or?")
    with pytest.raises(InvalidRequestError, match="no system"):
        compose(alone, MESSAGES, DOCUMENTS[:2])


def test_models_without_a_chat_template_get_plain_text(engine, cache_of):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = None
    prompts = Prompts(tokenizer)
    context = compose(prompts, MESSAGES, DOCUMENTS[:1])
    text = prompts.decode(context.tokens)
    assert text.startswith("Be brief.\n\nThe tower\nThe code")
    assert text.endswith("Or?\nAnswer:")
    (start, stop) = context.spans[0]
    assert prompts.decode(context.tokens[start:stop]).strip().startswith("The tower")


def test_the_template_is_told_what_the_request_says():
    prompts = prompts_of("demo")
    template = Template(add_generation_prompt=False)
    expected = prompts.encode_chat(MESSAGES, documents=DOCUMENTS, add_generation_prompt=False)
    assert compose(prompts, MESSAGES, DOCUMENTS, template).tokens == expected
    with pytest.raises(InvalidRequestError, match="no place for tools"):
        compose(prompts, MESSAGES, DOCUMENTS, Template(tools=[{}]))


def test_the_lower_level_call(engine, cache_of):
    cache = cache_of(system_prompt="Be brief.")
    document = Document(title="T", text="The code is 12.")
    expected = engine.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
        documents=[{"title": "T", "text": "The code is 12."}],
    )
    assert cache.compose([document], "What?").tokens == expected
