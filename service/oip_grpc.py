"""The Open Inference Protocol v2 over gRPC: what Triton's and KServe's clients send to port 8001.

Must not know what a tensor means, which is `oip`'s, nor how a model is loaded, which is the repository's.
Importing gRPC takes a tenth of a second and 10 MB: only a server that speaks it imports this.
"""

import asyncio
import contextlib
import logging
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from service import oip, wire
from service import oip_pb2 as pb
from service.access import Access, Door
from service.errors import (
    OUR_FAULT,
    BodyTimeout,
    Failed,
    Malformed,
    NotFound,
    Problem,
    Rejected,
    Stopped,
)
from service.exchange import Room
from service.models import Model
from service.record import Answer, Journal, Record, current, together, trace_context
from service.repository import Repository
from service.settings import Settings, SettingsError
from service.turns import Turns, has_waited

logger = logging.getLogger(__name__)

SERVICE = "/inference.GRPCInferenceService/"

CODES: Mapping[int, grpc.StatusCode] = {
    **dict.fromkeys((400, 414, 415, 422), grpc.StatusCode.INVALID_ARGUMENT),
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    **dict.fromkeys((408, 504), grpc.StatusCode.DEADLINE_EXCEEDED),
    409: grpc.StatusCode.FAILED_PRECONDITION,
    **dict.fromkeys((413, 429), grpc.StatusCode.RESOURCE_EXHAUSTED),
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""What a problem's HTTP status is called here."""

N_OTHER_CALLS = 16
"""Beside the requests that may be open: so many questions for health and metadata get through."""

MIN_PING_S = 10.0
"""Clients that ping a quiet connection more often than this are sent away."""

FIELD: Mapping[type, str] = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}
"""Where a response's parameter of this type belongs."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """How one kind of call is served.

    Args:
        request: What comes.
        answer: Makes what goes from what came, the record of the call, and the call.
        door: Which keys it needs; None if it is open to everybody.
        is_probe: It asks for health, and is never refused.
        is_counted: It asks for an answer.
    """

    request: type[Message]
    answer: Callable[[Any, Record, Context], Awaitable[Message]]
    door: Door | None = None
    is_probe: bool = False
    is_counted: bool = False


class GrpcServer:
    """Listens beside the HTTP server, in the event loop that it is started in.

    Args:
        settings: Where, and all bounds.
        repository: Has the models.
        access: Lets callers in; the HTTP server's, so that a client has one rate.
        room: For the bodies of all open requests; the HTTP server's, too.
        journal: Takes down how requests ended; the HTTP server's, too.
        turns: Of the event loop; the HTTP server's, too.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        access: Access,
        room: Room,
        journal: Journal,
        turns: Turns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._calls = _Calls(settings, repository, access, room, journal, turns, clock)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Take calls from now on; returns the port.

        Raises:
            SettingsError: the address cannot be listened on, or the files for TLS cannot be used.
        """
        settings = self._settings
        self._server = grpc.aio.server(
            handlers=[self._calls],
            options=_options(settings),
            maximum_concurrent_rpcs=settings.max_open_requests + N_OTHER_CALLS,
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        credentials = _credentials(settings)
        try:
            if credentials:
                port = self._server.add_secure_port(address, credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise SettingsError(
                f"Cannot listen on {settings.host} port {settings.grpc_port} for gRPC: choose another with "
                "ANYTIME_GRPC_PORT, or set it empty to do without gRPC."
            ) from error
        await self._server.start()
        return port

    async def stop(self, linger_s: float, grace_s: float) -> None:
        """Take no more calls, and end those that are here.

        Args:
            linger_s: How long calls still come in, to be told by whoever answers that there is no answer:
                gRPC itself cancels those that cross its farewell. No wait if nobody has ever called.
            grace_s: How long those that are here may then take.
        """
        if self._server:
            if self._calls.has_been_called:
                await asyncio.sleep(linger_s)
            await self._server.stop(grace_s)


class _Calls(grpc.GenericRpcHandler):
    """Answers calls.

    Each is taken for a stream of one message, which is the same on the wire: so the key is asked for, and the
    place counted, before the message is read, and reading it can be bounded.
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        access: Access,
        room: Room,
        journal: Journal,
        turns: Turns,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._access = access
        self._room = room
        self._journal = journal
        self._turns = turns
        self._clock = clock
        self._n_open = 0
        self.has_been_called = False
        infer = _Call(pb.ModelInferRequest, self._infer, door="predict", is_counted=True)
        self._by_method: Mapping[str, _Call] = {
            f"{SERVICE}ServerLive": _Call(pb.ServerLiveRequest, self._live, is_probe=True),
            f"{SERVICE}ServerReady": _Call(pb.ServerReadyRequest, self._ready, is_probe=True),
            f"{SERVICE}ModelReady": _Call(pb.ModelReadyRequest, self._model_ready),
            f"{SERVICE}ServerMetadata": _Call(pb.ServerMetadataRequest, self._server_metadata),
            f"{SERVICE}ModelMetadata": _Call(pb.ModelMetadataRequest, self._model_metadata),
            f"{SERVICE}ModelInfer": infer,
            f"{SERVICE}RepositoryIndex": _Call(pb.RepositoryIndexRequest, self._index, "admin"),
            f"{SERVICE}RepositoryModelLoad": _Call(pb.RepositoryModelLoadRequest, self._load, "admin"),
            f"{SERVICE}RepositoryModelUnload": _Call(pb.RepositoryModelUnloadRequest, self._unload, "admin"),
        }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Have a call served that has just come; None if there is no such method."""
        now_s = self._clock()
        worked_s = self._turns.mark(now_s)  # when its core has read the call is not known
        method = handler_call_details.method
        self.has_been_called = True
        call = self._by_method.get(method)
        if call is None:
            return None
        headers = _headers(handler_call_details.invocation_metadata)
        by_name = dict(headers)
        record = Record(
            self._journal.name(by_name.get(b"x-request-id")),
            now_s - self._settings.network_ms / 1e3,
            trace=trace_context(headers) if b"traceparent" in by_name else None,
            has_waited=has_waited(worked_s),
            route=method.removeprefix("/"),
        )
        return grpc.stream_unary_rpc_method_handler(partial(self._serve, call, record, by_name))

    async def _serve(
        self, call: _Call, record: Record, headers: Mapping[bytes, bytes], _: object, context: Context
    ) -> bytes:
        """Answer; a problem becomes the call's status.

        This frame must hold no message: gRPC keeps what `abort` raises, and with it this frame, until the
        garbage collector comes round.
        """
        current.set(record)  # for this task, which gRPC makes for each call
        if call.is_counted:
            close: Any = partial(self._close, record)  # the stub wants a class
            context.add_done_callback(close)
        try:
            return await self._answer(call, record, headers, context)
        except Problem as problem:
            status = _refused(record, problem)
        except Exception:  # a fault of ours must not cost the caller the answer that there is none
            logger.exception("A call failed.")
            status = _refused(record, Failed(OUR_FAULT))
        return await context.abort(*status)

    async def _answer(
        self, call: _Call, record: Record, headers: Mapping[bytes, bytes], context: Context
    ) -> bytes:
        """Let a caller in, read what it wants and answer.

        Raises:
            Problem: there is no answer.
        """
        with contextlib.nullcontext() if call.is_probe else self._let_in(call.door, headers, context):
            record.is_let_in = True
            body = await self._body(record, context)
            with self._room_for(len(body)):
                request = _parsed(call.request, body, self._settings.max_values)
                response = await call.answer(request, record, context)
                context.set_trailing_metadata((_request_id(record),))
                record.status = grpc.StatusCode.OK.name
                return response.SerializeToString()

    def _close(self, record: Record, context: Context) -> None:
        if not context.done():  # nobody waited for it, or its own deadline had come, a moment before ours
            record.answer, record.outcome = None, "disconnected"
            record.status = grpc.StatusCode.CANCELLED.name
        self._journal.close(record, self._clock())

    @contextlib.contextmanager
    def _let_in(self, door: Door | None, headers: Mapping[bytes, bytes], context: Context) -> Iterator[None]:
        """Be one of the open requests, each of which may hold a whole message.

        Raises:
            Problem: the caller may not come in, or there is no place.
        """
        self._access.admit(door, headers, _address(context.peer()))
        if self._n_open >= self._settings.max_open_requests:
            raise self._refusal(f"{self._n_open} requests are open")
        self._n_open += 1
        try:
            yield
        finally:
            self._n_open -= 1

    async def _body(self, record: Record, context: Context) -> bytes:
        timeout_s = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                body: bytes | None = await context.read()
        except TimeoutError as error:
            raise BodyTimeout(
                f"The message did not arrive within {timeout_s:g} s: send it faster."
            ) from error
        finally:
            record.body_ended_s = self._clock()
        if not isinstance(body, bytes):  # the end of the stream; if it was too large, gRPC has said so
            raise Malformed("The call has no message: send one.")
        record.n_body_bytes = len(body)
        return body

    @contextlib.contextmanager
    def _room_for(self, n_bytes: int) -> Iterator[None]:
        if not self._room.take(n_bytes):
            raise self._refusal("The bodies of other requests fill the memory that there is for them")
        try:
            yield
        finally:
            self._room.give_back(n_bytes)

    def _refusal(self, why: str) -> Rejected:
        return self._repository.model().engine.refusal(f"{why}: retry later.", "load")

    # ---- answers ----

    async def _infer(
        self, request: pb.ModelInferRequest, record: Record, context: Context
    ) -> pb.ModelInferResponse:
        model = self._repository.model(request.model_name, request.model_version)
        left_s = _left_s(context) + self._clock() - record.arrived_s - self._settings.network_ms / 1e3
        wanted = _wanted(model, self._settings, request, left_s)
        # Whoever leaves cancels this task, and `answer` then leaves the queue.
        answers = await model.answer(
            wanted.pictures, wanted.asked, record=record, gone=lambda _: contextlib.nullcontext()
        )
        answer = record.answer = together(answers)
        response = _response(model, wanted, answers)

        # Not by way of the model: gRPC keeps its last call until another comes, and all that it calls back.
        learning = weakref.WeakMethod(model.engine.observe_way_out)

        def learn(_: object) -> None:
            if observe_way_out := learning():
                observe_way_out(self._clock() - answer.served.settled_s)

        context.add_done_callback(learn)  # type: ignore[arg-type]  # the stub wants a class
        return response

    async def _live(self, *_: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, *_: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._repository.is_ready)

    async def _model_ready(self, request: pb.ModelReadyRequest, *_: object) -> pb.ModelReadyResponse:
        try:
            model = self._repository.model(request.name, request.version)
        except (NotFound, Stopped):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._repository.takes_for(model))

    async def _server_metadata(self, *_: object) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**oip.server_metadata())

    async def _model_metadata(self, request: pb.ModelMetadataRequest, *_: object) -> pb.ModelMetadataResponse:
        model = self._repository.model(request.name, request.version)
        return pb.ModelMetadataResponse(**oip.model_metadata(model, self._repository.versions(model.name)))

    async def _index(self, request: pb.RepositoryIndexRequest, *_: object) -> pb.RepositoryIndexResponse:
        listed = await self._repository.index(is_ready_only=request.ready)
        return pb.RepositoryIndexResponse(models=[asdict(one) for one in listed])

    async def _load(
        self, request: pb.RepositoryModelLoadRequest, *_: object
    ) -> pb.RepositoryModelLoadResponse:
        wanted = oip.checked(_scalars(request.parameters), oip.LOAD_PARAMETERS)
        await self._repository.load(request.model_name, **wanted)
        return pb.RepositoryModelLoadResponse()

    async def _unload(
        self, request: pb.RepositoryModelUnloadRequest, *_: object
    ) -> pb.RepositoryModelUnloadResponse:
        wanted = oip.checked(_scalars(request.parameters), oip.UNLOAD_PARAMETERS)
        await self._repository.unload(request.model_name, wanted.get("version", ""))
        return pb.RepositoryModelUnloadResponse()


def _refused(record: Record, problem: Problem) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Take a problem down, and put it as `abort` takes it.

    In values: a problem that was kept would hold the frames that it came through, and one of them it.
    """
    record.refuse(problem)
    status = CODES[problem.status]
    record.status = status.name
    retry_ms = problem.headers.get("retry-after-ms")
    metadata = [_request_id(record), *([("retry-after-ms", retry_ms)] if retry_ms else [])]
    return status, problem.detail, tuple(metadata)


