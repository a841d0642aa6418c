"""Moving documents, as the command line asks for it: `serve --blend`, and `stemcache blend-check`.

Invariant: a server that says it blends has a verdict on its own model; one whose answers would suffer does not start.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from stemcache.api.loading import load_engine
from stemcache.api.settings import Settings
from stemcache.engine.errors import BlendRefusedError, InvalidRequestError

if TYPE_CHECKING:
    from stemcache.ragcache.calibration import Question
    from stemcache.ragcache.context_cache import ContextCache

_log = logging.getLogger(__name__)

_REFUSED = 1


def switch_on_blending(options: argparse.Namespace, settings: Settings, documents: ContextCache | None) -> None:
    """What `serve --blend` asks for. Raises BlendRefusedError, CalibrationError, InvalidRequestError."""
    if not options.blend:
        return
    if documents is None:
        raise InvalidRequestError("--blend is for documents, and there are none: pip install 'stemcache[rag]'")
    console = Console(stderr=True, highlight=False)
    with console.status("trying whether documents can be moved in this model ..."):
        verdict = documents.blending.switch_on(_questions(options), share=options.blend_share, folder=_folder(settings))
    _log.info("documents may be moved: %s", verdict)


def blend_check(options: argparse.Namespace) -> int:
    """Try it and print the verdict; 0 if documents may be moved, 1 if not. Raises StemcacheError."""
    questions = _questions(options)
    with load_engine(options) as engine:
        from stemcache.ragcache.calibration import calibrate

        try:
            engine.require_movable()
            verdict = calibrate(engine, questions, share=options.blend_share, folder=_folder(Settings.read()))
            verdict.require_passed()
        except BlendRefusedError as refusal:
            print(refusal)
            return _REFUSED
    print(f"Documents may be moved in {engine.model_name}: {verdict}.")
    return 0


def _questions(options: argparse.Namespace) -> list[Question]:
    from stemcache.ragcache.calibration import demo_questions, read_questions

    if options.blend_questions is not None:
        return read_questions(options.blend_questions)
    if options.model is None:
        return demo_questions()
    raise InvalidRequestError(
        "whether documents can be moved in this model has to be tried on questions of yours: name a file with "
        "--blend-questions (see docs/blend.md)"
    )


def _folder(settings: Settings) -> Path:
    """Where verdicts are kept, beside the chunks of a disk tier."""
    return (settings.cache_home or Path.home() / ".cache") / "stemcache" / "blend"
