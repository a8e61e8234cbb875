"""The HTTP contract: requests in, answers and problems out, and the truth about when the last byte left.

Must not know how an answer is scheduled or computed: it asks the engine and waits.
"""

import asyncio
import contextlib
import gc
import logging
import math
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

import service
from service import openapi
from service.decoding import Decoder
from service.engine import Cancellable, Engine, InferenceThread, Served
from service.errors import (
    BodyTimeout,
    Expired,
    Failed,
    Malformed,
    MethodNotAllowed,
    NotFound,
    Outcome,
    OutOfRange,
    Problem,
    Rejected,
    Stopped,
    TooLarge,
    UnsupportedType,
)
from service.inference import Inference
from service.latency import LatencyProfile, LiveProfile, Reserve
from service.metrics import CONTENT_TYPE, Metrics
from service.policies import named
from service.protocol import CONNECTION, RECEIVED_S, StampedProtocol
from service.settings import Settings

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]
ANSWER_HEADERS: Headers = ((b"content-type", b"application/json"),)
PROBLEM_HEADER = (b"content-type", b"application/problem+json")
OUR_FAULT = "The server failed on this request: tell the operator if it persists."
PREDICT_PROBLEMS = (
    *(Malformed, BodyTimeout, TooLarge, UnsupportedType, OutOfRange),
    *(Rejected, Failed, Stopped, Expired),
)
SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
OUTCOME_BY_STATUS: Mapping[int, Outcome] = {kind.status: kind.outcome for kind in Problem.__subclasses__()}
CLIENT_GONE = 499
"""Never sent: marks the end of an exchange whose caller has gone (nginx's word for it)."""


