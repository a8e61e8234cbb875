"""The HTTP contract: requests in, answers and problems out, and the truth about when the last byte left.

Must not know how an answer is scheduled or computed: it asks a model and waits.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import service
from service import openapi, page, streaming
from service.access import Access
from service.errors import (
    OUR_FAULT,
    STOPPING,
    BodyTimeout,
    CallerGone,
    Expired,
    Failed,
    Forbidden,
    HeadTooLarge,
    Malformed,
    MethodNotAllowed,
    NotFound,
    OutOfRange,
    Problem,
    QueryTooLong,
    Rejected,
    Stopped,
    TooLarge,
    Unauthorized,
    UnsupportedType,
)
from service.exchange import Exchange, Headers, Room, arrival, farewell, problem_document
from service.logs import RequestLog
from service.metrics import CONTENT_TYPE
from service.models import Asked, number, settled
from service.oip_http import EXCHANGE, RAW, OpenInference, error_document, infer_route
from service.record import Answer, Journal, Record, current, trace_context
from service.repository import Repository
from service.settings import Settings, SettingsError
from service.turns import Turns

if TYPE_CHECKING:
    from service.oip_grpc import GrpcServer
    from service.tracing import Tracer

logger = logging.getLogger(__name__)

ANSWER_HEADERS: Headers = ((b"content-type", b"application/json"),)
PREDICT_PROBLEMS = (
    *(Malformed, Unauthorized, Forbidden, BodyTimeout, TooLarge, QueryTooLong, UnsupportedType, OutOfRange),
    *(Rejected, HeadTooLarge, Failed, Stopped, Expired),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
N_KNOWN, MAX_KNOWN_BYTES = 512, 256
"""How many choices of parameters are remembered as read, and how long each may be [bytes]."""

PARAMETERS = ("budget_ms", "top_k", "min_confidence", "stream")


class Service:
    """The whole server as one ASGI application, and its outermost layer.

    Args:
        settings: All bounds.
        repository: Has the models.
        clock: Monotonic time [s].

    Raises:
        SettingsError: a file of keys cannot be used, or spans cannot be sent.
    """

    def __init__(
        self, settings: Settings, repository: Repository, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._clock = clock
        self._access = Access(settings, clock)
        self._room = Room(settings.max_bodies_bytes)
        self._n_open = 0
        self._tracer = _tracer(settings, clock)
        # The tracer first: a trace that begins here has its name then, also in the log.
        observers = [*([self._tracer.take] if self._tracer else []), RequestLog(settings).take]
        self._journal = Journal(repository.metrics, observers)
        self._known_parameters = lru_cache(N_KNOWN)(self._parameters)
        self._oip = OpenInference(settings, repository, self._room, clock)
        self._app = self._routes()
        self._answer_all: ASGIApp = self._answer_one
        if settings.cors_origins:
            self._answer_all = CORSMiddleware(
                self._answer_one,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After", "Retry-After-Ms"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await (self._answer_all if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _answer_one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Those for an answer go their own short way, everything else through FastAPI."""
        headers = dict(scope["headers"])
        record = self._record(scope, headers)
        current.set(record)  # for this task, which the server makes for each request
        exchange = Exchange(scope, receive, send, headers, record)
        if scope["path"] == "/predict":
            record.route = "/predict"
            await self.counted(exchange, self._predict)
            return
        if route := infer_route(scope["path"]):
            record.route = route
            await self.counted(exchange, self._oip.infer, error_document)
            return
        try:
            if CONTROL.search(scope["path"]):  # to Starlette /predict and a newline is /predict
                raise _nothing_at(scope["path"])
            self._let_in(exchange)
        except Problem as problem:
            await exchange.respond(*_document_for(scope["path"])(problem))
            return
        scope[EXCHANGE] = exchange

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), exchange.request_id, *farewell(scope)]
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except asyncio.CancelledError:
            if not self._repository.is_stopping:
                raise
            await self._let_go(exchange, _document_for(scope["path"]))

    def _let_in(self, exchange: Exchange) -> None:
        """Refuse whoever may not come in, before anything is read but the head.

        Raises:
            Problem: why not.
        """
        scope = exchange.scope
        address = scope["client"][0] if scope.get("client") else ""
        self._access.check(scope["path"], scope["query_string"], exchange.headers, address)

    def _record(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Record:
        arrived_s, has_waited = arrival(scope, self._clock())
        return Record(
            self._journal.name(headers.get(b"x-request-id")),
            arrived_s - self._settings.network_ms / 1e3,
            scope["method"],
            scope["path"],
            scope.get("scheme", "http"),
            trace_context(scope["headers"]) if b"traceparent" in headers else None,
            has_waited,
        )

    def grpc_server(self, turns: Turns) -> "GrpcServer | None":
        """What answers over gRPC beside this application; None if the setting `grpc_port` is empty.

        Args:
            turns: Of the event loop that both are served in.
        """
        if self._settings.grpc_port is None:
            return None
        from service.oip_grpc import GrpcServer  # noqa: PLC0415 - see there what importing it costs

        return GrpcServer(
            self._settings, self._repository, self._access, self._room, self._journal, turns, self._clock
        )

    @property
    def broken(self) -> str:
        """Why this process cannot go on; empty as long as it can."""
        return self._repository.broken

    def announce_stop(self) -> None:
        """Say at once that this server is not ready, but go on answering; signal handlers may call it."""
        self._repository.announce_stop()

    @property
    def is_running(self) -> bool:
        """Whether a column is being run, even if nobody waits for it any more."""
        return self._repository.is_running

    async def drain(self) -> None:
        """Take no more requests and settle those that are here, bounded by the setting `drain_timeout_s`."""
        await self._repository.drain()

    async def counted(
        self,
        exchange: Exchange,
        answer: Callable[[Exchange], Awaitable[None]],
        document: Callable[[Problem], tuple[int, Headers, bytes]] = problem_document,
    ) -> None:
        """Have a request for an answer served, and count how it ended once its last byte is written.

        Args:
            exchange: The request.
            answer: Answers it, or raises a `Problem`.
            document: What a problem looks like to this caller.
        """
        record = exchange.record
        self._n_open += 1
        try:
            self._let_in(exchange)
            record.is_let_in = True
            self._check_room()
            await answer(exchange)
        except CallerGone:
            pass  # which is what a record says as long as it says nothing else
        except Problem as problem:
            record.refuse(problem)
            await exchange.respond(*document(problem))
        except asyncio.CancelledError:
            if not self._repository.is_stopping:  # other servers than ours cancel when the caller has gone
                raise
            await self._let_go(exchange, document)
        except Exception:  # a fault of ours must not cost the caller the answer that there is none
            logger.exception("A request failed.")
            failed = Failed(OUR_FAULT)
            record.refuse(failed)
            if record.status:  # half an answer: only a broken connection says so
                raise
            await exchange.respond(*document(failed))
        finally:
            self._n_open -= 1
            self._room.give_back(exchange.n_taken_bytes)
            self._journal.close(record, self._clock())

    async def _let_go(
        self, exchange: Exchange, document: Callable[[Problem], tuple[int, Headers, bytes]]
    ) -> None:
        """Turn away a request whose task was cancelled, as are those that are left when draining ends."""
        exchange.record.answer, exchange.record.outcome = None, "stopped"
        if not exchange.record.status:
            await exchange.respond(*document(Stopped(STOPPING)))

    def _check_room(self) -> None:
        """Before anything is read: each open request may hold a whole body."""
        if self._n_open > self._settings.max_open_requests:
            why = f"{self._n_open - 1} requests are open: retry later."
            raise self._repository.model().engine.refusal(why, "load")

    async def _predict(self, exchange: Exchange) -> None:
        """Answer a request to /predict.

        Without FastAPI's routing, dependencies and response classes: they take as long as a shallow column.

        Raises:
            Problem: there is no answer.
            CallerGone: nobody waits for it.
        """
        method = exchange.scope["method"]
        if method != "POST":
            raise MethodNotAllowed(f"/predict takes POST, not {method}.", "POST")
        model = self._repository.model()
        query, headers = exchange.scope["query_string"], exchange.headers
        budget, accept = headers.get(b"x-budget-ms"), headers.get(b"accept", b"")
        is_short = len(query) + len(budget or b"") + len(accept) <= MAX_KNOWN_BYTES
        # Most callers say the same all the time.
        read = self._known_parameters if is_short else self._parameters
        asked, stream = read(query, budget, accept, len(model.manifest.labels))
        record = exchange.record
        record.budget_s = asked.budget_s
        deadline_s = record.arrived_s + asked.budget_s
        body = await exchange.body(self._settings, self._clock, deadline_s, model.engine.refusal, self._room)
        model = self._repository.model()  # another one may have taken its place while the body came
        with model.inside(record):
            model.engine.check_admission(record.arrived_s, deadline_s, has_waited=record.has_waited)
            content_type = exchange.headers.get(b"content-type", b"").decode("latin-1")
            image_HWC, decode_s = await model.decode(content_type, body, deadline_s, record)
            if stream:
                served = await streaming.answer(
                    exchange, model, image_HWC, decode_s, asked, stream, self._clock
                )
            else:
                request = model.enter(image_HWC, asked, record)
                leave = partial(model.engine.leave, request)
                try:
                    with exchange.called_when_gone(leave):
                        served = await settled(request)
                except BaseException:
                    leave()
                    raise
                answer = Answer(served, decode_s)
                document, _ = model.document(answer, asked)
                await exchange.respond(200, ANSWER_HEADERS, document)
                record.answer = answer
            model.engine.observe_way_out(self._clock() - served.settled_s)

    def _parameters(
        self, query: bytes, budget: bytes | None, accept: bytes, n_labels: int
    ) -> tuple[Asked, streaming.Format | None]:
        """Read the query by hand: it is on every request's path, and each refusal names the bounds."""
        settings = self._settings
        asked: dict[str, str] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name not in PARAMETERS:
                raise OutOfRange(f"Unknown parameter {name[:40]!r}: use {', '.join(PARAMETERS)}.")
            if name in asked:
                raise OutOfRange(f"{name} is given twice: give it once.")
            asked[name] = value
        if "budget_ms" not in asked and budget is not None:
            asked["budget_ms"] = budget.decode("latin-1")
        budget_ms = settings.default_budget_ms
        if "budget_ms" in asked:
            budget_ms = number(
                "budget_ms", asked["budget_ms"], settings.min_budget_ms, settings.max_budget_ms
            )
        top_k = 1.0
        if "top_k" in asked:
            top_k = number("top_k", asked["top_k"], 1, n_labels)
            if not top_k.is_integer():
                raise OutOfRange("top_k must be a whole number.")
        min_confidence = None
        if "min_confidence" in asked:
            min_confidence = number("min_confidence", asked["min_confidence"], 0, 1)
        stream = streaming.chosen(asked.get("stream"), accept)
        return Asked(budget_ms / 1e3, int(top_k), min_confidence), stream

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        sending = self._tracer.sending() if self._tracer else contextlib.nullcontext()
        async with sending, self._repository.serving():  # requests are settled before the last spans are sent
            yield

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="Anytime inference",
            version=service.__version__,
            description="The best answer about an image that can be had within the caller's time budget.",
            lifespan=self._lifespan,
            docs_url=None,  # FastAPI's have their scripts from elsewhere, beside the administrator's requests
            redoc_url=None,
            # FastAPI's own would send queries and exceptions, if only the environment said so.
            telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
            exception_handlers={
                Problem: _on_problem,
                HTTPException: _on_http_exception,
                Exception: _on_fault,
            },
        )
        app.post(
            "/predict",
            name="predict",
            openapi_extra=openapi.predict_operation(self._settings),
            responses=openapi.prediction() | openapi.problems(*PREDICT_PROBLEMS),
            dependencies=openapi.KEYS,
            **RAW,
        )(_documented_predict)
        status = partial(openapi.answer, "It is", openapi.STATUS_SCHEMA)
        card = openapi.answer("What it is, what it is worth, and how fast it is here", openapi.MODEL_SCHEMA)
        text = openapi.answer("As Prometheus reads it", {"type": "string"}, "text/plain")
        app.get("/model", name="model", responses=card | openapi.problems(Stopped), **RAW)(self._model)
        app.get("/healthz/live", name="live", responses=status(), **RAW)(self._live)
        app.get("/healthz/ready", name="ready", responses=status() | openapi.problems(Stopped), **RAW)(
            self._ready
        )
        app.get("/metrics", name="metrics", responses=text, **RAW)(self._scrape)
        app.include_router(self._oip.router())
        app.router.routes.extend(page.routes())
        return app

    async def _model(self) -> Response:
        """Describe what is being served."""
        return Response(self._repository.model().card, media_type="application/json")

    async def _live(self) -> Response:
        """Answer as long as the event loop turns."""
        return Response(b'{"status":"live"}', media_type="application/json")

    async def _ready(self) -> Response:
        """Say whether requests are taken."""
        if not self._repository.is_ready:
            raise Stopped("This server is starting or stopping: send requests to another one.")
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def _scrape(self) -> Response:
        """Give all metrics."""
        text = await self._repository.metrics.exposition()
        return Response(text, headers={"content-type": CONTENT_TYPE})


