"""Blending: passages that were read once, right after the system prompt, are moved to where a prompt has them.

Invariant: off until `switch_on` has shown that this model's answers do not suffer from it. What is read alone is noted
as any prompt is, so deleting a document removes that too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stemcache.engine.blend import SHARE, Blend
from stemcache.engine.engine import Engine
from stemcache.engine.errors import InvalidRequestError
from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.alone import alone, read_alone
from stemcache.ragcache.calibration import Question, Verdict, calibrate
from stemcache.ragcache.document_store import DocumentStore
from stemcache.ragcache.preparation import Prepared


class Blending:
    """`ContextCache.blending`. From any thread. verdict: how the model did, once it is switched on."""

    def __init__(self, engine: Engine, documents: DocumentStore) -> None:
        self._engine = engine
        self._documents = documents
        self.verdict: Verdict | None = None

    def switch_on(self, questions: Sequence[Question], *, share: float = SHARE, folder: Path | None = None) -> Verdict:
        """Allow `reuse="blend"` if the answers to these questions are as good with it as without.

        share: of each moved passage, how much is computed again. folder: where verdicts are kept, so that a model is
        tried once. Raises BlendRefusedError, CalibrationError, InvalidRequestError.
        """
        self._engine.require_movable()
        verdict = calibrate(self._engine, questions, share=share, folder=folder)
        verdict.require_passed()
        self.verdict = verdict
        return verdict

    def require_on(self) -> Verdict:
        """The verdict. Raises InvalidRequestError while there is none."""
        if self.verdict is None:
            raise InvalidRequestError(
                "reuse 'blend' is switched off, as it may change answers: start the server with --blend, or call "
                "ContextCache.blending.switch_on; it is refused where a model's answers suffer from it",
                param="rag.reuse",
            )
        return self.verdict

    def planned(self, prepared: Prepared) -> Prepared:
        """With the passages that may be moved, and the marks of what is read for that."""
        spans = prepared.context.spans
        if len(spans) < 2:  # the only passage stands where it would be read alone
            return prepared
        # A token that two passages share, as a tokenizer may have it, is the earlier one's.
        starts = [spans[0][0], *(max(start, stop) for (start, _), (_, stop) in zip(spans[1:], spans, strict=False))]
        passages = tuple((start, stop) for start, (_, stop) in zip(starts, spans, strict=True))
        if any(start >= stop for start, stop in passages):
            return prepared
        blend = Blend(spans[0][0], passages, self.require_on().share)
        return replace(prepared, blend=blend, alone_marks=tuple(self._marks(prepared, blend)))

    def read(self, prepared: Prepared) -> None:
        """Have the passages read alone that are not cached; returns when they are. Their marks are noted already."""
        assert prepared.blend is not None
        space = prepared.space
        try:
            read_alone(self._engine, [(prepared.tokens, prepared.blend)], space.tenant, space.cache_salt)
        finally:
            self._documents.verify(prepared.epoch, space.owner, prepared.all_marks)

    def _marks(self, prepared: Prepared, blend: Blend) -> Iterator[tuple[int, Footprint]]:
        """What is read alone of the catalogue's passages, by their keys."""
        space = prepared.space
        prompts = alone(self._engine, prepared.tokens, blend)
        for each, tokens, (start, stop) in zip(prepared.retrieved, prompts, blend.passages, strict=True):
            if each.passage.key > 0:
                yield (
                    each.passage.key,
                    self._engine.cache.footprint(
                        tokens, blend.head, blend.head + stop - start, tenant=space.tenant, cache_salt=space.cache_salt
                    ),
                )
