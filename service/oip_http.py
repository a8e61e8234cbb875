"""The Open Inference Protocol v2 over HTTP: what Triton's and KServe's clients send, under /v2.

Must not know what a tensor means, which is `oip`'s, nor how a model is loaded, which is the repository's.
"""

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from service import decoding, oip, openapi
from service.errors import (
    BodyTimeout,
    Expired,
    Failed,
    Forbidden,
    Malformed,
    MethodNotAllowed,
    NotFound,
    NotLoadable,
    OutOfRange,
    Problem,
    Rejected,
    Stopped,
    TooLarge,
    Unauthorized,
    UnsupportedType,
)
from service.exchange import Exchange, Headers, Refuse, Room, problem_headers
from service.models import Model
from service.record import together
from service.repository import Repository
from service.settings import Settings

INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
EXCHANGE = "anytime.exchange"
"""Key in the ASGI scope: the `Exchange`, for those who are called through FastAPI."""

RAW: dict[str, Any] = {"response_class": Response, "response_model": None}
"""FastAPI is to leave responses as they are."""

RETRY_S = 1.0
"""When to come again with a change of the models for whose body there was no room."""

HEADER_LENGTH = b"inference-header-content-length"
INLINE_BYTES = 64 * 1024
"""Smaller bodies are read on the event loop: for some 0.2 ms, about what a hop to a thread takes, and 2 ms if
they are made for it."""

INFER_PROBLEMS = (
    *(Malformed, Unauthorized, Forbidden, NotFound, BodyTimeout, TooLarge, UnsupportedType, OutOfRange),
    *(Rejected, Failed, Stopped, Expired),
)
CHANGE_PROBLEMS = (
    *(Malformed, Unauthorized, Forbidden, NotFound, BodyTimeout, NotLoadable, TooLarge, OutOfRange),
    *(Rejected, Stopped),
)


def infer_route(path: str) -> str:
    """The template of a path that asks for an answer, which is counted and must not wait; else empty."""
    found = INFER.fullmatch(path)
    if not found:
        return ""
    return f"/v2/models/{{name}}{'/versions/{version}' if found[2] else ''}/infer"


