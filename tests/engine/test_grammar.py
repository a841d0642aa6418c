"""Grammars: the mask against every token tried in turn, what may end a text, and engines that follow them."""

from __future__ import annotations

import itertools
import json
import re

import jsonschema
import pytest
import torch

from stemcache import Engine, Grammar, SamplingParams
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.errors import GrammarError, InvalidRequestError
from stemcache.engine.grammar import MAX_SOURCE_CHARACTERS, GrammarCompiler

EOS = 2
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(demo_tokenizer):
    """For logits that are wider than the vocabulary, as many models have them."""
    return GrammarCompiler(demo_tokenizer, len(demo_tokenizer) + 6, {EOS})


@pytest.fixture(scope="module")
def engine():
    """In float32, where the same request gives the same logits whatever of it is cached."""
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=64 << 20) as loaded:
        yield loaded
        loaded.check()


def allowed_ids(matcher):
    return set(matcher.allowed().nonzero().flatten().tolist())


def follow(matcher, tokenizer, text):
    for token in tokenizer.encode(text, add_special_tokens=False):
        matcher.advance(token)
    return matcher


# -- masks -----------------------------------------------------------------------------------------------------------


# Where only one text can come next, llguidance allows only the token with which the tokenizer would write it, so the
# starts below are places with several.
CODE = re.compile(r"[abx](cd|ef){1,2}[0-9]{2}")
CODES = {
    f"{first}{''.join(middle)}{number:02d}"
    for first in "abx"
    for n in (1, 2)
    for middle in itertools.product(("cd", "ef"), repeat=n)
    for number in range(100)
}


@pytest.mark.parametrize("start", ["", "a", "xcd", "bef", "acdef", "acdef4"])
def test_the_mask_is_every_token_that_a_whole_text_can_go_on_with(compiler, demo_tokenizer, start):
    assert all(CODE.fullmatch(code) for code in CODES)
    matcher = follow(compiler.compile(Grammar.regex(CODE.pattern)).start(), demo_tokenizer, start)
    special = set(demo_tokenizer.all_special_ids)
    texts = {i: demo_tokenizer.decode([i]) for i in range(len(demo_tokenizer)) if i not in special}
    possible = {i for i, text in texts.items() if text and any(code.startswith(start + text) for code in CODES)}
    assert allowed_ids(matcher) == possible


def test_tokens_beyond_the_vocabulary_are_never_allowed(compiler, demo_tokenizer):
    matcher = compiler.compile(Grammar.regex(r"(.|\n)*")).start()
    mask = matcher.allowed()
    assert mask.shape == (len(demo_tokenizer) + 6,)
    assert not mask[len(demo_tokenizer) :].any()
    assert not mask[sorted(set(demo_tokenizer.all_special_ids) - {EOS})].any()
    assert int(mask.sum()) > 500


def test_ends_are_allowed_exactly_where_the_text_is_whole(compiler, demo_tokenizer):
    grammar = compiler.compile(Grammar.regex("(yes)+"))
    stop = demo_tokenizer.convert_tokens_to_ids("<|user|>")
    for options, ends in (({}, {EOS}), ({"stop_token_ids": [stop]}, {EOS, stop}), ({"ignore_eos": True}, set())):
        matcher = grammar.start(**options)
        assert not {EOS, stop} & allowed_ids(matcher)
        assert not {EOS, stop} & allowed_ids(follow(matcher, demo_tokenizer, "ye"))
        assert {EOS, stop} & allowed_ids(follow(matcher, demo_tokenizer, "s")) == ends
        assert not matcher.is_complete


def test_a_grammar_is_complete_where_nothing_can_follow(compiler, demo_tokenizer):
    matcher = compiler.compile(Grammar.choice(["no", "not"])).start()
    assert not follow(matcher, demo_tokenizer, "no").is_complete
    assert follow(matcher, demo_tokenizer, "t").is_complete
    assert allowed_ids(matcher) == {EOS}


def test_a_stop_token_that_the_grammar_needs_is_refused_until_there_is_no_other(compiler, demo_tokenizer):
    a, b = demo_tokenizer.encode("a"), demo_tokenizer.encode("b")
    grammar = compiler.compile(Grammar.regex("[ab]Q"))
    assert allowed_ids(grammar.start(stop_token_ids=a)).isdisjoint(a)
    assert allowed_ids(grammar.start(stop_token_ids=a)) >= set(b)
    assert allowed_ids(compiler.compile(Grammar.regex("aQ")).start(stop_token_ids=a)) == set(a)


