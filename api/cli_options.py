"""Options that commands share, and the kinds of values that they take.

Invariant: a value that is none ends in a sentence of argparse, which names the option and says what would be one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stemcache.api.sizes import parse_size


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, and the engine over it."""
    parser.add_argument("--model", help="model folder or hub name (default: the demo model that ships with stemcache)")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto is the CPU; cuda has been tested without a GPU only (docs/kernels.md)",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: the checkpoint's own where the CPU computes it natively, else float32",
    )
    parser.add_argument(
        "--pool-bytes",
        type=size,
        default="2GiB",
        help="memory for keys and values, such as 512MiB (default: %(default)s)",
    )
    parser.add_argument("--chunk-tokens", type=int, choices=[16, 32, 64, 128, 256], default=64)
    parser.add_argument(
        "--eviction",
        choices=["pgdsf", "lru", "lfu"],
        default="pgdsf",
        help="what goes when the pool is full; pgdsf: what is used least for its cost (default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        choices=["fcfs", "cache"],
        default="cache",
        help="which of a key's requests starts first; cache: the one that is cached most (default: %(default)s)",
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Who is let in, and how much at once."""
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with 'name key' in each line; without it everybody is let in (default: $STEMCACHE_API_KEYS_FILE)",
    )
    parser.add_argument("--max-body", type=size, default="16MiB", help="size of a request (default: %(default)s)")
    parser.add_argument(
        "--max-queue", type=positive, default=512, help="waiting requests of one key (default: %(default)s)"
    )
    parser.add_argument(
        "--request-timeout",
        type=positive,
        default=600,
        metavar="SECONDS",
        help="time for one request, after which it ends with an error (default: %(default)s)",
    )
    parser.add_argument("--log-prompts", action="store_true", help="write the text of prompts into the log")


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """Documents of the server, and how they are found."""
    parser.add_argument(
        "--documents", type=Path, metavar="FOLDER", help="where documents are kept (default: in memory, until the end)"
    )
    parser.add_argument(
        "--embedder",
        default="hashing",
        metavar="CHOICE",
        help="hashing (words, no download), a sentence-transformers model, or the URL of an OpenAI-compatible "
        "endpoint, whose key is $STEMCACHE_EMBEDDINGS_API_KEY (default: %(default)s)",
    )
    parser.add_argument("--embedding-model", metavar="NAME", help="the model of an embeddings endpoint")
    parser.add_argument(
        "--index", choices=["flat", "ivf", "hnsw"], default="flat", help="how passages are searched (default: flat)"
    )
    parser.add_argument(
        "--passage-tokens",
        type=positive,
        default=512,
        help="documents are split into passages of so many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="never read documents before their search has ended"
    )
    parser.add_argument(
        "--max-documents", type=positive, default=100_000, help="documents of one key (default: %(default)s)"
    )


def add_blend_options(parser: argparse.ArgumentParser) -> None:
    """Moving documents, and the questions that decide whether it may be done."""
    parser.add_argument(
        "--blend-share",
        type=share,
        default="0.15",
        help="of each moved document, how much is computed again, from 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--blend-questions",
        type=Path,
        metavar="FILE",
        help="JSON lines with questions to try the model on (the demo model has its own)",
    )


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"not a number from 0 to 1: {text!r}")
    return value


def size(text: str) -> int:
    """Bytes, such as 512MiB."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a whole number above 0: {text!r}")
    return int(text)


def port(text: str) -> int:
    """A number up to 65535; 0 is any free port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text!r}; write a number up to 65535, 0 for any free one")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"not NAME=VALUE: {text!r}")
    return name, value
