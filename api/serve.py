"""`stemcache serve`: the application on a port, from the first byte of the model to the last open request."""

from __future__ import annotations

import argparse
import errno
import gc
import ipaddress
import logging
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from types import FrameType
from typing import NoReturn

import uvicorn

from stemcache.api import logs
from stemcache.api.blending import switch_on_blending
from stemcache.api.cold_options import cold_from, tenant_secret
from stemcache.api.document_service import open_documents
from stemcache.api.drain import Drain
from stemcache.api.draining_server import DrainingServer
from stemcache.api.keys import Keyring, Tenant
from stemcache.api.limits import Limits
from stemcache.api.loading import load_engine
from stemcache.api.public_corpus import warm_public_corpus
from stemcache.api.server import create_app
from stemcache.api.settings import Settings
from stemcache.api.tracing import exported_spans
from stemcache.api.upkeep import Upkeep

_log = logging.getLogger(__name__)

# Ctrl-C lets running requests finish, this long; a second Ctrl-C ends them at once.
_GRACE_SECONDS = 30
# What is left then is cancelled, but for what a slow client has not read yet.
_CANCEL_SECONDS = 5


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises StemcacheError for a bad model, file of keys or public corpus, OSError for a file or a port that cannot be
    had.
    """
    signal.signal(signal.SIGTERM, _exit)
    logs.configure()
    settings = Settings.read()
    keyring = _keyring(options, settings)
    # Bound before the model is loaded, so that a taken port is known at once; not listening before it is, so that
    # a client is refused rather than kept waiting.
    with (
        _bind(options.host, options.port) as listener,
        load_engine(options, lambda: cold_from(options, settings)) as engine,
        ExitStack() as stack,
    ):
        gc.freeze()  # all that there is now stays: a pass over it would stop every stream, for 0.2 to 0.4 s
        gc.enable()
        host, port = listener.getsockname()[:2]
        if keyring is None and not ipaddress.ip_address(host).is_loopback:
            _log.warning("listening on %s without API keys: whoever can reach it can use it; see --api-keys", host)
        _log.info("serving %s at http://%s:%d/v1", engine.model_name, f"[{host}]" if ":" in host else host, port)
        if options.public_corpus is not None:
            n_tokens = warm_public_corpus(engine, options.public_corpus)
            _log.info("%s tokens of %s are cached for all tenants", f"{n_tokens:,}", options.public_corpus)
        drain = Drain()
        documents = stack.enter_context(open_documents(options, settings, engine))
        secret = tenant_secret(options, settings, has_keys=keyring is not None)
        if documents is not None:
            stack.enter_context(Upkeep(documents, [Tenant.of("", secret)] if keyring is None else keyring.tenants))
        switch_on_blending(options, settings, documents)
        app = create_app(
            engine,
            keyring=keyring,
            secret=secret,
            limits=limits_from(options),
            drain=drain,
            spans=exported_spans(engine.model_name) if settings.traces_endpoint else None,
            log_prompts=options.log_prompts,
            show_cache_text=options.show_cache_text,
            documents=documents,
        )
        # The application has no lifespan, and ending one by force would be logged as a failure.
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=_CANCEL_SECONDS
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal once more after its shutdown: the normal end
            DrainingServer(config, drain, grace_seconds=_GRACE_SECONDS).run(sockets=[listener])
    return 0


def limits_from(options: argparse.Namespace) -> Limits:
    """The limits that the command line asks for."""
    return Limits(
        body_bytes=options.max_body,
        queue=options.max_queue,
        documents=options.max_documents,
        seconds=options.request_timeout,
    )


def _keyring(options: argparse.Namespace, settings: Settings) -> Keyring | None:
    """The keys that are let in; None where none were given. Raises KeyFileError, OSError."""
    path = options.api_keys or settings.api_keys_file
    if path is not None:
        return Keyring.load(path, settings.secret)
    return Keyring({settings.api_key: "default"}, settings.secret) if settings.api_key else None


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
