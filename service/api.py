"""The HTTP contract: requests in, answers and problems out, and the truth about when the last byte left.

Must not know how an answer is scheduled or computed: it asks the engine and waits.
"""

import asyncio
import contextlib
import gc
import math
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import service
from service import openapi
from service.decoding import Decoder
from service.engine import Cancellable, Engine, InferenceThread, Served
from service.engine import Request as Submitted
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
from service.metrics import CONTENT_TYPE, Metrics
from service.scheduling import LatencyProfile
from service.settings import Settings

EXCHANGE = "anytime.exchange"
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
        thread: The one thread that runs it; shut down with the application.
        profile: Latencies measured in that thread.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        settings: Settings,
        inference: Inference,
        thread: ThreadPoolExecutor,
        profile: LatencyProfile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._inference = inference
        self._thread = thread
        self._profile = profile
        self._clock = clock
        self._engine: Engine | None = None
        self._n_open = 0
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
        """Serve one request: stamp its arrival before anything is read and its end after the last byte."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(self._clock())
        scope[EXCHANGE] = exchange
        asked_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = asked_id if SANE_REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex.encode()

        async def send_stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                exchange.ended_s = self._clock()

        if scope["path"] != "/predict":
            await self._app(scope, receive, send_stamped)
            return
        self._n_open += 1
        try:
            await self._app_or_refusal()(scope, receive, send_stamped)
        finally:
            self._n_open -= 1
            self._count(exchange)

    def _app_or_refusal(self) -> ASGIApp:
        """Bound what is open at once before anything is read: each open request may hold a whole body."""
        if self._engine is None or self._n_open <= self._settings.max_open_requests:
            return self._app
        return _problem(self._engine.refusal(f"{self._n_open - 1} requests are open: retry later."))

    async def drain(self) -> None:
        """Take no more requests and settle those that are here, bounded by the setting `drain_timeout_s`."""
        if self._engine:
            await self._engine.stop(self._settings.drain_timeout_s)

    def _count(self, exchange: Exchange) -> None:
        served = exchange.served
        if exchange.status == 200 and served and served.stopped_by:
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
            InferenceThread(self._inference, self._thread),
            self._profile,
            self._inference.manifest.ladder(),
            clock=self._clock,
            call_at=call_at,
            observe_run=self._metrics.observe_run,
            reserve_s=self._settings.overhead_reserve_ms / 1e3,
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
            self._thread.shutdown(wait=False, cancel_futures=True)
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
        )(self._predict)
        app.get("/model", name="model", **raw)(self._model)
        app.get("/healthz/live", name="live", **raw)(self._live)
        app.get("/healthz/ready", name="ready", responses=openapi.problems(Stopped), **raw)(self._ready)
        app.get("/metrics", name="metrics", **raw)(self._scrape)
        app.get("/", include_in_schema=False)(_to_docs)
        return app

    async def _predict(self, request: Request) -> Response:
        """Classify an image as well as the budget allows.

        The budget is wall time inside the server, from the arrival of the request to the last byte of the
        answer.
        """
        exchange: Exchange = request.scope[EXCHANGE]
        try:
            return await self._answer(request, exchange)
        except CallerGone:
            return Response(status_code=CLIENT_GONE)

    async def _answer(self, request: Request, exchange: Exchange) -> Response:
        if self._engine is None:
            raise Stopped("This server is not ready: retry in a second.")
        parameters = self._parameters(request)
        deadline_s = exchange.arrived_s + parameters.budget_s
        body = await self._body(request, self._engine, deadline_s)
        self._engine.check_admission(exchange.arrived_s, deadline_s)
        started_s = self._clock()
        try:
            async with asyncio.timeout(deadline_s - started_s):
                image_HWC = await self._decoder.decode(request.headers.get("content-type", ""), body)
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
        watcher = asyncio.create_task(_leave_when_gone(request.receive, self._engine, submitted))
        try:
            served = await submitted.settled
        finally:
            watcher.cancel()
            self._engine.leave(submitted)
        exchange.served = served
        if served.outcome == "answered":
            return self._prediction(served, parameters, decode_s)
        raise _why_unanswered(served)

    def _prediction(self, served: Served, parameters: Parameters, decode_s: float) -> Response:
        assert served.probabilities_K is not None  # noqa: S101 - for the type checker: an answer has them
        manifest = self._inference.manifest
        order = np.argsort(-served.probabilities_K, kind="stable")[: parameters.top_k].tolist()
        top = [
            {"label": manifest.labels[i], "index": i, "probability": float(served.probabilities_K[i])}
            for i in order
        ]
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
        return Response(answer[:-1] + b"," + verdict[1:], media_type="application/json")

    def _parameters(self, request: Request) -> Parameters:
        """Read the query by hand: it is on every request's path, and each refusal names the bounds."""
        settings = self._settings
        asked: dict[str, str] = {}
        for name, value in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True):
            if name not in {"budget_ms", "top_k", "min_confidence"}:
                raise OutOfRange(f"Unknown parameter {name!r}: use budget_ms, top_k or min_confidence.")
            if name in asked:
                raise OutOfRange(f"{name} is given twice: give it once.")
            asked[name] = value
        if "budget_ms" not in asked and (header := request.headers.get("x-budget-ms")) is not None:
            asked["budget_ms"] = header
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

    async def _body(self, request: Request, engine: Engine, deadline_s: float) -> bytes:
        """Read the body within its bounds; one that is slower than the budget is refused when that ends."""
        limit = self._settings.max_body_bytes
        too_large = TooLarge(f"The body has more than {limit} bytes: send a smaller picture.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        timeout_s, left_s = self._settings.body_timeout_s, deadline_s - self._clock()
        body = bytearray()
        try:
            async with asyncio.timeout(min(left_s, timeout_s)):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise CallerGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
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


async def _leave_when_gone(receive: Receive, engine: Engine, submitted: Submitted) -> None:
    """Wait for the connection to close; servers say so only to one who asks."""
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.leave(submitted)


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


async def _on_problem(_: Request, problem: Problem) -> Response:
    return _problem(problem)


def _problem(problem: Problem) -> Response:
    return Response(
        orjson.dumps(
            {"type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail}
        ),
        status_code=problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What the router refuses by itself."""
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return _problem(NotFound(f"There is nothing at {path}: /docs lists what there is."))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return _problem(MethodNotAllowed(f"{path} takes {allowed}, not {method}.", allowed))
    return _problem(Malformed(f"{error.detail}: /docs says what a request looks like."))


async def _on_fault(_: Request, __: Exception) -> Response:
    """A fault of ours; the server logs it with its stack."""
    return _problem(Failed("The server failed on this request: tell the operator if it persists."))


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
