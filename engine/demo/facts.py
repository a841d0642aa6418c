"""Synthetic documents whose facts cannot be memorised, and questions about them.

Invariant: everything is drawn from the `random.Random` that the caller passes in, so a seed names a corpus. Names are
random syllables, one in eight of them held out of training, so a model that answers right about those has read the
documents.

The demo model is trained on this world (`scripts/train_demo_model.py`), the demo serves from it, and
`benchmarks/answers.py` measures with it what a lossy feature costs in answers.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SYSTEM_PROMPT = "You answer questions from the documents that you are given. Repeat the question, then give the value."

_ONSETS = ["b", "br", "c", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z"]
_VOWELS = ["a", "e", "i", "o", "u"]
_CODAS = ["", "", "l", "n", "r", "s", "th", "x"]
_COLOURS = (
    "amber azure black blue bronze brown coral crimson cyan gold green grey indigo ivory jade lilac "
    "maroon olive orange pink purple red silver teal violet white yellow"
).split()
_KINDS = "harbor tower library bridge garden station museum mill".split()
_FILLERS = [
    "Visitors arrive by the north road.",
    "The building was repaired after the storm.",
    "A small market is held there every week.",
    "Most of the records were kept on paper.",
    "The local council meets in the main hall.",
    "In winter the gates are closed early.",
    "Several maps of the area are on display.",
    "The river can be seen from the roof.",
]


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity, as in "The code of Velmora is 7392."."""

    entity: str
    attribute: str
    value: str

    @property
    def question(self) -> str:
        return f"What is the {self.attribute} of {self.entity}?"

    @property
    def sentence(self) -> str:
        """The sentence of the document, and the answer that the model is trained to give."""
        return f"The {self.attribute} of {self.entity} is {self.value}."


@dataclass(frozen=True)
class FactDocument:
    """A titled document about one entity."""

    title: str
    text: str
    facts: tuple[Fact, ...]

    def as_template_document(self) -> dict[str, str]:
        """The form that chat templates and the HTTP field `documents` take."""
        return {"title": self.title, "text": self.text}


def is_held_out(name: str) -> bool:
    """Whether a name is kept for evaluation: one in eight, by its checksum."""
    return zlib.crc32(name.encode()) % 8 == 0


def random_name(rng: random.Random, *, held_out: bool) -> str:
    """Two or three syllables, such as "Velmora", from the names for training or from those held out."""
    while True:
        syllables = rng.choice((2, 2, 3))
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if is_held_out(name.capitalize()) == held_out:
            return name.capitalize()


def _random_value(rng: random.Random, attribute: str, held_out: bool) -> str:
    match attribute:
        case "code":
            return "".join(rng.choice("0123456789") for _ in range(4))
        case "colour":
            return rng.choice(_COLOURS)
        case "date":
            return f"{rng.randint(1500, 2025)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        case "weight":
            return f"{rng.randint(10, 999)} kg"
        case _:
            return random_name(rng, held_out=held_out)


ATTRIBUTES = ("code", "colour", "date", "weight", "keeper", "founder")


def random_document(
    rng: random.Random, *, facts: int = 2, fillers: int = 2, held_out: bool = True, mixed: float = 0.0
) -> FactDocument:
    """One document of `facts` facts (at most `len(ATTRIBUTES)`) between `fillers` sentences without any.

    mixed: the share of facts whose value is of any attribute's kind, as in "The colour of Velmora is 7392". For
        training: where a value's kind does not tell whose it may be, a model has to look at the entity.
    """
    entity = random_name(rng, held_out=held_out)
    attributes = rng.sample(ATTRIBUTES, facts)
    kinds = [rng.choice(ATTRIBUTES) if mixed and rng.random() < mixed else attribute for attribute in attributes]
    values = [_random_value(rng, kind, held_out) for kind in kinds]
    found = tuple(Fact(entity, attribute, value) for attribute, value in zip(attributes, values, strict=True))
    sentences = [fact.sentence for fact in found]
    for filler in rng.sample(_FILLERS, fillers):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    return FactDocument(f"The {rng.choice(_KINDS)} {entity}", " ".join(sentences), found)


def random_corpus(
    rng: random.Random,
    documents: int,
    *,
    facts: int = 2,
    fillers: int = 2,
    held_out: bool = True,
    mixed: float = 0.0,
) -> list[FactDocument]:
    """`documents` documents about different entities, whose names no training has seen unless `held_out` is off."""
    corpus: dict[str, FactDocument] = {}
    while len(corpus) < documents:
        document = random_document(rng, facts=facts, fillers=fillers, held_out=held_out, mixed=mixed)
        corpus.setdefault(document.title.split()[-1], document)
    return list(corpus.values())


def is_right(fact: Fact, answer: str) -> bool:
    """Exact match: the answer is the fact's sentence, up to white space at its ends."""
    return answer.strip() == fact.sentence
