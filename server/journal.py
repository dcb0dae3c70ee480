"""The log: one line for each request and each thing that happens to a run, as text for people or JSON for programs.

Nothing secret is ever handed to it: requests are logged by the template of their route, never with query or headers, and statements of the
database without their values.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]
LOGGERS = ("fwdllama.server", "uvicorn")


class Text(logging.Formatter):
    """`2026-01-01T00:00:00.000Z INFO round-closed run=toy round=3`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback of an exception."""
        facts = [f"{key}={_word(value)}" for key, value in _facts(record).items()]
        line = " ".join((_at(record), record.levelname, record.getMessage(), *facts))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Json(logging.Formatter):
    """One object a line: at, level, event, and the facts of it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, with the traceback of an exception as `exception`."""
        line = {"at": _at(record), "level": record.levelname.lower(), "event": record.getMessage(), **_facts(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(format: Format, stream: TextIO, *, level: int = logging.INFO) -> None:
    """Send the aggregator's log to a stream, and the web server's warnings."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Json() if format == "json" else Text())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level if name == LOGGERS[0] else max(level, logging.WARNING))


def _at(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts = getattr(record, "facts", {})
    return {key: value for key, value in facts.items() if value is not None and key not in ("at", "level", "event")}


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() and not set(text) & set(' "=') and text else json.dumps(text)
