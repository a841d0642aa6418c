"""Loading the engine that the command line asked for, with a sign of life on stderr."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from stemcache.engine.cold import ColdOptions
    from stemcache.engine.engine import Engine


_log = logging.getLogger(__name__)


def load_engine(options: argparse.Namespace, cold: Callable[[], ColdOptions] | None = None) -> Engine:
    """The engine of the command line's model options. Raises StemcacheError.

    cold: what lies below the device; asked once torch is loaded.
    """
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    with console.status("loading torch and transformers ..."):  # shows nothing where stderr is no terminal
        from transformers.utils.logging import disable_progress_bar

        from stemcache.engine.demo import MODEL_PATH
        from stemcache.engine.engine import Engine

        disable_progress_bar()  # the line above is the sign of life; a second bar would write through it
    model = options.model or MODEL_PATH
    with console.status(f"loading {model} ..."):
        engine = Engine.load(
            model,
            device=options.device,
            dtype=options.dtype,
            pool_bytes=options.pool_bytes,
            chunk_tokens=options.chunk_tokens,
            eviction=options.eviction,
            queue=options.queue,
            cold=None if cold is None else cold(),
        )
    _log.info("loaded %s in %.1f s", engine.model_name, time.monotonic() - start)
    return engine