def test_a_wrong_token_is_an_error(compiler, demo_tokenizer):
    matcher = compiler.compile(Grammar.choice(["yes"])).start()
    with pytest.raises(GrammarError, match="cannot be followed"):
        follow(matcher, demo_tokenizer, "no")
    with pytest.raises(GrammarError):
        matcher.allowed()
    assert not matcher.is_complete
    assert allowed_ids(compiler.compile(Grammar.choice(["yes"])).start()), "the compiled grammar was advanced"


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"not": {}}), "not"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"type": "nonsense"}), "nonsense"),
        (Grammar.json_schema({"$ref": "#/nowhere"}), "/nowhere"),
        (Grammar.json_schema({"$ref": "#"}), "no text"),
        (Grammar.json_schema({"$ref": "http://example.org/schema"}), "example.org"),
        (Grammar.json_schema({"const": "\ud800"}), "hex escape"),
        (Grammar.json_schema({"enum": ["x" * MAX_SOURCE_CHARACTERS]}), "characters"),
        (Grammar.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum"),
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.regex(""), "no text"),
        (Grammar.lark("start: nothing"), "nothing"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(compiler, grammar, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compiler.compile(grammar)
    assert caught.value.param == "grammar"
    assert "\n" not in str(caught.value)


def test_schemas_that_are_refused_before_compiling():
    nested = {}
    for _ in range(5000):
        nested = {"items": nested}
    for schema in (nested, {"x-guidance": {"lenient": True}, "not": {}}, {"const": object()}):
        with pytest.raises(InvalidRequestError) as caught:
            Grammar.json_schema(schema, param="response_format")
        assert caught.value.param == "response_format"


def test_gbnf_is_a_grammar_too(compiler, demo_tokenizer):
    assert follow(compiler.compile(Grammar.lark('root ::= "a" | "b"')).start(), demo_tokenizer, "b").is_complete
    with pytest.raises(InvalidRequestError, match="root") as caught:
        Grammar.lark("", param="structured_outputs")
    assert caught.value.param == "structured_outputs"


def test_a_grammar_is_compiled_once(compiler):
    first = compiler.compile(Grammar.json_schema(COLOURS, param="a"))
    assert compiler.compile(Grammar.json_schema(dict(COLOURS), param="b")) is first


# -- engines ---------------------------------------------------------------------------------------------------------


def complete(engine, prompt, grammar, **params):
    prompts = [engine.encode(prompt)]
    return list(engine.generate(prompts, SamplingParams(**{"max_tokens": 200, "grammar": grammar, **params})))


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 3}, {"temperature": 5.0}])
def test_generated_json_conforms(engine, params):
    (completion,) = complete(engine, "The code of", Grammar.json_schema(COLOURS), **params)
    assert completion.finish_reason == "stop"
    jsonschema.validate(json.loads(completion.text), COLOURS)


def test_a_grammar_that_allows_all_changes_nothing(engine):
    anything = Grammar.regex(r"(.|\n)*")
    # A grammar is about text: special tokens and parts of characters in wrong places are not.
    no_text = [i for i in range(engine.vocab_size) if "\ufffd" in engine.prompts.token_text(i)]
    no_text = dict.fromkeys((*range(7), *no_text), -100.0)
    for params in ({"temperature": 0}, {"seed": 4, "temperature": 0.7, "top_p": 0.9, "logprobs": 3}):
        common = {"max_tokens": 24, "logit_bias": no_text, "ignore_eos": True, **params}
        (free,) = complete(engine, "The code", None, **common)
        (bound,) = complete(engine, "The code", anything, **common)
        assert (bound.text, bound.token_ids, bound.logprobs) == (free.text, free.token_ids, free.logprobs)


def test_logprobs_are_those_of_the_raw_logits(engine):
    (completion,) = complete(engine, "The code", Grammar.choice(["xyz"]), temperature=0, logprobs=1)
    (free,) = complete(engine, "The code", None, temperature=0, logprobs=1, max_tokens=1)
    first = completion.logprobs[0]
    assert first.logprob < 0
    assert first.top[0] == pytest.approx(free.logprobs[0].top[0])
    assert first.token_id != first.top[0][0]


