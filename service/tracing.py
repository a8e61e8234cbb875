"""Spans of requests, for an OpenTelemetry collector: made of their records after the answers have left.

Must not know how an answer comes about beyond what its record says. Importing OpenTelemetry's SDK takes 0.2 s
and 10 MB, and it comes with the extra `tracing`: only a server that sends spans imports this.
"""

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

import service
from service.access import Rates
from service.engine import Served
from service.models import milliseconds
from service.record import Record, TraceContext
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
exporter_logger = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")

Attributes = dict[str, AttributeValue]

MAX_PATH = 256
"""Characters of a path that are sent: it may hold whatever its caller takes for a model's name."""

N_TOGETHER = 4
"""Requests whose spans are sent in one call. Larger: fewer calls, but Python is kept busy longer at a time:
some 0.3 ms a request, in which nothing is answered."""

REST = 1.0
"""Pauses between calls, in durations of the call before: what piled up is not sent at the cost of answers."""

WARN_EVERY_S = 60.0
CLOSE_GRACE_S = 1.0
"""For a call to end that is told to."""

METHODS = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
"""Others are `_OTHER`. Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/"""

FAULTS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""gRPC's statuses that are the server's. Source: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/"""


class Tracer:
    """Chooses requests whose spans are sent, and sends them from a thread of its own.

    A collector that is away costs spans and never an answer: so many requests wait for it at most, the spans
    of others are lost, and a warning says now and then how many.

    Args:
        settings: Where to, which, and all bounds.
        clock: Monotonic time of the records [s].
        draw: A number from 0 to 1 for each request that comes without a trace.

    Raises:
        SettingsError: OpenTelemetry refuses one of its variables in the environment.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._share = settings.trace_share
        self._rate = Rates(
            settings.max_traces_per_second, math.ceil(settings.max_traces_per_second), max_clients=1
        )
        self._timeout_s = settings.traces_timeout_s
        self._max_waiting = settings.max_waiting_traces
        self._clock = clock
        self._draw = draw
        self._spans = _Spans(clock)
        try:
            self._exporter = OTLPSpanExporter(endpoint=settings.traces_endpoint, timeout=self._timeout_s)
        except Exception as error:  # it has no one kind of error for what is wrong
            raise SettingsError(
                f"ANYTIME_TRACES_ENDPOINT: OpenTelemetry refuses a variable of the environment ({error}): "
                "correct what begins with OTEL_, or remove it."
            ) from error
        self._complaint = "They came faster than they were taken."
        self._waiting: SimpleQueue[Record | None] = SimpleQueue()
        self._n_refused = 0
        self._n_failed = 0
        self._n_told = 0
        self._told_s = -math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)

    def take(self, record: Record) -> None:
        """Have the spans of a request sent, if it is to be traced. Cost: some 0.2 us if not, 3 us if so.

        That is if its caller traces it, and for a share of those that belong to no trace yet; one rate bounds
        both. Nobody who was not let in is traced: what strangers claim must not cost anything.
        """
        trace = record.trace
        is_wanted = trace.is_sampled if trace else self._draw() < self._share
        if not (is_wanted and record.is_let_in) or self._rate.wait_s("", self._clock()):
            return
        if not trace:
            record.trace = TraceContext(f"{random.getrandbits(128) or 1:032x}")
        if self._waiting.qsize() < self._max_waiting:
            self._waiting.put(record)
        else:
            self._n_refused += 1

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Within it spans are sent; at its end those that wait, as far as `traces_timeout_s` allows."""
        # In the place of its own filter, which lets one complaint of a kind through every 20 s.
        exporter_logger.filters = [self._keep_complaint]
        self._thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._closing.set()
        self._waiting.put(None)
        self._thread.join(self._timeout_s)
        self._exporter.shutdown()  # ends a call in progress, and the thread then gives the rest up at once
        self._thread.join(CLOSE_GRACE_S)
        self._tell_of_losses(rest_s=0.0)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            started_s = time.monotonic()
            self._send([record, *self._others()])
            self._tell_of_losses(rest_s=WARN_EVERY_S)
            self._closing.wait(REST * (time.monotonic() - started_s))

    def _others(self) -> Iterator[Record]:
        """Those that can be sent together with one."""
        with contextlib.suppress(Empty):
            for _ in range(N_TOGETHER - 1):
                if (record := self._waiting.get_nowait()) is None:
                    self._waiting.put(None)  # it is the end, also for `_run`
                    return
                yield record

    def _send(self, records: list[Record]) -> None:
        try:
            spans = [span for record in records for span in self._spans.of(record)]
            is_sent = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001 - whatever fails costs these spans and no others
            self._complaint = f"{type(error).__name__}: {error}"
            is_sent = False
        if not is_sent:
            self._n_failed += len(records)

    def _keep_complaint(self, complaint: logging.LogRecord) -> bool:
        """What the exporter says is told with the losses, not each time that it fails or tries again."""
        self._complaint = complaint.getMessage()
        return False

    def _tell_of_losses(self, rest_s: float) -> None:
        n_lost, now_s = self._n_refused + self._n_failed - self._n_told, time.monotonic()
        if n_lost and now_s >= self._told_s + rest_s:
            self._n_told += n_lost
            self._told_s = now_s
            logger.warning(
                "The spans of %d requests are lost; answers are not affected. %s",
                n_lost,
                self._complaint,
            )


# ---- a record as spans ----


@dataclass(frozen=True, slots=True)
class Part:
    """A span below a request's own, in the records' time [s]."""

    name: str
    started_s: float
    ended_s: float
    attributes: Attributes = field(default_factory=dict)
    is_failed: bool = False


def parts(record: Record) -> Iterator[Part]:
    """Where a request's time went: its parts follow each other from its arrival to its end.

    Several pictures of one request are often run together: each run is given once, and the waits are those of
    the picture that was settled last.
    """
    if record.body_ended_s:
        yield Part("read", record.arrived_s, record.body_ended_s)
    for started_s, ended_s in record.decodings:
        yield Part("decode", started_s, ended_s)
    if not record.pictures:
        return
    last = max(record.pictures, key=lambda served: served.settled_s)
    waiting_since_s = last.entered_s
    for run in last.runs:
        yield Part("queue", waiting_since_s, run.started_s)
        waiting_since_s = run.ended_s
    if last.settled_s > waiting_since_s:
        yield Part("queue", waiting_since_s, last.settled_s)
    for run in {run.id: run for served in record.pictures for run in served.runs}.values():
        attributes: Attributes = {
            "anytime.column": run.column,
            "anytime.run": run.id,
            "anytime.images": run.n_images,
            "anytime.predicted_ms": milliseconds(run.predicted_s),
        }
        is_failed = last.outcome == "failed" and run is last.runs[-1]
        yield Part(f"column {run.column}", run.started_s, run.ended_s, attributes, is_failed)
    yield Part("write", last.settled_s, record.closed_s)


def described(record: Record) -> tuple[str, Attributes, bool]:
    """The name of a request's span, what it says, and whether it is a fault of the server's.

    Left out, because they are the caller's: its address, its program, and the query.
    Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/ and …/rpc/grpc/
    """
    said: Attributes = {
        "anytime.request_id": record.request_id,
        "anytime.outcome": record.outcome,
        "anytime.elapsed_ms": milliseconds(record.ended_s - record.arrived_s),
        "anytime.body_bytes": record.n_body_bytes,
    }
    if record.budget_s:
        said["anytime.budget_ms"] = milliseconds(record.budget_s)
    if record.model:
        said |= {"anytime.model": record.model, "anytime.version": record.version}
    if record.answer:
        said |= _answer_attributes(record.answer.served) | {"anytime.pictures": len(record.pictures)}
    if record.reason:
        said["anytime.reason"] = record.reason
    name = _describe_http(record, said) if record.method else _describe_grpc(record, said)
    is_fault = record.status in FAULTS or (isinstance(record.status, int) and record.status >= 500)
    if is_fault:
        said["error.type"] = str(record.status)
    return name, said, is_fault


def _answer_attributes(served: Served) -> Attributes:
    return {
        "anytime.column": served.columns_run[-1],
        "anytime.columns_run": served.columns_run,
        "anytime.stopped_by": str(served.stopped_by),
    }


def _describe_http(record: Record, said: Attributes) -> str:
    method = record.method if record.method in METHODS else "_OTHER"
    said |= {"http.request.method": method, "http.route": record.route, "url.scheme": record.scheme}
    said["url.path"] = record.path[:MAX_PATH]
    if method == "_OTHER":
        said["http.request.method_original"] = record.method
    if record.status:
        said["http.response.status_code"] = record.status
    return f"{method if method != '_OTHER' else 'HTTP'} {record.route}"


def _describe_grpc(record: Record, said: Attributes) -> str:
    said |= {"rpc.system.name": "grpc", "rpc.method": record.route}
    said["rpc.response.status_code"] = record.status
    return record.route


class _Spans(SpanProcessor):
    """Makes spans of records; in one thread.

    OpenTelemetry's tracer is handed times that are past, and gives each span back when it ends.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ids = _Ids()
        self._ended: list[ReadableSpan] = []
        provider = TracerProvider(
            sampler=ALWAYS_ON, resource=_resource(), shutdown_on_exit=False, id_generator=self._ids
        )
        provider.add_span_processor(self)
        self._tracer = provider.get_tracer("anytime", service.__version__)

    def of(self, record: Record) -> list[ReadableSpan]:
        """Its spans: the server's, and below it the parts."""
        assert record.trace is not None  # noqa: S101 - for the type checker: one that is traced has one
        # Not once for all: a server that starts before its machine knows the time would be wrong for good.
        offset_ns = time.time_ns() - _ns(self._clock())
        name, attributes, is_fault = described(record)
        self._ids.trace_id = int(record.trace.trace_id, 16)
        server = self._tracer.start_span(
            name,
            context=_parent(record.trace),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=offset_ns + _ns(record.arrived_s),
        )
        below = set_span_in_context(server, Context())
        for part in parts(record):
            span = self._tracer.start_span(
                part.name,
                context=below,
                attributes=part.attributes,
                start_time=offset_ns + _ns(part.started_s),
            )
            if part.is_failed:
                span.set_status(StatusCode.ERROR)
            span.end(offset_ns + _ns(part.ended_s))
        if is_fault:
            server.set_status(StatusCode.ERROR)
        server.end(offset_ns + _ns(record.closed_s))
        ended, self._ended = self._ended, []
        return ended

    def on_end(self, span: ReadableSpan) -> None:
        """Keep it."""
        self._ended.append(span)


class _Ids(RandomIdGenerator):
    """Names a trace that begins here as its request was named."""

    trace_id = 0

    def generate_trace_id(self) -> int:
        """That name."""
        return self.trace_id


def _parent(trace: TraceContext) -> Context:
    if not trace.parent_id:
        return Context()
    caller = SpanContext(
        int(trace.trace_id, 16),
        int(trace.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([trace.state]),
    )
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _resource() -> Resource:
    """This process, as a collector knows it; OpenTelemetry's own variables win, OTEL_SERVICE_NAME for one."""
    ours = {
        "service.name": "anytime-inference",
        "service.version": service.__version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create(ours | dict(OTELResourceDetector().detect().attributes))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