def _request_id(record: Record) -> tuple[str, str]:
    return "x-request-id", record.request_id


# ---- messages in this server's words, and back ----


def _parsed(kind: type[Message], body: bytes, max_values: int) -> Message:
    wire.check(kind, body, max_values)
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise Malformed(
            f"The message is no {kind.DESCRIPTOR.full_name}: send what grpc_predict_v2.proto describes."
        ) from error


def _wanted(
    model: Model, settings: Settings, request: pb.ModelInferRequest, left_s: float
) -> oip.InferRequest:
    oip.check_one_input(len(request.inputs))
    # One more than there are is enough to see that one is wrong or comes twice.
    outputs = request.outputs[: len(oip.OUTPUTS) + 1]
    named = [(output.name, _scalars(output.parameters, ("classification",))) for output in outputs]
    return oip.InferRequest(
        id=request.id,
        pictures=_pictures(model, settings, request),
        asked=oip.asked(settings, _scalars(request.parameters, oip.PARAMETERS), left_s),
        outputs=oip.requested(model.manifest, named, is_binary=True),
    )


def _pictures(
    model: Model, settings: Settings, request: pb.ModelInferRequest
) -> tuple[bytes | NDArray[np.uint8], ...]:
    one, raw = request.inputs[0], request.raw_input_contents
    tensor = oip.tensor(model.manifest, settings, one.name, one.datatype, one.shape)
    if len(raw) > 1 or (raw and one.HasField("contents")):
        raise Malformed("The input has contents twice: send either one `raw_input_contents` or `contents`.")
    typed = one.contents.bytes_contents if one.datatype == "BYTES" else one.contents.uint_contents
    return oip.pictures(tensor, raw[0] if raw else typed)