def error_document(problem: Problem) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a problem as this protocol has it."""
    headers = [(b"content-type", b"application/json"), *problem_headers(problem)]
    return problem.status, headers, orjson.dumps({"error": problem.detail})


class OpenInference:
    """Everything under /v2.

    Args:
        settings: The bounds.
        repository: Has the models.
        room: For bodies.
        clock: Monotonic time [s].
    """

    def __init__(
        self, settings: Settings, repository: Repository, room: Room, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._room = room
        self._clock = clock

    async def infer(self, exchange: Exchange) -> None:
        """Answer a request for inference.

        Raises:
            Problem: there is no answer.
            CallerGone: nobody waits for it.
        """
        found = INFER.fullmatch(exchange.scope["path"])
        assert found is not None  # noqa: S101 - for the type checker: only those paths come here
        if exchange.scope["method"] != "POST":
            raise MethodNotAllowed(f"infer takes POST, not {exchange.scope['method']}.", "POST")
        name, version = found[1], found[2] or ""
        body = await self._body(exchange, self._repository.model(name, version).engine.refusal)
        length = exchange.headers.get(HEADER_LENGTH)
        header, binary = oip.split(body, length.decode("latin-1") if length is not None else None)
        model = self._repository.model(name, version)  # another one may have taken its place meanwhile
        read = partial(oip.read_json, model.manifest, self._settings, header, binary)
        request = await asyncio.to_thread(read) if len(body) > INLINE_BYTES else read()
        answers = await model.answer(
            request.pictures, request.asked, record=exchange.record, gone=exchange.called_when_gone
        )
        answer = together(answers)
        document, raw = oip.write_json(model, request, answers)
        headers: Headers = [(b"content-type", b"application/json")]
        if raw:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (HEADER_LENGTH, b"%d" % len(document)),
            ]
        await exchange.respond(200, headers, document + raw)
        exchange.record.answer = answer
        model.engine.observe_way_out(self._clock() - answer.served.settled_s)

    def router(self) -> APIRouter:
        """All but infer, which is in it for the documentation only."""
        router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
        for path, name, call, response in (
            ("", "oip_server", self._server, openapi.answer("This server", openapi.OIP_SERVER_SCHEMA)),
            ("/health/live", "oip_live", self._live, openapi.answer("It is", openapi.OIP_LIVE_SCHEMA)),
            (
                "/health/ready",
                "oip_ready",
                self._ready,
                openapi.answer("It is", openapi.OIP_READY_SCHEMA) | openapi.errors(Stopped),
            ),
        ):
            router.get(path, name=name, responses=response, **RAW)(call)
        for path in ("/models/{name}", "/models/{name}/versions/{version}"):
            suffix = "_version" if "version" in path else ""
            described = {"parameters": openapi.path_parameters(path)}
            for below, name, call_, schema in (
                ("", "oip_model", self._model, openapi.OIP_MODEL_SCHEMA),
                ("/ready", "oip_model_ready", self._model_ready, openapi.OIP_MODEL_READY_SCHEMA),
            ):
                router.get(
                    path + below,
                    name=name + suffix,
                    responses=openapi.answer("The model", schema) | openapi.errors(NotFound, Stopped),
                    openapi_extra=described,
                    **RAW,
                )(call_)
            answer = openapi.answer("The answer", openapi.INFER_RESPONSE_SCHEMA)
            binary = {"type": "string", "format": "binary", "description": "JSON, then binary tensors."}
            answer[200]["content"]["application/octet-stream"] = {"schema": binary}
            router.post(
                f"{path}/infer",
                name=f"oip_infer{suffix}",
                responses=answer | openapi.errors(*INFER_PROBLEMS),
                openapi_extra=described | openapi.body(openapi.INFER_REQUEST_SCHEMA),
                dependencies=openapi.KEYS,
                **RAW,
            )(_documented_infer)
        load, unload = map(openapi.change_schema, (oip.LOAD_PARAMETERS, oip.UNLOAD_PARAMETERS))
        for path, name, change, asked, schema in (
            ("/index", "oip_index", self._index, openapi.INDEX_REQUEST_SCHEMA, openapi.INDEX_SCHEMA),
            ("/models/{name}/load", "oip_load", self._load, load, openapi.DONE_SCHEMA),
            ("/models/{name}/unload", "oip_unload", self._unload, unload, openapi.DONE_SCHEMA),
        ):
            router.post(
                f"/repository{path}",
                name=name,
                responses=openapi.answer("Done", schema) | openapi.errors(*CHANGE_PROBLEMS),
                openapi_extra={"parameters": openapi.path_parameters(path)} | openapi.body(asked),
                dependencies=openapi.KEYS,
                **RAW,
            )(change)
        return router

    async def _server(self) -> Response:
        """Describe this server."""
        return _response(oip.server_metadata())

    async def _live(self) -> Response:
        """Answer as long as the event loop turns."""
        return _response({"live": True})

    async def _ready(self) -> Response:
        """Say whether requests are taken."""
        if not self._repository.is_ready:
            raise Stopped("This server is starting or stopping: send requests to another one.")
        return _response({"ready": True})

    async def _model(self, request: Request) -> Response:
        """Describe the tensors of a model."""
        model = self._named(request)
        return _response(oip.model_metadata(model, self._repository.versions(model.name)))

    async def _model_ready(self, request: Request) -> Response:
        """Say whether a model takes requests."""
        model = self._named(request)
        if not self._repository.takes_for(model):
            raise Stopped("This model is starting or stopping: send requests to another server.")
        return _response({"name": model.name, "ready": True})

    def _named(self, request: Request) -> Model:
        parameters = request.path_params
        return self._repository.model(parameters["name"], parameters.get("version", ""))

    async def _index(self, request: Request) -> Response:
        """List what is loaded and what could be."""
        document = await self._document(request, {"ready": bool})
        listed = await self._repository.index(is_ready_only=document.get("ready", False))
        return _response(
            [
                {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
                for one in listed
            ]
        )

    async def _load(self, request: Request) -> Response:
        """Load a version of a model, by default the newest; it answers from then on."""
        wanted = await self._parameters(request, oip.LOAD_PARAMETERS)
        await self._repository.load(request.path_params["name"], **wanted)
        return _response({})

    async def _unload(self, request: Request) -> Response:
        """Take a model out of service, or one version of it."""
        wanted = await self._parameters(request, oip.UNLOAD_PARAMETERS)
        wanted.pop("unload_dependents", None)  # there are none
        await self._repository.unload(request.path_params["name"], **wanted)
        return _response({})

    async def _parameters(self, request: Request, known: Mapping[str, type]) -> dict[str, Any]:
        document = await self._document(request, {"parameters": dict})
        return oip.checked(document.get("parameters", {}), known)

    async def _document(self, request: Request, known: Mapping[str, type]) -> dict[str, Any]:
        exchange: Exchange = request.scope[EXCHANGE]
        try:
            body = await self._body(exchange, lambda why, reason: Rejected(why, RETRY_S, reason))
        finally:
            self._room.give_back(exchange.n_taken_bytes)
        try:
            document = decoding.loads(body or b"{}", self._settings.max_values)
        except orjson.JSONDecodeError as error:
            raise Malformed(f"The body is no JSON ({error}): send an object, or nothing.") from error
        if not isinstance(document, dict):
            raise Malformed("The body must be a JSON object, or empty.")
        return oip.checked(document, known)

    async def _body(self, exchange: Exchange, refuse: Refuse) -> bytes:
        # The body itself says what the budget is.
        return await exchange.body(self._settings, self._clock, math.inf, refuse, self._room)


def _response(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


async def _documented_infer() -> Response:
    """Classify pictures as well as the budget allows.

    The budget is the parameter `budget_ms`, or `timeout` in microseconds. The input is `image` (UINT8 pixels)
    or `image_bytes` (BYTES: PNG, JPEG or WebP files; in JSON base64).
    """
    raise AssertionError("requests to infer never come this way; this is here for /docs")
