"""Callers over gRPC: good ones, and those who cancel, dawdle, or send what is no message of the protocol.

Messages are built and read byte by byte, by the numbers in the protocol's own description: what is wrong on
purpose could not be built with classes made from it. Needs `grpcio`, as the server does.

Source: https://github.com/kserve/open-inference-protocol (inference_grpc.md); for the encoding
https://protobuf.dev/programming-guides/encoding/.
"""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import grpc
import grpc.aio

from loadtests.chaos.callers import AMPLE_MS, BUDGETS_MS, NOTHING, Caller, Form, Place
from loadtests.chaos.odd_requests import WRONG_KEY
from loadtests.chaos.over_http import LONG_MS, connected, raw_forms

SERVICE = "/inference.GRPCInferenceService/"
BUSY = frozenset({"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
OUTCOMES: Mapping[str, str] = MappingProxyType(
    {
        "OK": "answered",
        "RESOURCE_EXHAUSTED": "rejected",
        "DEADLINE_EXCEEDED": "expired",
        "INTERNAL": "failed",
        "UNAVAILABLE": "stopped",
    }
)
"""As `callers.OUTCOMES`, for calls whose deadline is the budget that they name."""

TOO_MUCH, RETRY = grpc.StatusCode.RESOURCE_EXHAUSTED, "retry-after-ms"
TOO_LARGE = "RESOURCE_EXHAUSTED for good"
"""Where nobody says when to come again: the message is too large, and not the server too busy for it."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""With which a client of HTTP/2 begins."""


@dataclass(frozen=True, slots=True)
class Odd:
    """A call that is wrong in one way."""

    kind: str
    method: str
    message: bytes
    expected: frozenset[str]
    key: str
    is_counted: bool = True


# ---- messages ----


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a message; a text, bytes or message has its length before it."""
    if isinstance(value, float):
        return _varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def fields_of(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field that has a length; the others are passed over."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        match tag & 7:
            case 0:
                number()
            case 1:
                at += 8
            case 5:
                at += 4
            case _:
                n_bytes = number()
                yield tag >> 3, message[at : at + n_bytes]
                at += n_bytes


def infer(
    model: str,
    name: str,
    datatype: str,
    shape: Sequence[int],
    *raw: bytes,
    budget_ms: float | None = LONG_MS,
    outputs: Sequence[str] = ("label", "confidence", "columns_run"),
) -> bytes:
    """A ModelInferRequest with one input."""
    tensor = field(1, name) + field(2, datatype) + b"".join([field(3, size) for size in shape])
    message = field(1, model)
    if budget_ms is not None:
        message += field(4, field(1, "budget_ms") + field(2, field(4, float(budget_ms))))
    message += field(5, tensor) + b"".join([field(6, field(1, output)) for output in outputs])
    return message + b"".join([field(7, contents) for contents in raw])


def _elements(raw: bytes) -> list[str]:
    """Of a BYTES tensor."""
    texts, at = [], 0
    while at < len(raw):
        n_bytes = int.from_bytes(raw[at : at + 4], "little")
        texts.append(raw[at + 4 : at + 4 + n_bytes].decode())
        at += 4 + n_bytes
    return texts


# ---- calls ----


def channel(place: Place) -> grpc.aio.Channel:
    """One connection that all calls share."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(f"{place.host}:{place.grpc_port}", options)


def whole(to: grpc.aio.Channel, method: str) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    """Calls of this method whose message is there."""
    return to.unary_unary(SERVICE + method)


def in_parts(to: grpc.aio.Channel, method: str) -> "grpc.aio.StreamUnaryMultiCallable[bytes, bytes]":
    """The same, of which each part of the message comes when it comes; on the wire nothing differs."""
    return to.stream_unary(SERVICE + method)


def shown(key: str) -> tuple[tuple[str, str], ...]:
    """A key as metadata; nothing if there is none."""
    return (("x-api-key", key),) if key else ()


async def ended(call: Awaitable[bytes]) -> tuple[str, bytes]:
    """A call's status and, if that is OK, the response."""
    try:
        return "OK", await call
    except grpc.aio.AioRpcError as error:
        is_too_large = error.code() is TOO_MUCH and RETRY not in dict(error.trailing_metadata() or ())
        return TOO_LARGE if is_too_large else error.code().name, b""


async def good(caller: Caller, to: grpc.aio.Channel, n: int) -> None:
    """Calls one after the other, with one to four pictures each."""
    height, width = caller.pictures.images_NHWC.shape[1:3]
    for _ in range(n):
        forms = raw_forms(caller, caller.rng.randint(1, 4))
        budget_ms = caller.rng.choice(BUDGETS_MS)
        pixels = b"".join([form.body for form in forms])
        shape = [len(forms), height, width, 3]
        message = infer(caller.place.model, "image", "UINT8", shape, pixels, budget_ms=budget_ms)
        sent_s = time.monotonic()
        call = whole(to, "ModelInfer")(message, metadata=shown(caller.place.key))
        status, response = await ended(call)
        caller.saw(
            status,
            {"OK"} | BUSY | {"INTERNAL"},
            sent_s,
            outcome=OUTCOMES.get(status, "invalid"),
            complaint=_complaint(caller, forms, response) if status == "OK" else "",
            shares_runs=True,
            is_ample=budget_ms >= AMPLE_MS,
        )


def _complaint(caller: Caller, forms: Sequence[Form], response: bytes) -> str:
    labels, confidences, columns_run = [content for number, content in fields_of(response) if number == 6]
    n = len(forms)
    told = zip(
        forms, _elements(labels), struct.unpack(f"<{n}f", confidences), _elements(columns_run), strict=True
    )
    for form, label, confidence, columns in told:
        index = caller.place.labels.index(label)
        complaint = caller.pictures.complaint(form.row, columns.split(","), index, confidence)
        if complaint:
            return complaint
    return ""


async def odd(caller: Caller, to: grpc.aio.Channel, one: Odd) -> None:
    """A call that is refused."""
    sent_s = time.monotonic()
    status, _ = await ended(whole(to, one.method)(one.message, metadata=shown(one.key)))
    caller.saw(
        status,
        one.expected,
        sent_s,
        counts="surely" if one.is_counted else "not",
        outcome=OUTCOMES.get(status, "invalid"),
    )


async def oversize(caller: Caller, to: grpc.aio.Channel) -> None:
    """A message that is larger than any may be: gRPC itself refuses it."""
    sent_s = time.monotonic()
    message = field(7, bytes(caller.place.max_body_bytes))
    status, _ = await ended(whole(to, "ModelInfer")(message, metadata=shown(caller.place.key)))
    caller.saw(status, {TOO_LARGE}, sent_s, counts="perhaps")


async def cancel(caller: Caller, to: grpc.aio.Channel) -> None:
    """A call that its caller gives up before, while or after it is served."""
    pixels = caller.rng.choice(raw_forms(caller, 1)).body
    height, width = caller.pictures.images_NHWC.shape[1:3]
    message = infer(caller.place.model, "image", "UINT8", [1, height, width, 3], pixels)
    sent_s = time.monotonic()
    call = whole(to, "ModelInfer")(message, metadata=shown(caller.place.key))
    await asyncio.sleep(caller.rng.choice((0, 0.0005, 0.002, 0.01)))
    call.cancel()
    caller.saw(NOTHING, {NOTHING}, sent_s, counts="perhaps")


async def impatient(caller: Caller, to: grpc.aio.Channel) -> None:
    """A call whose own deadline is too near for anything."""
    pixels = raw_forms(caller, 1)[0].body
    height, width = caller.pictures.images_NHWC.shape[1:3]
    shape = [1, height, width, 3]
    message = infer(caller.place.model, "image", "UINT8", shape, pixels, budget_ms=None)
    sent_s = time.monotonic()
    timeout_s = caller.rng.choice((0.0001, 0.001, 0.003))
    call = whole(to, "ModelInfer")(message, metadata=shown(caller.place.key), timeout=timeout_s)
    status, _ = await ended(call)
    caller.saw(status, {"OK", "INTERNAL"} | BUSY, sent_s, counts="perhaps", shares_runs=True)


async def slow(caller: Caller, to: grpc.aio.Channel) -> None:
    """A call whose message does not come."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(10 * caller.place.body_timeout_s)
        yield b""

    sent_s = time.monotonic()
    call = in_parts(to, "ModelInfer")(nothing(), metadata=shown(caller.place.key))
    status, _ = await ended(call)
    caller.saw(status, {"DEADLINE_EXCEEDED"}, sent_s, outcome="invalid")


async def noise(caller: Caller) -> None:
    """Bytes on gRPC's port that are no HTTP/2, or no longer."""
    frames = bytes(caller.rng.randrange(256) for _ in range(200))
    beginnings = (b"", PREFACE, PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n")
    async with connected(caller.place.host, caller.place.grpc_port) as line:
        sent_s = time.monotonic()
        await line.send(caller.rng.choice(beginnings) + frames)
        await asyncio.sleep(caller.rng.choice((0, 0.01, 0.1)))
        if caller.rng.random() < 0.5:
            line.reset()
        caller.saw(NOTHING, {NOTHING}, sent_s, counts="not")


def catalogue(place: Place, height: int, width: int) -> Sequence[Odd]:
    """Calls that are wrong in one way each."""
    one, pixels = [1, height, width, 3], bytes(height * width * 3)
    right = infer(place.model, "image", "UINT8", one, pixels)

    def wrong(kind: str, message: bytes, *statuses: str) -> Odd:
        expected = frozenset(statuses or {"INVALID_ARGUMENT"}) | BUSY
        return Odd(f"grpc: {kind}", "ModelInfer", message, expected, place.key)

    return [
        *(
            wrong("noise", noise)
            for noise in (b"\xff" * 50, b"\x0a\xff", right[:-1], b"\x0b", right + b"\x80")
        ),
        wrong("no input", field(1, place.model)),
        wrong("input", infer(place.model, "picture", "UINT8", one, pixels)),
        wrong("datatype", infer(place.model, "image", "FP32", one, pixels)),
        *(
            wrong("shape", infer(place.model, "image", "UINT8", shape, pixels))
            for shape in ([], [1], [height, width, 3], [1, height, width, 4])
        ),
        wrong(
            "shape: too long",
            infer(place.model, "image", "UINT8", [1] * 10_000, pixels),
            *("INVALID_ARGUMENT", TOO_LARGE),
        ),
        *(
            wrong("number of pictures", infer(place.model, "image", "UINT8", [n, height, width, 3], pixels))
            for n in (0, -1, 1 << 40)
        ),
        *(wrong("contents", infer(place.model, "image", "UINT8", one, raw)) for raw in (b"", pixels[:-1])),
        wrong("contents", infer(place.model, "image", "UINT8", one, pixels, pixels)),
        *(
            wrong("BYTES", infer(place.model, "image_bytes", "BYTES", [2], raw))
            for raw in (b"", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00a" * 3, b"\x01\x00\x00\x00a" * 2)
        ),
        wrong("output", infer(place.model, "image", "UINT8", one, pixels, outputs=("x",))),
        wrong("budget", infer(place.model, "image", "UINT8", one, pixels, budget_ms=-1.0)),
        wrong("model", infer("nobody", "image", "UINT8", one, pixels), "NOT_FOUND"),
        *(
            Odd("grpc: key", "ModelInfer", right, frozenset({status}), key)
            for key, status in (
                ("", "UNAUTHENTICATED"),
                (WRONG_KEY, "UNAUTHENTICATED"),
                (place.admin_key, "PERMISSION_DENIED"),
            )
        ),
        *(
            Odd("grpc: elsewhere", method, message, BUSY | {status}, place.key, is_counted=False)
            for method, message, status in (
                ("ServerLive", b"", "OK"),
                ("ModelMetadata", field(1, place.model), "OK"),
                ("ModelMetadata", field(1, "nobody"), "NOT_FOUND"),
                ("RepositoryModelUnload", field(2, place.model), "PERMISSION_DENIED"),
                ("NoSuchMethod", b"", "UNIMPLEMENTED"),
            )
        ),
    ]
