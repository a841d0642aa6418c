"""Incremental text: never an unfinished character, never a piece of a stop string, and in the end the whole."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from stemcache.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def byte_level(demo_tokenizer):
    return demo_tokenizer.backend_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_like():
    """A tokenizer whose decoder strips the first token's space and falls back to bytes, as Llama 2's does."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij", "▁a", "▁b", "▁cd"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return tokenizer


def run(tokenizer, prompt, tokens, stop=()):
    """All pieces, and whether a stop string ended it."""
    detokenizer, pieces = Detokenizer(tokenizer, prompt, stop), []
    for token in tokens:
        piece = detokenizer.add(token)
        pieces.append(piece.text)
        if piece.stopped:
            return pieces, True
    last = detokenizer.finish()
    return [*pieces, last.text], last.stopped


texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=30)


@settings(max_examples=150)
@given(prompt=texts.filter(bool), text=texts)
@example(prompt="The sign is \ufffd", text="0\ufffd, and another \ufffd")
@example(prompt="The sign is \ufffd", text="")
@example(prompt="The sign is \ufffd", text="\ufffd")
def test_pieces_join_to_the_text(byte_level, prompt, text):
    ids = byte_level.encode(text, add_special_tokens=False).ids
    pieces, stopped = run(byte_level, byte_level.encode(prompt).ids, ids)
    assert "".join(pieces) == text
    assert not stopped


@settings(max_examples=150)
@given(text=st.text("abc", max_size=30), stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(byte_level, text, stop):
    ids = [i for char in text for i in byte_level.encode(char, add_special_tokens=False).ids]
    pieces, stopped = run(byte_level, [5], ids, stop)
    ends = [at for at in (text.find(s) for s in stop) if at >= 0]
    assert stopped == bool(ends)
    got = "".join(pieces)
    assert not any(s in got for s in stop)
    if not ends:
        assert got == text
    else:
        # The first stop string that is *finished* wins, as it must when tokens come one at a time.
        finished = min(at + len(s) for at, s in ((text.find(s), s) for s in stop) if at >= 0)
        starts = [text[:finished].find(s) for s in stop]
        assert got == text[: min(at for at in starts if at >= 0)]


def test_a_stop_string_may_span_tokens(byte_level):
    ids = [i for char in "one END two" for i in byte_level.encode(char, add_special_tokens=False).ids]
    pieces, stopped = run(byte_level, [5], ids, ["END"])
    assert stopped
    assert "".join(pieces) == "one "


def test_a_cut_character_becomes_a_replacement(byte_level):
    ids = byte_level.encode("aé", add_special_tokens=False).ids
    assert len(ids) > 2  # the accented letter is two bytes, two tokens
    pieces, _ = run(byte_level, [5], ids[:-1])
    assert "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize("text", ["é", "é and ñ", "€", "€\ufffd"])
def test_a_prompt_may_end_within_a_character(byte_level, text):
    """Its text begins with that character, and not with the prompt's."""
    ids = byte_level.encode("It costs about one " + text, add_special_tokens=False).ids
    cut = len(byte_level.encode("It costs about one ", add_special_tokens=False).ids) + 1
    assert byte_level.decode(ids[:cut]).endswith("\ufffd")
    assert "".join(run(byte_level, ids[:cut], ids[cut:])[0]) == text
    assert "".join(run(byte_level, ids[:cut], [])[0]) == ""
    after = byte_level.encode("x", add_special_tokens=False).ids  # the character stays unfinished
    assert "".join(run(byte_level, ids[:cut], after)[0]) == "x"
    assert "".join(run(byte_level, ids[:cut], [*after, ids[cut - 1]])[0]) == "x\ufffd"


def test_the_first_word_keeps_its_space(sentencepiece_like):
    prompt = sentencepiece_like.encode("a b").ids
    word = sentencepiece_like.token_to_id("▁cd")
    pieces, _ = run(sentencepiece_like, prompt, [word, word])
    assert "".join(pieces) == " cd cd"


def test_bytes_of_a_character_arrive_as_one_piece(sentencepiece_like):
    euro = [sentencepiece_like.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    pieces, _ = run(sentencepiece_like, sentencepiece_like.encode("a").ids, euro)
    assert [piece for piece in pieces if piece] == ["€"]


def test_special_tokens_have_no_text(byte_level, demo_tokenizer):
    ids = byte_level.encode("a", add_special_tokens=False).ids
    pieces, _ = run(byte_level, [5], [*ids, demo_tokenizer.eos_token_id])
    assert "".join(pieces) == "a"


def test_without_a_tokenizer_there_is_no_text():
    pieces, stopped = run(None, [1], [2, 3])
    assert "".join(pieces) == ""
    assert not stopped
