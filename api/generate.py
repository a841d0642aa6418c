"""`stemcache generate`: one prompt, its completion as it comes."""

from __future__ import annotations

import argparse
import sys

from stemcache.api.loading import load_engine


def generate(options: argparse.Namespace) -> int:
    """Text to stdout, usage to stderr. Raises StemcacheError."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with load_engine(options) as engine:
        from stemcache.engine.sampling import SamplingParams

        params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
        with engine.submit(engine.encode(prompt), params) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print()
        usage = stream.usage
    print(
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} generated",
        file=sys.stderr,
    )
    return 0