def test_each_choice_follows_the_grammar_on_its_own(engine):
    grammar = Grammar.regex("[a-z]{2,6}!")
    together = complete(engine, "The code", grammar, n=4, seed=10)
    assert len({c.text for c in together}) > 1
    for index, completion in enumerate(together):
        assert re.fullmatch("[a-z]{2,6}!", completion.text)
        (alone,) = complete(engine, "The code", grammar, seed=10 + index)
        assert alone.text == completion.text


def test_it_ends_where_the_grammar_is_complete_and_not_before(engine):
    everything = {"ignore_eos": True, "temperature": 0}
    (completion,) = complete(engine, "The code", Grammar.choice(["yes"]), **everything)
    assert (completion.text, completion.finish_reason) == ("yes", "stop")
    (completion,) = complete(engine, "The code", Grammar.regex("(ab)+"), temperature=0, logit_bias={EOS: 100.0})
    assert completion.text == "ab"
    (completion,) = complete(engine, "The code", Grammar.regex("(ab)+"), max_tokens=5, **everything)
    assert completion.finish_reason == "length"


def test_a_preempted_choice_goes_on_in_its_grammar():
    # a digit is a token, so the answers are longer than a chunk of the pool of three
    grammar = Grammar.regex("([0-9]{9},){10}end")
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=64 << 20) as roomy:
        prompts = [roomy.encode(f"number {i}") for i in range(3)]
        params = SamplingParams(max_tokens=120, temperature=0, grammar=grammar)
        expected = [c.text for c in roomy.generate(prompts, params)]
        pool = roomy._runner.layout.bytes_per_chunk * 3
    assert all(re.fullmatch("([0-9]{9},){10}end", text) for text in expected)
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=pool) as tight:
        assert [c.text for c in tight.generate(prompts, params)] == expected
        assert tight.stats().preemptions > 0
        tight.check()


def test_token_rules_choose_among_what_the_grammar_allows(engine):
    digits = [engine.encode(str(digit), False)[0] for digit in range(10)]
    rules = {"allowed_token_ids": digits[3:5], "temperature": 1.5, "seed": 3}
    (completion,) = complete(engine, "The code", Grammar.regex("[0-9]{8}"), **rules)
    assert re.fullmatch("[34]{8}", completion.text)


def test_token_rules_that_leave_nothing_of_the_grammar_end_the_request(engine):
    letter = engine.encode("a", False)
    with pytest.raises(GrammarError, match="token rules"):
        complete(engine, "The code", Grammar.regex("[0-9]{8}"), allowed_token_ids=letter)
    assert complete(engine, "The code", Grammar.regex("[0-9]{2}"))[0].finish_reason == "stop"


def test_a_grammar_error_ends_its_own_request_only(engine, monkeypatch):
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompt = engine.encode("The code of")
    expected = [list(c.token_ids) for c in engine.generate([prompt], plain)]
    broken = SamplingParams(max_tokens=12, temperature=0, n=2, grammar=Grammar.regex("[a-z]{9}"))
    run = engine._runner.run

    def ruling_out_all_letters_once(step):
        logits = run(step)
        rows = [entry.sequence for entry in step if entry.completes]
        for row, sequence in enumerate(rows):
            if sequence.request.params is broken and sequence.generated == 3:
                logits = logits.clone()
                logits[row] = -torch.inf
                logits[row, EOS] = 0.0
        return logits

    monkeypatch.setattr(engine._runner, "run", ruling_out_all_letters_once)
    streams = [engine.submit(prompt, params) for params in (plain, broken, plain)]
    with pytest.raises(GrammarError, match="ruled out"):
        list(streams[1])
    for stream in (streams[0], streams[2]):
        assert [[token for delta in stream for token in delta.token_ids]] == expected
    engine.check()


def test_a_grammar_needs_a_tokenizer(llama_engine):
    with pytest.raises(InvalidRequestError, match="no tokenizer") as caught:
        llama_engine().submit([5], SamplingParams(grammar=Grammar.json_object(param="response_format")))
    assert caught.value.param == "response_format"


def test_the_parameter_is_checked():
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(grammar={"type": "object"})
    assert caught.value.param == "grammar"
