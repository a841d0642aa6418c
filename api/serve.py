"""`stemcache serve`: the application on a port, from the first byte of the model to the last open request."""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import uvicorn

from stemcache.api.loading import load_engine
from stemcache.api.server import create_app

# Ctrl-C lets running requests finish, this long; a second Ctrl-C ends them at once.
_GRACE_SECONDS = 30


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises StemcacheError for a bad model, OSError for a port that cannot be had."""
    signal.signal(signal.SIGTERM, _exit)
    # Bound before the model is loaded, so that a taken port is known at once; not listening before it is, so that
    # a client is refused rather than kept waiting.
    with _bind(options.host, options.port) as listener, load_engine(options) as engine:
        host, port = listener.getsockname()[:2]
        print(
            f"serving {engine.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", file=sys.stderr
        )
        config = uvicorn.Config(create_app(engine), timeout_graceful_shutdown=_GRACE_SECONDS)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal once more after its shutdown: the normal end
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises OSError with a sentence."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = "another program uses the port" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error
    return listener


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)
