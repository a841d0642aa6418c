"""The command line: `stemcache serve`, `generate`, `demo`, `explain`, `tree`, `documents`, `cache`, `blend-check`,
`bench` and `simulate`.

Invariant: a user's mistake ends in one sentence on stderr and exit status 2, never in a traceback. Commands are
imported when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from stemcache._version import __version__
from stemcache.api.cli_options import (
    add_blend_options,
    add_document_options,
    add_model_options,
    add_server_options,
    pair,
    port,
    positive,
)
from stemcache.api.cold_options import add_cold_options
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
            gc.disable()  # until all is there: passes over what is imported, and stays, are a fifth of a start
            try:
                from stemcache.api.serve import serve

                return serve(options)
            finally:
                gc.enable()
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
        case "blend-check":
            from stemcache.api.blending import blend_check

            return blend_check(options)
        case "bench":
            from stemcache.api.bench import bench

            return bench(options)
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
    add_model_options(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="port to listen on (default: %(default)s)")

    add_server_options(serve)
    add_cold_options(serve)
    serve.add_argument(
        "--public-corpus",
        type=Path,
        metavar="FILE",
        help="requests, one a line, whose prompts are read at the start and found by all tenants",
    )
    serve.add_argument(
        "--show-cache-text", action="store_true", help="let GET /v1/cache/tree?text=true show what is cached"
    )

    add_document_options(serve)
    serve.add_argument(
        "--blend",
        action="store_true",
        help="let requests ask for reuse 'blend', which moves documents to other places and is not exact; the model is "
        "tried first, and refused if its answers suffer",
    )
    add_blend_options(serve)

    generate = commands.add_parser("generate", help="complete a prompt; text to stdout, usage to stderr")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to complete; - reads it from standard input")
    add_model_options(generate)
    generate.add_argument(
        "--max-tokens", type=int, default=128, help="tokens to generate at most (default: %(default)s)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")

    check = commands.add_parser("blend-check", help="try whether a model's answers suffer when documents are moved")
    add_model_options(check)
    add_blend_options(check)

    commands.add_parser("demo", help="ask the demo model questions over HTTP and show what the cache saves")
    _add_cache_commands(commands)
    _add_simulate(commands)
    _add_bench(commands)
    _add_document_commands(commands)
    _add_cold_commands(commands)
    return parser


def _add_document_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("documents", help="add, list and delete the documents of a running server")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="add files; one document each, or one a line of a .jsonl file")
    add.add_argument("files", nargs="+", metavar="FILE", help="a text file, or a .jsonl file")
    add.add_argument(
        "--metadata", type=pair, action="append", metavar="NAME=VALUE", help="of all documents; may be repeated"
    )
    add.add_argument("--ttl", type=float, metavar="SECONDS", help="delete them by themselves after so long")
    show = actions.add_parser("list", help="list documents")
    delete = actions.add_parser("delete", help="delete documents and all that was computed from them")
    delete.add_argument("ids", nargs="+", metavar="ID")
    for action in (add, show, delete):
        action.add_argument(
            "--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)"
        )


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


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure a running server on prompts that share documents")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=60, help="default: %(default)s")
    parser.add_argument("--concurrency", type=positive, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--documents", type=positive, default=20, help="of the catalogue (default: %(default)s)")
    parser.add_argument("--k", type=positive, default=3, help="documents in a prompt (default: %(default)s)")
    parser.add_argument("--document-words", type=positive, default=60, help="words of each (default: %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=16, help="of each answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="the same requests again; by default texts that nobody has seen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them into a file, .svg or .png")


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("simulate", help="compare eviction policies and document orders, without a model")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines with documents or Mooncake's hash_ids")
    parser.add_argument(
        "--capacity-tokens", type=positive, default=1_050_000, help="what the cache holds (default: %(default)s)"
    )
    parser.add_argument("--chunk-tokens", type=positive, default=512, help="smaller is slower (default: %(default)s)")
    parser.add_argument("--max-shift", type=positive, metavar="N", help="also: documents moved by N places at most")
    parser.add_argument("--backlog", type=positive, metavar="N", help="also: both queues, with N requests waiting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them into a file, .svg or .png")
    made = parser.add_argument_group("synthetic workloads, without --trace")
    made.add_argument("--k", type=positive, nargs="+", default=[2, 5], help="documents per request (default: 2 5)")
    made.add_argument("--requests", type=positive, default=6_000, help="default: %(default)s")
    made.add_argument("--documents", type=positive, default=20_000, help="default: %(default)s")
    made.add_argument("--seeds", type=positive, nargs="+", default=[7], help="a run for each (default: 7)")


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


if __name__ == "__main__":
    sys.exit(main())
