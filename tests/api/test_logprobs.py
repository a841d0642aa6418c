"""Log-probabilities that JSON can hold, and names for tokens that are no text."""

from __future__ import annotations

import math

from stemcache import Engine
from stemcache.api.logprobs import FLOOR, ChatLogprobs, CompletionLogprobs, token_name
from stemcache.engine.outputs import TokenLogprob


def test_a_part_of_a_character_is_named_by_its_bytes() -> None:
    assert token_name("é".encode()) == "é"
    assert token_name(b"\xe2\x82") == "bytes:\\xe2\\x82"


def test_the_impossible_has_a_finite_log_probability(engine: Engine) -> None:
    tokens = [TokenLogprob(5, -math.inf, ((6, -math.inf),))]
    assert CompletionLogprobs(engine).write(tokens)["token_logprobs"] == [FLOOR]
    [entry] = ChatLogprobs(engine).write(tokens)["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (FLOOR, FLOOR)


def test_offsets_count_characters_and_go_on_from_part_to_part(engine: Engine) -> None:
    ids = engine.encode("a€b")  # the middle character is three tokens of this byte-level vocabulary
    writer = CompletionLogprobs(engine)
    offsets = [writer.write([TokenLogprob(token, 0.0)])["text_offset"][0] for token in ids]
    assert b"".join(engine.prompts.token_bytes(token) for token in ids) == "a€b".encode()
    assert offsets[0] == 0
    assert offsets[-1] == 2
