"""What is written to standard error: one line a record, as text or JSON, with the request that it belongs to.

Must not know what a request asks. Nothing of a caller is logged: no address, key, query, file name or
content, and no answer.
"""

import logging
import random
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson

from service.models import milliseconds
from service.record import Record, current
from service.settings import Settings

logger = logging.getLogger(__name__)
requests_logger = logging.getLogger("service.requests")

REQUEST = "request"
FIELDS = "fields"
"""Attributes of a log record: the `Record` that it is about, if that is not the current one; more to say."""

QUIET = ("PIL", "python_multipart")
"""Libraries that would log what is wrong with a body, and parts of it."""

CALLER_GONE = "ExecuteBatchError raised in core"
"""What gRPC logs as an error when it cannot send an answer any more, because whoever called has gone."""

UNSEEN: Mapping[int, str] = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}
"""Characters that end a line or steer a terminal, each as it is written in Python."""

STACK_INDENT = "    "


def configure(settings: Settings) -> None:
    """Have everything that this process logs written as the settings say, other people's loggers included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    handler.addFilter(_is_news)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda raised: _log_uncaught(
        raised.exc_type, raised.exc_value, raised.exc_traceback
    )


def is_json() -> bool:
    """Whether what is logged is written as JSON now."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether it is more than that a caller has gone, which metrics count and no operator can mend."""
    return not (record.name.startswith("grpc") and _message(record).startswith(CALLER_GONE))


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        logger.critical("Nobody has caught this.", exc_info=(kind, error, traceback))


class TextFormatter(logging.Formatter):
    """A line a record, and a stack indented below it: nothing that is logged can look like another record."""

    def format(self, record: logging.LogRecord) -> str:
        """The level, the message, what else there is to say as `name=value`, and the stack."""
        said = _said(record)
        line = " ".join([_message(record), *[f"{name}={value}" for name, value in said.items()]])
        lines = [f"{record.levelname:<7} {line.translate(UNSEEN)}"]
        lines += [STACK_INDENT + one.translate(UNSEEN) for one in _stack(self, record).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, whatever is logged."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (RFC 3339, UTC), level, logger, message, what else there is to say, and the stack."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        document = {
            "time": time.removesuffix("+00:00") + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_said(record),
        }
        if stack := _stack(self, record):
            document["exception"] = stack
        try:
            return orjson.dumps(document).decode()
        except TypeError:  # half of a surrogate pair, which no UTF-8 has
            whole = {name: _in_utf8(value) for name, value in document.items()}
            return orjson.dumps(whole, default=repr).decode()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage().strip("\n")
    except Exception:  # noqa: BLE001 - others' arguments that do not fit, or fail to say what they are
        return f"{record.msg if isinstance(record.msg, str) else type(record.msg)} (cannot be formatted)"


def _said(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beside its message: the request that it belongs to, and its own fields."""
    said: dict[str, Any] = dict(getattr(record, FIELDS, ()))
    if request := getattr(record, REQUEST, None) or current.get():
        said["request_id"] = request.request_id
        if request.trace:
            said["trace_id"] = request.trace.trace_id
    return said


def _stack(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _in_utf8(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class RequestLog:
    """Logs how requests for an answer ended: a share of them, and every one that failed.

    Args:
        settings: Has the share.
        draw: A number from 0 to 1 for each request.
    """

    def __init__(self, settings: Settings, draw: Callable[[], float] = random.random) -> None:
        self._share = settings.log_requests
        self._draw = draw

    def take(self, request: Record) -> None:
        """Log it, if it is to be. Cost: 0.2 us if not, otherwise some 20 us."""
        level = logging.ERROR if request.outcome == "failed" else logging.INFO
        if level == logging.INFO and not (self._share and self._draw() < self._share):
            return
        if requests_logger.isEnabledFor(level):
            what = f"{request.method} {request.route}".lstrip()
            requests_logger.log(level, what, extra={REQUEST: request, FIELDS: _fields(request)})


def _fields(request: Record) -> dict[str, Any]:
    """How it ended, and why: nothing of who asked for what, and nothing of the answer but how good it is."""
    fields: dict[str, Any] = {"outcome": request.outcome}
    if request.status:
        fields["status"] = request.status
    if request.reason:
        fields["reason"] = request.reason
    if request.answer:
        fields["column"] = request.answer.served.columns_run[-1]
        fields["stopped_by"] = request.answer.served.stopped_by
    if request.budget_s:
        fields["budget_ms"] = milliseconds(request.budget_s)
    fields["elapsed_ms"] = milliseconds(request.ended_s - request.arrived_s)
    if request.model:
        fields["model"], fields["version"] = request.model, request.version
    fields["body_bytes"] = request.n_body_bytes
    if request.outcome == "failed" and (runs := [run.id for one in request.pictures for run in one.runs]):
        fields["run"] = max(runs)
    return fields
