"""Calibration: whether a model's answers suffer when passages are moved instead of read in their places.

Invariant: a verdict is measured on this model, in this dtype, at this share, on these questions, or it is not used.
What the questions put into the cache is removed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from stemcache.engine.blend import Blend
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.engine import Engine
from stemcache.engine.errors import BlendRefusedError
from stemcache.engine.sampling import SamplingParams
from stemcache.ragcache.alone import read_alone
from stemcache.ragcache.compose import Context, compose
from stemcache.ragcache.errors import CalibrationError

log = logging.getLogger(__name__)

MAX_LOSS: Final = 0.02
"""Of the questions, how many fewer may be answered right; one standard error of 200 questions, nine in ten right."""
MIN_RIGHT: Final = 0.5
"""Of the questions, how many must be answered right without moving; below that they tell nothing of this model."""
MIN_QUESTIONS: Final = 50

_METHOD: Final = "stemcache.blend.v1"  # hashed into the names of verdicts: to be changed with how blends are computed
_AT_ONCE: Final = 25
_ANSWER: Final = SamplingParams(max_tokens=64, temperature=0)


@dataclass(frozen=True, slots=True)
class Question:
    """documents: (title, text) of each, two or more. answer: what a right answer contains, up to case and white space;
    None: a right answer is the one that is given without moving anything."""

    documents: tuple[tuple[str, str], ...]
    question: str
    answer: str | None = None
    system: str = ""

    def is_right(self, text: str, unmoved: str) -> bool:
        if self.answer is None:
            return _plain(text) == _plain(unmoved)
        return _plain(self.answer) in _plain(text)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the questions were answered right with everything computed, and with passages moved.

    moved_tokens: of the prompts' tokens, how many were moved and not computed.
    """

    share: float
    questions: int
    right_computed: int
    right_moved: int
    prompt_tokens: int
    moved_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.right_moved} of {self.questions} questions answered right with {self.share:.0%} of each moved "
            f"passage computed again, {self.right_computed} with everything computed; "
            f"{self.moved_tokens / self.prompt_tokens:.0%} of the tokens were moved"
        )

    def require_passed(self) -> None:
        """Raise BlendRefusedError where moving costs answers, or the questions cannot tell."""
        reason = None
        if self.right_computed < MIN_RIGHT * self.questions:
            reason = f"fewer than {MIN_RIGHT:.0%} are right even without moving, so these questions cannot tell"
        elif not self.moved_tokens:
            reason = "nothing could be moved: give longer documents, or a larger pool"
        elif self.right_computed - self.right_moved > MAX_LOSS * self.questions:
            reason = f"that is a loss of more than {MAX_LOSS:.0%}: try a larger share, or leave it off"
        if reason is not None:
            raise BlendRefusedError(f"documents are not moved in this model: {self}; {reason}")


def demo_questions(count: int = 200, *, documents: tuple[int, int] = (4, 8), seed: int = 2025) -> list[Question]:
    """Questions over so many synthetic documents (least, most), about names that the demo model never saw."""
    rng, questions = Random(seed), list[Question]()
    while len(questions) < count:
        corpus = random_corpus(rng, rng.randint(*documents))
        texts = tuple((document.title, document.text) for document in corpus)
        for fact in (rng.choice(document.facts) for document in rng.choices(corpus, k=4)):
            questions.append(Question(texts, fact.question, fact.sentence, SYSTEM_PROMPT))
    return questions[:count]


