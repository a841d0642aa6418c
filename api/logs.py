"""The server's log: one JSON object a line, or one readable line on a terminal.

Invariant: only the server configures logging, once, when it starts; libraries just log. Every line that is written
while a request is served carries the request's id and tenant.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from stemcache.api.context import current_or_none


def configure(stream: TextIO | None = None) -> None:
    """Send the log to `stream`, stderr by default: ours and the web server's from INFO on, others' from WARNING on."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if stream.isatty() else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("stemcache", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says besides its message."""
    fields: dict[str, Any] = {}
    request = current_or_none()
    if request is not None:
        fields["request_id"] = request.request_id
        if request.tenant is not None and request.tenant.name:
            fields["tenant"] = request.tenant.name
    return fields | getattr(record, "fields", {})


class JsonFormatter(logging.Formatter):
    """{"time": "2026-11-22T06:00:00.000000Z", "level": "INFO", "logger": ..., "message": ..., ...}"""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: what a client sent cannot break the line, nor the encoding


class TextFormatter(logging.Formatter):
    """06:00:00 INFO  POST /v1/completions 200  seconds=0.2 ..."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        known = {"method", "path", "status"}  # the message has them
        more = " ".join(f"{name}={json.dumps(value)}" for name, value in fields_of(record).items() if name not in known)
        # A path can hold line breaks and escape sequences, which are none of a terminal's business.
        message = "".join(char if char.isprintable() else "?" for char in record.getMessage())
        line = f"{time} {record.levelname:<7} {message}  {more}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
