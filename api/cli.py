"""The command line: `stemcache serve`, `generate`, `demo`, `explain`, `tree`, `documents`, `cache` and `simulate`.

Invariant: a user's mistake ends in one sentence on stderr and exit status 2, never in a traceback. Commands are
imported when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stemcache._version import __version__
from stemcache.api.cold_options import add_cold_options
from stemcache.api.sizes import parse_size
from stemcache.prefixtree.errors import StemcacheError

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except (StemcacheError, OSError) as error:
        print(f"stemcache: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "serve":
            from stemcache.api.serve import serve

            return serve(options)
        case "generate":
            from stemcache.api.generate import generate

            return generate(options)
        case "explain":
            from stemcache.api.cache_commands import explain

            return explain(options)
        case "tree":
            from stemcache.api.cache_commands import tree

            return tree(options)
        case "simulate":
            from stemcache.api.simulate import simulate

            return simulate(options)
        case "documents":
            from stemcache.api.document_commands import documents

            return documents(options)
        case "cache":
            from stemcache.api.cold_commands import run

            return run(options)
        case _:
            from stemcache.api.demo import demo

            return demo()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stemcache", description="Serve language models from a prefix-sharing KV store."
    )
    parser.add_argument("--version", action="version", version=f"stemcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the OpenAI-compatible HTTP server")
    _add_model_options(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")

    _add_server_options(serve)
    add_cold_options(serve)
    serve.add_argument(
        "--show-cache-text", action="store_true", help="let GET /v1/cache/tree?text=true show what is cached"
    )

    _add_document_options(serve)

    generate = commands.add_parser("generate", help="complete a prompt; text to stdout, usage to stderr")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to complete; - reads it from standard input")
    _add_model_options(generate)
    generate.add_argument(
        "--max-tokens", type=int, default=128, help="tokens to generate at most (default: %(default)s)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")

    commands.add_parser("demo", help="ask the demo model questions over HTTP and show what the cache saves")
    _add_cache_commands(commands)
    _add_simulate(commands)
    _add_document_commands(commands)
    _add_cold_commands(commands)
    return parser


def _add_document_options(parser: argparse.ArgumentParser) -> None:
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
        type=_positive,
        default=512,
        help="documents are split into passages of so many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--no-speculation", action="store_true", help="never read documents before their search has ended"
    )
    parser.add_argument(
        "--max-documents", type=_positive, default=100_000, help="documents of one key (default: %(default)s)"
    )


def _add_document_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("documents", help="add, list and delete the documents of a running server")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="add files; one document each, or one a line of a .jsonl file")
    add.add_argument("files", nargs="+", metavar="FILE", help="a text file, or a .jsonl file")
    add.add_argument(
        "--metadata", type=_pair, action="append", metavar="NAME=VALUE", help="of all documents; may be repeated"
    )
    add.add_argument("--ttl", type=float, metavar="SECONDS", help="delete them by themselves after so long")
    show = actions.add_parser("list", help="list documents")
    delete = actions.add_parser("delete", help="delete documents and all that was computed from them")
    delete.add_argument("ids", nargs="+", metavar="ID")
    for action in (add, show, delete):
        action.add_argument(
            "--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)"
        )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"not NAME=VALUE: {text!r}")
    return name, value


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with 'name key' in each line; without it everybody is let in (default: $STEMCACHE_API_KEYS_FILE)",
    )
    parser.add_argument("--max-body", type=_size, default="16MiB", help="size of a request (default: %(default)s)")
    parser.add_argument(
        "--max-queue", type=_positive, default=512, help="waiting requests of one key (default: %(default)s)"
    )
    parser.add_argument(
        "--request-timeout",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="time for one request, after which it ends with an error (default: %(default)s)",
    )
    parser.add_argument("--log-prompts", action="store_true", help="write the text of prompts into the log")


def _add_cache_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser("explain", help="ask a running server why a prompt is found in its cache, or is not")
    explain.add_argument("prompt_file", metavar="PROMPT-FILE", help="a file with the prompt; - reads standard input")
    explain.add_argument(
        "--chat", action="store_true", help="the file is a chat: JSON (a request, or its messages), or one message"
    )
    tree = commands.add_parser("tree", help="draw what a running server has cached")
    tree.add_argument(
        "--max-nodes", type=int, default=500, metavar="N", help="chunks to draw at most (default: %(default)s)"
    )
    tree.add_argument("--text", action="store_true", help="with the cached text, if the server shows it")
    for command in (explain, tree):
        command.add_argument(
            "--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)"
        )


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("simulate", help="compare eviction policies and document orders, without a model")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines with documents or Mooncake's hash_ids")
    parser.add_argument(
        "--capacity-tokens", type=_positive, default=1_050_000, help="what the cache holds (default: %(default)s)"
    )
    parser.add_argument("--chunk-tokens", type=_positive, default=512, help="smaller is slower (default: %(default)s)")
    parser.add_argument("--max-shift", type=_positive, metavar="N", help="also: documents moved by N places at most")
    parser.add_argument("--backlog", type=_positive, metavar="N", help="also: both queues, with N requests waiting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them into a file, as SVG")
    made = parser.add_argument_group("synthetic workloads, without --trace")
    made.add_argument("--k", type=_positive, nargs="+", default=[2, 5], help="documents per request (default: 2 5)")
    made.add_argument("--requests", type=_positive, default=6_000, help="default: %(default)s")
    made.add_argument("--documents", type=_positive, default=20_000, help="default: %(default)s")
    made.add_argument("--seeds", type=_positive, nargs="+", default=[7], help="a run for each (default: 7)")


def _add_cold_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser("cache", help="look after a cold tier: ls, stats, verify, clear")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    what = {
        "ls": "list what is stored, by namespace (a model, a tenant and a salt of theirs)",
        "stats": "whether the tier answers, and what it holds",
        "verify": "read everything and check it",
        "clear": "delete everything of stemcache, or of one namespace",
    }
    for name, text in what.items():
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--cold", default="disk", metavar="disk|URL", help="the tier, as `serve` takes it (default: %(default)s)"
        )
        if name == "verify":
            action.add_argument("--delete", action="store_true", help="delete what is damaged")
        if name == "clear":
            action.add_argument("--namespace", metavar="HEX", help="one of those that `ls` shows")
            action.add_argument("--yes", action="store_true", help="do not ask")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model folder or hub name (default: the demo model that ships with stemcache)")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="cuda is refused until there is a backend for it",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: the checkpoint's own where the CPU computes it natively, else float32",
    )
    parser.add_argument(
        "--pool-bytes",
        type=_size,
        default="2GiB",
        help="memory for keys and values, such as 512MiB (default: %(default)s)",
    )
    parser.add_argument("--chunk-tokens", type=int, choices=[16, 32, 64, 128, 256], default=64)
    parser.add_argument(
        "--eviction",
        choices=["lru", "lfu", "pgdsf"],
        default="lru",
        help="what goes when the pool is full; pgdsf weighs use and cost, for documents (default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        choices=["fcfs", "cache"],
        default="cache",
        help="which of a key's requests starts first; cache: the one that is cached most (default: %(default)s)",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a whole number above 0: {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text!r}; write a number up to 65535, 0 for any free one")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
