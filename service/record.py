"""One record of a request's life, from its arrival to its last byte; and who is told of it at the end.

Must not know of HTTP or gRPC, nor what becomes of a record. It is filled in on the way and costs a request a
microsecond; metrics, logs and spans are made of it when the answer has left.
"""

import math
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from service.engine import Request, Served
from service.errors import Outcome, Problem, Reason
from service.metrics import Metrics

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MAX_TRACESTATE_BYTES = 512
"""A longer one is not handed on. Source: https://www.w3.org/TR/trace-context-2/#tracestate-limits"""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The trace that a request belongs to.

    Args:
        trace_id: 32 hexadecimal digits.
        parent_id: The caller's span, 16 hexadecimal digits; empty if the trace begins here.
        is_sampled: Whether the spans of this trace are recorded.
        state: What systems of others noted, to be handed on with the spans.
    """

    trace_id: str
    parent_id: str = ""
    is_sampled: bool = True
    state: str = ""


def trace_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """What the headers `traceparent` and `tracestate` say; None if there is none, or it is malformed.

    Source: https://www.w3.org/TR/trace-context-2/
    """
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    found = TRACEPARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if not found:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more) or not (int(trace_id, 16) and int(parent_id, 16)):
        return None
    state = b",".join(states)
    return TraceContext(
        trace_id.decode(),
        parent_id.decode(),
        bool(int(flags, 16) & 1),
        state.decode("latin-1") if len(state) <= MAX_TRACESTATE_BYTES else "",
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one picture, and how long it took to decode it [s]."""

    served: Served
    decode_s: float


def together(answers: Sequence[Answer]) -> Answer:
    """One record of a request with several pictures: the last one's, with the mean accuracy of all."""
    last = max((answer.served for answer in answers), key=lambda served: served.settled_s)
    accuracy = sum(answer.served.accuracy for answer in answers) / len(answers)
    return Answer(replace(last, accuracy=accuracy), sum(answer.decode_s for answer in answers))


@dataclass(slots=True)
class Record:
    """A request and what is learnt of it; all times are on the server's monotonic clock [s].

    Args:
        request_id: Names it in its response, in the log and in its trace.
        arrived_s: When it came.
        method: HTTP's; empty for a call over gRPC.
        path: As it was asked for.
        scheme: http or https.
        trace: The trace that its caller says it belongs to.
        has_waited: The event loop was at work for others when it came.
    """

    request_id: str
    arrived_s: float
    method: str = ""
    path: str = ""
    scheme: str = ""
    trace: TraceContext | None = None
    has_waited: bool = False
    route: str = ""
    """What was asked for, of a closed set: the path with names left open, or the gRPC method."""
    is_let_in: bool = False
    model: str = ""
    version: str = ""
    budget_s: float = 0.0
    n_body_bytes: int = 0
    """As they came, before any compression is undone."""
    body_ended_s: float = 0.0
    """When the body was here, or was no longer waited for; 0 if it never was."""
    decodings: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each picture's."""
    requests: list[Request] = field(default_factory=list)
    """The engine's, one a picture. At the end `pictures` take their place: images need not live longer."""
    pictures: tuple[Served, ...] = ()
    answer: Answer | None = None
    outcome: Outcome = "disconnected"
    """Of a request with an answer it is known at the end."""
    reason: Reason | None = None
    status: int | str = 0
    """HTTP's, or the name of gRPC's; 0 if nothing was sent."""
    ended_s: float = math.inf
    """When the last byte of the answer left; of a stream, of its last answer."""
    closed_s: float = math.inf
    """When nothing was left to do."""

    def refuse(self, problem: Problem) -> None:
        """There is no answer. The problem is not kept: it would keep its frames, and a body with them."""
        self.answer, self.outcome, self.reason = None, problem.outcome, problem.reason


current: ContextVar[Record | None] = ContextVar("current", default=None)
"""The request that the running code works for, if it works for one."""


class Journal:
    """Names requests, and takes down how those for an answer ended.

    Args:
        metrics: Count them all.
        observers: Told of each, when its last byte has left; must not block.
    """

    def __init__(self, metrics: Metrics, observers: Sequence[Callable[[Record], None]] = ()) -> None:
        self._metrics = metrics
        self._observers = observers
        self._prefix = secrets.token_hex(8)
        self._n_requests = 0

    def name(self, asked: bytes | None) -> str:
        """A request's id: its caller's own name for it, if that is a sane one."""
        if asked is not None and SANE_REQUEST_ID.fullmatch(asked):
            return asked.decode()
        self._n_requests += 1
        return f"{self._prefix}{self._n_requests:016x}"

    def close(self, record: Record, now_s: float) -> None:
        """Take down how a request for an answer ended: with its `answer`, or else with its `outcome`."""
        settled = [request.settled for request in record.requests]
        record.pictures = tuple([one.result() for one in settled if one.done() and not one.cancelled()])
        record.requests.clear()
        record.ended_s, record.closed_s = min(record.ended_s, now_s), now_s
        if record.answer:
            self._count_answer(record, record.answer)
        else:
            self._metrics.count_request(record.outcome, record.reason)
        for tell in self._observers:
            tell(record)

    def _count_answer(self, record: Record, answer: Answer) -> None:
        served, ended_s = answer.served, record.ended_s
        assert served.stopped_by is not None  # noqa: S101 - for the type checker: an answer has it
        record.outcome = "answered" if ended_s <= served.deadline_s else "late"
        self._metrics.count_answer(
            outcome=record.outcome,
            column=served.columns_run[-1],
            stopped_by=served.stopped_by,
            accuracy=served.accuracy,
            latency_s=ended_s - served.arrived_s,
            budget_s=served.deadline_s - served.arrived_s,
            decode_s=answer.decode_s,
            queue_s=served.queue_s,
            inference_s=served.inference_s,
            way_out_s=max(0.0, ended_s - served.settled_s),
        )