def read_questions(path: Path) -> list[Question]:
    """Questions from a file with one JSON object in each line:

        {"documents": [{"title": "...", "text": "..."}, ...], "question": "...", "answer": "...", "system": "..."}

    `title`, `answer` and `system` may be left out. Raises CalibrationError.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the questions in {path} cannot be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CalibrationError(
                    f"line {number} of {path} is no question ({error}): it takes 'documents', each with 'text', "
                    "'question', and may have 'answer' and 'system'"
                ) from error
    return questions


def calibrate(engine: Engine, questions: Sequence[Question], *, share: float, folder: Path | None = None) -> Verdict:
    """The verdict on these questions: an earlier one from `folder`, or measured now and kept there.

    Raises CalibrationError for too few questions, ContextLengthError for those that are too long.
    """
    if len(questions) < MIN_QUESTIONS or any(len(each.documents) < 2 for each in questions):
        raise CalibrationError(f"give at least {MIN_QUESTIONS} questions, each with two documents or more")
    path = None if folder is None else folder / f"{_name(engine, questions, share)}.json"
    verdict = None if path is None else _load(path)
    if verdict is None:
        verdict = measure(engine, questions, share)
        if path is not None:
            _save(verdict, path)
    return verdict


def measure(engine: Engine, questions: Sequence[Question], share: float) -> Verdict:
    """Answer every question with passages moved, then with everything computed, as two tenants that nobody else is."""
    moving, computing = os.urandom(16), os.urandom(16)
    right_moved = right_computed = prompt_tokens = moved_tokens = 0
    try:
        for begin in range(0, len(questions), _AT_ONCE):
            group = questions[begin : begin + _AT_ONCE]
            contexts = [_context(engine, each) for each in group]
            blends = [Blend(context.spans[0][0], context.spans, share) for context in contexts]
            prompts = [context.tokens for context in contexts]
            read_alone(engine, zip(prompts, blends, strict=True), moving, b"")
            with ExitStack() as streams:
                pairs = [
                    (
                        streams.enter_context(engine.submit(prompt, _ANSWER, tenant=moving, blend=blend)),
                        streams.enter_context(engine.submit(prompt, _ANSWER, tenant=computing)),
                    )
                    for prompt, blend in zip(prompts, blends, strict=True)
                ]
                for question, (moved, computed) in zip(group, pairs, strict=True):
                    text, unmoved = ("".join(delta.text for delta in stream) for stream in (moved, computed))
                    right_moved += question.is_right(text, unmoved)
                    right_computed += question.is_right(unmoved, unmoved)
                    prompt_tokens += moved.usage.prompt_tokens
                    moved_tokens += moved.usage.moved_tokens
    finally:
        for tenant in (moving, computing):
            engine.cache.clear(tenant=tenant)
    return Verdict(share, len(questions), right_computed, right_moved, prompt_tokens, moved_tokens)


def _context(engine: Engine, question: Question) -> Context:
    system = [{"role": "system", "content": question.system}] if question.system else []
    documents = [{"title": title, "text": text} for title, text in question.documents]
    return compose(engine.prompts, [*system, {"role": "user", "content": question.question}], documents)


def _question(record: dict[str, Any]) -> Question:
    documents = tuple((str(each.get("title", "")), str(each["text"])) for each in record["documents"])
    unknown = set(record) - {"documents", "question", "answer", "system"}
    if unknown:
        raise ValueError(f"there is no field '{min(unknown)}'")
    answer = record.get("answer")
    return Question(
        documents, str(record["question"]), None if answer is None else str(answer), str(record.get("system", ""))
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _name(engine: Engine, questions: Sequence[Question], share: float) -> str:
    """The namespace says which weights, dtype and codec."""
    what = [_METHOD, engine.namespace().digest.hex(), share, [asdict(each) for each in questions]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _load(path: Path) -> Verdict | None:
    """None where there is none, or none that can be read: then it is measured."""
    try:
        return Verdict(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("the verdict in %s cannot be used, measuring anew: %s", path, error)
        return None


def _save(verdict: Verdict, path: Path) -> None:
    """Written whole or not at all. Where it cannot be, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}.tmp")
        written.write_text(json.dumps(asdict(verdict), indent=2) + "\n")
        written.replace(path)
    except OSError as error:
        log.warning("the verdict cannot be kept in %s: %s", path, error)