def _scalars(parameters: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, Any]:
    """The parameters of these names, or all."""
    found = {}
    for name in parameters if names is None else names:
        if name in parameters:  # a look at one that is not there would make it
            choice = parameters[name].WhichOneof("parameter_choice")
            found[name] = getattr(parameters[name], choice) if choice else None
    return found


def _response(model: Model, wanted: oip.InferRequest, answers: Sequence[Answer]) -> pb.ModelInferResponse:
    tensors = oip.output_tensors(model, wanted, answers)
    response = pb.ModelInferResponse(
        model_name=model.name,
        model_version=model.version,
        id=wanted.id,
        outputs=[{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in tensors],
        raw_output_contents=[one.raw() for one in tensors],
    )
    for name, value in oip.parameters(model, wanted.asked, answers).items():
        setattr(response.parameters[name], FIELD[type(value)], value)
    return response


# ---- the call, and where it comes from ----


def _left_s(context: Context) -> float:
    """Until the caller's deadline [s], which gRPC rounds up by 1 % at most; infinity if it has none."""
    left_s: float | None = context.time_remaining()
    return math.inf if left_s is None else left_s


def _headers(metadata: Any) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in metadata or ()
    ]


def _address(peer: str) -> str:
    """Of `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000` the address."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _options(settings: Settings) -> list[tuple[str, int]]:
    """What gRPC is told of the bounds; all its times are milliseconds."""
    return [
        # gRPC's default is to share, and then a second server gets half of the calls unasked.
        ("grpc.so_reuseport", int(settings.shares_port)),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_open_requests + N_OTHER_CALLS),
        ("grpc.server_handshake_timeout_ms", round(settings.header_timeout_s * 1e3)),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive_s * 1e3)),
        # A connection whose other end has vanished is noticed by pings of ours.
        ("grpc.keepalive_time_ms", round(settings.keep_alive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", round(settings.send_timeout_s * 1e3)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(MIN_PING_S * 1e3)),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS with the same files as the HTTP server's, which has verified them; None without."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    if settings.tls_key_password:
        raise SettingsError(
            "ANYTIME_TLS_KEY_PASSWORD: gRPC cannot open an encrypted key; give one that is not encrypted, or "
            "set ANYTIME_GRPC_PORT empty to do without gRPC."
        )
    authority = settings.tls_client_ca
    return grpc.ssl_server_credentials(
        [(settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())],
        root_certificates=authority.read_bytes() if authority else None,
        require_client_auth=authority is not None,
    )
