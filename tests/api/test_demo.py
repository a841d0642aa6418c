"""The demo: its questions can be answered from their documents, and the demo model answers them."""

from __future__ import annotations

import random
import re

import pytest

from stemcache.api.cli import main
from stemcache.api.demo import DOCUMENTS, QUESTIONS, questions


def test_each_question_comes_with_the_document_that_answers_it() -> None:
    asked = list(questions(random.Random(1)))
    assert len(asked) == QUESTIONS
    read = {document.title for question in asked for document in question.documents}
    assert len(read) == DOCUMENTS
    for question in asked:
        assert any(question.fact in document.facts for document in question.documents)
    assert asked == list(questions(random.Random(1)))


@pytest.mark.sweep
def test_the_demo_answers_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    share = re.search(r"right answers +(\d+)% of 40", printed)
    hits = re.search(r"hit rate +(\d+)%", printed)
    assert share is not None
    assert hits is not None
    assert int(share[1]) >= 95
    assert int(hits[1]) > 50  # most questions find their documents read before