def _tracer(settings: Settings, clock: Callable[[], float]) -> "Tracer | None":
    """What sends spans; None if the setting `traces_endpoint` is empty.

    Raises:
        SettingsError: it cannot.
    """
    if not settings.traces_endpoint:
        return None
    try:
        from service.tracing import Tracer  # noqa: PLC0415 - 10 MB and 0.2 s, and an extra that few install
    except ImportError as error:
        raise SettingsError(
            "ANYTIME_TRACES_ENDPOINT: spans are sent by OpenTelemetry's SDK, which is not installed "
            f"({error.name}): install the extra `tracing`, or leave the setting out."
        ) from error
    return Tracer(settings, clock)


def _document_for(path: str) -> Callable[[Problem], tuple[int, Headers, bytes]]:
    """What a problem looks like to those who call this path."""
    return error_document if path == "/v2" or path.startswith("/v2/") else problem_document


async def _on_problem(request: Request, problem: Problem) -> Response:
    status, headers, body = _document_for(request.url.path)(problem)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What the router refuses by itself."""
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return await _on_problem(request, _nothing_at(path))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return await _on_problem(request, MethodNotAllowed(f"{path} takes {allowed}, not {method}.", allowed))
    return await _on_problem(request, Malformed(f"{error.detail}: /docs says what a request looks like."))


def _nothing_at(path: str) -> NotFound:
    return NotFound(f"There is nothing at {path}: /docs lists what there is.")


async def _on_fault(request: Request, _: Exception) -> Response:
    """A fault of ours; the server logs it with its stack."""
    return await _on_problem(request, Failed(OUR_FAULT))


async def _documented_predict() -> Response:
    """Classify an image as well as the budget allows.

    The budget is wall time inside the server, from the arrival of the request to the last byte of the answer.
    """
    raise AssertionError("requests to /predict never come this way; this is here for /docs")