@dataclass(slots=True)
class Exchange:
    """One HTTP request as the outermost layer sees it; the endpoint adds what it learns."""

    arrived_s: float
    served: Served | None = None
    status: int = CLIENT_GONE
    ended_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a caller of /predict may choose."""

    budget_s: float
    top_k: int
    min_confidence: float | None


class CallerGone(Exception):
    """The connection was closed before the answer was there."""


class Service:
    """The whole server as one ASGI application, and its outermost layer.

    Args:
        settings: All bounds and reserves.
        inference: Loaded and warmed up.
        processor: The one thread that runs it; closed with the application.
        profile: Latencies measured in that thread; where predictions start.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        settings: Settings,
        inference: Inference,
        processor: InferenceThread,
        profile: LatencyProfile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._inference = inference
        self._processor = processor
        self._profile = LiveProfile(profile, settings.profile_quantile)
        self._clock = clock
        self._engine: Engine | None = None
        self._n_open = 0
        self._n_requests = 0
        self._id_prefix = secrets.token_hex(8).encode()
        manifest = inference.manifest
        self._decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._decoder = Decoder(
            height=manifest.input.height,
            width=manifest.input.width,
            max_pixels=settings.max_pixels,
            threads=self._decode_threads,
        )
        self._metrics = Metrics(
            columns=[rung.column for rung in manifest.rungs],
            batch_sizes=profile.batch_sizes,
            n_waiting=lambda: self._engine.n_waiting if self._engine else 0,
            slowdown=lambda: self._profile.slowdown,
            reserve_s=lambda: self._engine.reserve_s if self._engine else 0.0,
            build={
                "version": service.__version__,
                "artifact": f"{manifest.name}@{manifest.version}",
                "artifact_sha256": inference.sha256,
                "provider": inference.provider,
            },
        )
        self._model_card = orjson.dumps(_model_card(settings, inference, profile))
        self._app = self._routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; those to /predict go their own short way, everything else through FastAPI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        if scope["path"] == "/predict":
            await self._predict(scope, receive, send, request_id)
            return

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), request_id]
            await send(message)

        await self._app(scope, receive, send_named)

    def _request_id(self, scope: Scope) -> tuple[bytes, bytes]:
        """The header that names this request: the caller's own name for it, if that is a sane one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and SANE_REQUEST_ID.fullmatch(value):
                return name, value
        self._n_requests += 1
        return b"x-request-id", b"%b%016x" % (self._id_prefix, self._n_requests)

    async def _predict(
        self, scope: Scope, receive: Receive, send: Send, request_id: tuple[bytes, bytes]
    ) -> None:
        """Serve one request to /predict, and count how it ended once its last byte is written.

        Without FastAPI's routing, dependencies and response classes: they take as long as a shallow column.
        """
        exchange = Exchange(self._arrived_s(scope))
        self._n_open += 1
        try:
            response = await self._respond(scope, receive, exchange)
            if response is not None:
                status, headers, body = response
                length = (b"content-length", b"%d" % len(body))
                await send(
                    {
                        "type": "http.response.start",
                        "status": status,
                        "headers": [*headers, length, request_id],
                    }
                )
                exchange.status = status
                await send({"type": "http.response.body", "body": body})
                exchange.ended_s = self._clock()
        finally:
            self._n_open -= 1
            self._count(exchange)

    def _arrived_s(self, scope: Scope) -> float:
        """When the request came, as far as that can be known.

        It was read when the event loop came round to it. Before, it may have lain in the socket for as long
        as the loop's turn before that lasted, which is taken to be as long as this one's.
        """
        now_s = self._clock()
        received_s: float = scope.get(RECEIVED_S, now_s)
        return received_s - (now_s - received_s)

    async def _respond(
        self, scope: Scope, receive: Receive, exchange: Exchange
    ) -> tuple[int, Headers, bytes] | None:
        """Status, headers and body; None when nobody is there to read them."""
        try:
            return 200, ANSWER_HEADERS, await self._answer(scope, receive, exchange)
        except CallerGone:
            return None
        except Problem as problem:
            return _problem(problem)
        except Exception:  # a fault of ours must not cost the caller the answer that there is none
            logger.exception("A request failed.")
            return _problem(Failed(OUR_FAULT))

    async def drain(self) -> None:
        """Take no more requests and settle those that are here, bounded by the setting `drain_timeout_s`."""
        if self._engine:
            await self._engine.stop(self._settings.drain_timeout_s)

    def _count(self, exchange: Exchange) -> None:
        served = exchange.served
        if exchange.status == 200 and served and served.stopped_by:
            if self._engine and exchange.ended_s < math.inf:
                self._engine.observe_way_out(exchange.ended_s - served.settled_s)
            self._metrics.count_answer(
                outcome="answered" if exchange.ended_s <= served.deadline_s else "late",
                column=served.columns_run[-1],
                stopped_by=served.stopped_by,
                latency_s=exchange.ended_s - served.arrived_s,
                budget_s=served.deadline_s - served.arrived_s,
            )
        elif exchange.status == CLIENT_GONE:
            self._metrics.count_request("disconnected")
        else:
            self._metrics.count_request(OUTCOME_BY_STATUS.get(exchange.status, "failed"))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def call_at(when_s: float, callback: Callable[[], None]) -> Cancellable:
            return loop.call_later(max(0.0, when_s - self._clock()), callback)

        self._engine = Engine(
            self._processor,
            named(self._settings.policy, self._settings.answer_worth),
            self._profile,
            self._inference.manifest.ladder(),
            clock=self._clock,
            call_at=call_at,
            call_soon=loop.call_soon,
            observe_run=self._metrics.observe_run,
            observe_saved=self._metrics.observe_saved,
            reserve=Reserve(
                self._settings.overhead_reserve_ms / 1e3,
                least_s=self._settings.write_reserve_ms / 1e3,
                most_s=self._settings.max_overhead_reserve_ms / 1e3,
            ),
            brief_s=self._settings.brief_run_ms / 1e3 if self._inference.provider == "cpu" else 0.0,
            max_waiting=self._settings.max_waiting,
            jitter=lambda: random.uniform(1.0, 1.5),  # noqa: S311 - spreads callers, guards nothing
        )
        # What lives now lives for good: a full collection that looks at it again stalls requests for 100 ms
        # and more.
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            await self.drain()
            gc.unfreeze()
            self._processor.close()
            self._decode_threads.shutdown(wait=False, cancel_futures=True)

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="Anytime inference",
            version=service.__version__,
            description="The best answer about an image that can be had within the caller's time budget.",
            lifespan=self._lifespan,
            redoc_url=None,
            exception_handlers={
                Problem: _on_problem,
                HTTPException: _on_http_exception,
                Exception: _on_fault,
            },
        )
        raw: dict[str, Any] = {"response_class": Response, "response_model": None}
        app.post(
            "/predict",
            name="predict",
            openapi_extra=openapi.predict_operation(self._settings),
            responses=openapi.prediction() | openapi.problems(*PREDICT_PROBLEMS),
            **raw,
        )(_documented_predict)
        app.get("/model", name="model", **raw)(self._model)
        app.get("/healthz/live", name="live", **raw)(self._live)
        app.get("/healthz/ready", name="ready", responses=openapi.problems(Stopped), **raw)(self._ready)
        app.get("/metrics", name="metrics", **raw)(self._scrape)
        app.get("/", include_in_schema=False)(_to_docs)
        return app

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> bytes:
        """The body of the answer.

        Raises:
            Problem: there is none.
            CallerGone: nobody waits for it.
        """
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"/predict takes POST, not {scope['method']}.", "POST")
        if self._engine is None:
            raise Stopped("This server is not ready: retry in a second.")
        if self._n_open > self._settings.max_open_requests:
            # Before anything is read: each open request may hold a whole body.
            raise self._engine.refusal(f"{self._n_open - 1} requests are open: retry later.")
        headers = dict(scope["headers"])
        parameters = self._parameters(scope["query_string"], headers)
        deadline_s = exchange.arrived_s + parameters.budget_s
        body = await self._body(headers, receive, self._engine, deadline_s)
        self._engine.check_admission(exchange.arrived_s, deadline_s)
        started_s = self._clock()
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        image_HWC = self._decoder.decode_raw(content_type, body)
        if image_HWC is None:
            try:
                async with asyncio.timeout(deadline_s - started_s):
                    image_HWC = await self._decoder.decode(content_type, body)
            except TimeoutError as error:
                raise self._engine.refusal(
                    "The budget was used up while the picture was decoded: grant more or send a smaller one."
                ) from error
        decode_s = self._clock() - started_s
        submitted = self._engine.submit(
            image_HWC,
            arrived_s=exchange.arrived_s,
            deadline_s=deadline_s,
            min_confidence=parameters.min_confidence,
        )
        leave = partial(self._engine.leave, submitted)
        with _called_when_gone(scope, receive, leave):
            try:
                served = await submitted.settled
            finally:
                leave()
        exchange.served = served
        if served.outcome == "answered":
            return self._prediction(served, parameters, decode_s)
        raise _why_unanswered(served)

    def _prediction(self, served: Served, parameters: Parameters, decode_s: float) -> bytes:
        assert served.probabilities_K is not None  # noqa: S101 - for the type checker: an answer has them
        manifest = self._inference.manifest
        probabilities: list[float] = served.probabilities_K.tolist()
        order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[: parameters.top_k]
        top = [{"label": manifest.labels[i], "index": i, "probability": probabilities[i]} for i in order]
        answer = orjson.dumps(
            {
                "model": manifest.name,
                "version": manifest.version,
                "label": top[0]["label"],
                "index": top[0]["index"],
                "confidence": top[0]["probability"],
                "top": top,
                "column": served.columns_run[-1],
                "depth": self._inference.depth[served.columns_run[-1]],
                "columns_run": served.columns_run,
                "stopped_by": served.stopped_by,
                "budget_ms": _milliseconds(parameters.budget_s),
                "timing_ms": {
                    "decode": _milliseconds(decode_s),
                    "queue": _milliseconds(served.queue_s),
                    "inference": _milliseconds(served.inference_s),
                },
            }
        )
        # Decided last: with a large top_k the lines above may cost more than the whole reserve.
        now_s = self._clock()
        verdict = orjson.dumps(
            {
                "elapsed_ms": _milliseconds(now_s - served.arrived_s),
                "deadline_met": now_s + self._settings.write_reserve_ms / 1e3 <= served.deadline_s,
            }
        )
        return answer[:-1] + b"," + verdict[1:]

    def _parameters(self, query: bytes, headers: Mapping[bytes, bytes]) -> Parameters:
        """Read the query by hand: it is on every request's path, and each refusal names the bounds."""
        settings = self._settings
        asked: dict[str, str] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name not in {"budget_ms", "top_k", "min_confidence"}:
                raise OutOfRange(f"Unknown parameter {name!r}: use budget_ms, top_k or min_confidence.")
            if name in asked:
                raise OutOfRange(f"{name} is given twice: give it once.")
            asked[name] = value
        if "budget_ms" not in asked and (header := headers.get(b"x-budget-ms")) is not None:
            asked["budget_ms"] = header.decode("latin-1")
        budget_ms = settings.default_budget_ms
        if "budget_ms" in asked:
            budget_ms = _number(
                "budget_ms", asked["budget_ms"], settings.min_budget_ms, settings.max_budget_ms
            )
        top_k = 1.0
        if "top_k" in asked:
            top_k = _number("top_k", asked["top_k"], 1, len(self._inference.manifest.labels))
            if not top_k.is_integer():
                raise OutOfRange("top_k must be a whole number.")
        min_confidence = None
        if "min_confidence" in asked:
            min_confidence = _number("min_confidence", asked["min_confidence"], 0, 1)
        return Parameters(budget_ms / 1e3, int(top_k), min_confidence)

    async def _body(
        self, headers: Mapping[bytes, bytes], receive: Receive, engine: Engine, deadline_s: float
    ) -> bytes:
        """Read the body within its bounds; one that is slower than the budget is refused when that ends."""
        limit = self._settings.max_body_bytes
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        timeout_s, left_s = self._settings.body_timeout_s, deadline_s - self._clock()
        body = bytearray()
        try:
            async with asyncio.timeout(min(left_s, timeout_s)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CallerGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            if left_s <= timeout_s:
                raise engine.refusal(
                    "The budget was used up before the picture was here: grant more or send it faster."
                ) from error
            raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s: send it faster.") from error

    async def _model(self) -> Response:
        """Describe what is being served."""
        return Response(self._model_card, media_type="application/json")

    async def _live(self) -> Response:
        """Answer as long as the event loop turns."""
        return Response(b'{"status":"live"}', media_type="application/json")

    async def _ready(self) -> Response:
        """Say whether requests are taken."""
        if self._engine is None or self._engine.is_stopping:
            raise Stopped("This server is starting or stopping: send requests to another one.")
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def _scrape(self) -> Response:
        """Give all metrics."""
        return Response(self._metrics.exposition(), headers={"content-type": CONTENT_TYPE})


@contextlib.contextmanager
def _called_when_gone(scope: Scope, receive: Receive, leave: Callable[[], None]) -> Iterator[None]:
    """Call when the connection is lost.

    Any server says so to a task that waits for it; our own protocol does without one.
    """
    connection: StampedProtocol | None = scope.get(CONNECTION)
    if connection is None:
        watcher = asyncio.create_task(_leave_when_gone(receive, leave))
        try:
            yield
        finally:
            watcher.cancel()
        return
    if connection.is_lost:
        leave()
    connection.on_lost.add(leave)
    try:
        yield
    finally:
        connection.on_lost.discard(leave)


async def _leave_when_gone(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


def _why_unanswered(served: Served) -> Exception:
    match served.outcome:
        case "expired":
            return Expired(
                "The deadline passed while the request waited: grant a larger budget or retry later."
            )
        case "stopped":
            return Stopped("This server is stopping: send the request again, another one will take it.")
        case "disconnected":
            return CallerGone()
        case _:
            return Failed(
                "The network could not be run on this picture: retry, and tell the operator if it persists."
            )


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body has more than {limit} bytes: send a smaller picture.")


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _number(name: str, text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise OutOfRange(f"{name} must be a number from {least:g} to {most:g}, not {text[:40]!r}.")
    return value


def _problem(problem: Problem) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a problem document."""
    document = {
        "type": problem.type,
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    headers = [(name.encode(), value.encode()) for name, value in problem.headers.items()]
    return problem.status, [PROBLEM_HEADER, *headers], orjson.dumps(document)


async def _on_problem(_: Request, problem: Problem) -> Response:
    status, headers, body = _problem(problem)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What the router refuses by itself."""
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return await _on_problem(request, NotFound(f"There is nothing at {path}: /docs lists what there is."))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return await _on_problem(request, MethodNotAllowed(f"{path} takes {allowed}, not {method}.", allowed))
    return await _on_problem(request, Malformed(f"{error.detail}: /docs says what a request looks like."))


async def _on_fault(request: Request, _: Exception) -> Response:
    """A fault of ours; the server logs it with its stack."""
    return await _on_problem(request, Failed(OUR_FAULT))


async def _documented_predict() -> Response:
    """Classify an image as well as the budget allows.

    The budget is wall time inside the server, from the arrival of the request to the last byte of the answer.
    """
    raise AssertionError("requests to /predict never come this way; this is here for /docs")


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


def _model_card(settings: Settings, inference: Inference, profile: LatencyProfile) -> dict[str, Any]:
    manifest = inference.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "sha256": inference.sha256,
        "source": manifest.source,
        "labels": manifest.labels,
        "input": manifest.input.model_dump(),
        "rungs": [rung.model_dump(exclude={"file", "sha256"}) for rung in manifest.rungs],
        "combinations": [{"columns": c.columns, "accuracy": c.accuracy} for c in manifest.combinations],
        "provider": inference.provider,
        "latency_ms": {
            column: {
                str(size): {"median": _milliseconds(latency.median_s), "high": _milliseconds(latency.high_s)}
                for size, latency in by_size.items()
            }
            for column, by_size in profile.items()
        },
        "budget_ms": {
            "default": settings.default_budget_ms,
            "min": settings.min_budget_ms,
            "max": settings.max_budget_ms,
            "reserve": settings.overhead_reserve_ms,
        },
    }
