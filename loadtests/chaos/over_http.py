"""Callers over HTTP/1.1: good ones, and those who leave, dawdle, hoard or send too much.

Bytes go straight to the socket: no client library would send what some callers here send. Must not know what
a malformed request looks like, which is `odd_requests`' own.
"""

import asyncio
import contextlib
import itertools
import json
import math
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.chaos import artifacts
from loadtests.chaos.artifacts import Trap
from loadtests.chaos.callers import (
    AMPLE_MS,
    ANSWERED,
    BUDGETS_MS,
    BUSY,
    NOTHING,
    PATIENCE_S,
    RAW,
    Caller,
    Form,
    Place,
)

MAX_LINE_BYTES = 1 << 20
LONG_MS = 3000
"""A budget that is not to be what ends a request."""
SLOW_READER_BYTES = 4096
"""What the socket of a reader that takes nothing holds, about."""
N_HOARDED = 8
"""Large responses that it asks for: more than the buffers of both sockets hold, which is 3 to 5 MB here, so
that the server is left with some."""


LISTENING = "0A"
"""A socket's state in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class Response:
    """What came back; of a stream, all of it."""

    status: str
    headers: Mapping[str, str]
    body: bytes


class Line:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Hand over; a server that takes nothing more is found out by what it says, or does not say."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def response(self, *, is_to_head: bool = False) -> Response:
        """The next response, or status `NOTHING` if the connection ends before its end."""
        try:
            status, headers = await self.head()
            if is_to_head:
                return Response(status, headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                return Response(status, headers, b"".join([part async for part in self._chunks()]))
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            return Response(status, headers, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return Response(NOTHING, {}, b"")

    async def head(self) -> tuple[str, dict[str, str]]:
        """Status and headers.

        Raises:
            asyncio.IncompleteReadError, ConnectionError: the connection ends before theirs.
        """
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines[1:] if line]
        return lines[0].split(" ")[1], {name.lower(): value.strip() for name, _, value in pairs}

    async def part(self) -> bytes:
        """The next part of a body without a length; b"" at its end."""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def _chunks(self) -> AsyncIterator[bytes]:
        while part := await self.part():
            yield part

    async def rest(self) -> bytes:
        """Everything until the server closes, or breaks off."""
        got = bytearray()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 16):
                got += data
        return bytes(got)

    def end_sending(self) -> None:
        """Close one half."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def close(self) -> None:
        """Close it as one does."""
        self._writer.close()

    def reset(self) -> None:
        """Break it off: whatever is on its way is lost."""
        sock = self._writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(host: str, port: int) -> AsyncIterator[Line]:
    """A connection that is closed at the end, if it was not before."""
    line = Line(*await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES))
    try:
        yield line
    finally:
        line.close()


def http(caller: Caller) -> contextlib.AbstractAsyncContextManager[Line]:
    """A connection to the server that this caller calls."""
    return connected(caller.place.host, caller.place.port)


# ---- requests that are right ----


def post(
    path: str, body: bytes, headers: Mapping[str, object], *, key: str, n_declared: int | None = None
) -> bytes:
    """A request with a body, and with a key if there is one.

    Args:
        path: And query.
        body: What is sent of it.
        headers: Of the body.
        key: Of the caller.
        n_declared: What Content-Length says. None: the truth.
    """
    n_bytes = len(body) if n_declared is None else n_declared
    named = {"Host": "x", "X-API-Key": key, **headers, "Content-Length": n_bytes}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value != "")
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def predict(place: Place, form: Form, query: str, *, n_declared: int | None = None) -> bytes:
    """A request to /predict."""
    headers = {"Content-Type": form.content_type, "Content-Encoding": form.encoding}
    return post(f"/predict?{query}", form.body, headers, key=place.key, n_declared=n_declared)


def in_chunks(place: Place, form: Form, query: str) -> bytes:
    """As `predict`, with a body whose length is not told."""
    head = predict(place, Form(form.content_type, b"", None, form.encoding), query)
    head = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    middle = len(form.body) // 2 + 1
    parts = [part for part in (form.body[:middle], form.body[middle:]) if part]
    return head + b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]) + b"0\r\n\r\n"


def infer(caller: Caller, forms: Sequence[Form], budget_ms: float, *, is_binary: bool, model: str) -> bytes:
    """A request of the Open Inference Protocol for pictures of the network's size."""
    height, width = caller.pictures.images_NHWC.shape[1:3]
    pixels = b"".join([form.body for form in forms])
    tensor: dict[str, Any] = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [len(forms), height, width, 3],
    }
    if is_binary:
        tensor["parameters"] = {"binary_data_size": len(pixels)}
    else:
        tensor["data"] = list(pixels)
    document: dict[str, Any] = {"inputs": [tensor], "parameters": {"budget_ms": budget_ms}}
    header = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": len(header)} if is_binary else {}
    body = header + pixels if is_binary else header
    return post(f"/v2/models/{model}/infer", body, headers, key=caller.place.key)


def complaint_of_predict(caller: Caller, form: Form, response: Response, query: str) -> str:
    """What is wrong with an answer of /predict, streamed or whole; "" if nothing is, or if it is none."""
    if response.status != "200":
        return ""
    if "stream=" not in query:
        return _complaint_of_record(caller, form, json.loads(response.body))
    if response.headers["content-type"] == "text/event-stream":
        events = response.body.decode().split("\n\n")[:-1]
        named = [(event.split("\n")[0][7:], json.loads(event.split("\n")[1][6:])) for event in events]
    else:
        records = [json.loads(line) for line in response.body.splitlines()]
        named = [(record["event"], record) for record in records]
    if [name for name, _ in named] != ["prediction"] * (len(named) - 1) + ["done"] or len(named) < 2:
        return f"a stream of {[name for name, _ in named]}"
    complaints = [_complaint_of_record(caller, form, record) for _, record in named[:-1]]
    return next(filter(None, complaints), "")


def _complaint_of_record(caller: Caller, form: Form, record: Mapping[str, Any]) -> str:
    if record["model"] != caller.place.model:
        return f"an answer of {record['model']}"
    return caller.pictures.complaint(form.row, record["columns_run"], record["index"], record["confidence"])


def complaint_of_infer(caller: Caller, forms: Sequence[Form], response: Response) -> str:
    """What is wrong with an answer to `infer`; "" if nothing is, or if it is none."""
    if response.status != "200":
        return ""
    outputs = {one["name"]: one["data"] for one in json.loads(response.body)["outputs"]}
    told = zip(forms, outputs["label"], outputs["confidence"], outputs["columns_run"], strict=True)
    return next(
        (
            complaint
            for form, label, confidence, columns_run in told
            if (
                complaint := caller.pictures.complaint(
                    form.row, columns_run.split(","), caller.place.labels.index(label), confidence
                )
            )
        ),
        "",
    )


async def good(caller: Caller, n: int) -> None:
    """Requests of every sort, one after the other on one connection."""
    async with http(caller) as line:
        for _ in range(n):
            budget_ms = caller.rng.choice(BUDGETS_MS)
            if caller.rng.random() < 0.2:
                is_kept = await _infer_once(caller, line, budget_ms)
            else:
                is_kept = await _predict_once(caller, line, budget_ms)
            if not is_kept:
                return


async def _predict_once(caller: Caller, line: Line, budget_ms: float) -> bool:
    form = caller.rng.choice(caller.pictures.forms)
    options = ("", "&top_k=2", "&min_confidence=0.6", "&stream=sse", "&stream=ndjson")
    query = f"budget_ms={budget_ms:g}" + caller.rng.choices(options, (6, 1, 1, 1, 1))[0]
    make = caller.rng.choices((predict, in_chunks), (9, 1))[0]
    sent_s = time.monotonic()
    await line.send(make(caller.place, form, query))
    response = await line.response()
    caller.saw(
        response.status,
        ANSWERED,
        sent_s,
        complaint=complaint_of_predict(caller, form, response, query),
        shares_runs=True,
        is_ample=budget_ms >= AMPLE_MS,
    )
    return _is_kept(response)


async def _infer_once(caller: Caller, line: Line, budget_ms: float) -> bool:
    forms = raw_forms(caller, caller.rng.randint(1, 4))
    is_other = caller.rng.random() < 0.1
    model = caller.place.other if is_other else caller.place.model
    sent_s = time.monotonic()
    await line.send(infer(caller, forms, budget_ms, is_binary=caller.rng.random() < 0.5, model=model))
    response = await line.response()
    caller.saw(
        response.status,
        ANSWERED | {"404"} if is_other else ANSWERED,
        sent_s,
        complaint="" if is_other else complaint_of_infer(caller, forms, response),
        shares_runs=True,
        is_ample=budget_ms >= AMPLE_MS and not is_other,
    )
    return _is_kept(response)


def raw_forms(caller: Caller, n: int) -> list[Form]:
    """So many pictures as pixels."""
    raw = [form for form in caller.pictures.forms if form.content_type == RAW and not form.encoding]
    return caller.rng.choices(raw, k=n)


def _is_kept(response: Response) -> bool:
    return response.status != NOTHING and response.headers.get("connection") != "close"


async def burst(caller: Caller, n: int) -> None:
    """Many in the same moment, each with a connection of its own and a budget for a few runs."""

    async def one(form: Form, query: str) -> None:
        async with http(caller) as line:
            sent_s = time.monotonic()
            await line.send(predict(caller.place, form, query))
            response = await line.response()
            complaint = complaint_of_predict(caller, form, response, query)
            caller.saw(response.status, ANSWERED, sent_s, complaint=complaint, shares_runs=True)

    forms = caller.rng.choices(caller.pictures.forms, k=n)
    await asyncio.gather(*(one(form, f"budget_ms={caller.rng.choice(BUDGETS_MS[:4])}") for form in forms))


async def pipeline(caller: Caller, n: int) -> None:
    """Several requests in one piece: each answer is for its own, in their order."""
    forms = caller.rng.choices(caller.pictures.forms, k=n)
    query = f"budget_ms={LONG_MS}"
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(b"".join([predict(caller.place, form, query) for form in forms]))
        for form in forms:
            response = await line.response()
            complaint = complaint_of_predict(caller, form, response, query)
            caller.saw(response.status, ANSWERED, sent_s, complaint=complaint, shares_runs=True)


# ---- those who leave ----


async def leave_before_body(caller: Caller) -> None:
    """A head that promises a body, and nobody any more."""
    await _leave(caller, lambda message, n_body: message[:-n_body])


async def leave_mid_body(caller: Caller) -> None:
    """Half of a body."""
    await _leave(caller, lambda message, n_body: message[: -(n_body // 2)])


async def leave_waiting(caller: Caller) -> None:
    """A whole request, whose caller has gone before it is answered."""
    await _leave(caller, lambda message, _: message)


async def _leave(caller: Caller, cut: Callable[[bytes, int], bytes]) -> None:
    form = caller.rng.choice(caller.pictures.forms)
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(cut(predict(caller.place, form, f"budget_ms={LONG_MS}"), len(form.body)))
        caller.saw(NOTHING, {NOTHING}, sent_s)


async def leave_mid_stream(caller: Caller) -> None:
    """One who has seen enough after the first rung, and breaks the connection."""
    form = caller.rng.choice(caller.pictures.forms)
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(predict(caller.place, form, f"budget_ms={LONG_MS}&stream=sse"))
        try:
            status, _ = await line.head()
            if status == "200":
                await line.part()
        except (asyncio.IncompleteReadError, ConnectionError):
            status = NOTHING
        caller.saw(status, ANSWERED, sent_s, outcome="" if status == "200" else None, shares_runs=True)
        line.reset()


async def reset(caller: Caller) -> None:
    """A whole request on a connection that is broken before anybody has read it, perhaps."""
    form = caller.rng.choice(caller.pictures.forms)
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(predict(caller.place, form, f"budget_ms={LONG_MS}"))
        await asyncio.sleep(caller.rng.choice((0.0, 0.001, 0.01)))
        line.reset()
        caller.saw(NOTHING, {NOTHING}, sent_s, counts="perhaps")


async def half_close(caller: Caller) -> None:
    """One who ends its own half of the connection at once; a server may take that for leaving."""
    form = caller.rng.choice(caller.pictures.forms)
    query = f"budget_ms={LONG_MS}"
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(predict(caller.place, form, query))
        line.end_sending()
        response = await line.response()
        complaint = complaint_of_predict(caller, form, response, query)
        caller.saw(
            response.status, ANSWERED | {NOTHING}, sent_s, complaint=complaint, shares_runs=True, outcome=""
        )


# ---- those who dawdle, hoard, or send too much ----


async def silent(caller: Caller) -> None:
    """A connection, and not a word on it."""
    async with http(caller) as line:
        sent_s = time.monotonic()
        said = await line.rest()
        caller.saw(NOTHING, {NOTHING}, sent_s, counts="not", complaint=f"said {said[:40]!r}" if said else "")


async def slow_head(caller: Caller) -> None:
    """A head, some bytes at a time, that will never be there."""
    async with http(caller) as line:
        sent_s = time.monotonic()
        dripping = asyncio.create_task(
            _drip(line, itertools.repeat(b"X-A: b\r\n"), b"POST /predict HTTP/1.1\r\n")
        )
        response = await line.response()
        dripping.cancel()
        caller.saw(response.status, {"408"}, sent_s, counts="not")


async def slow_body(caller: Caller) -> None:
    """A body, one byte at a time; refused when the budget ends or the time for a body, whichever is first."""
    budget_ms = caller.rng.choice((100, 10_000))
    form = raw_forms(caller, 1)[0]
    message = predict(caller.place, Form(RAW, b"", None), f"budget_ms={budget_ms}", n_declared=len(form.body))
    async with http(caller) as line:
        sent_s = time.monotonic()
        dripping = asyncio.create_task(_drip(line, itertools.repeat(b"x"), message))
        response = await line.response()
        dripping.cancel()
        caller.saw(response.status, {"408"} if budget_ms > 100 else {"429"}, sent_s)


async def _drip(line: Line, drops: Iterator[bytes], first: bytes) -> None:
    await line.send(first)
    for drop in drops:
        await asyncio.sleep(0.1)
        await line.send(drop)


async def oversize(caller: Caller) -> None:
    """A body without end, in chunks."""
    head = in_chunks(caller.place, Form(RAW, b"", None), f"budget_ms={LONG_MS}").removesuffix(b"0\r\n\r\n")
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    async with http(caller) as line:
        sent_s = time.monotonic()
        pouring = asyncio.create_task(_pour(line, head, chunk, 2 * caller.place.max_body_bytes))
        response = await line.response()
        pouring.cancel()
        caller.saw(response.status, {"413"} | BUSY, sent_s)


async def _pour(line: Line, head: bytes, chunk: bytes, n_bytes: int) -> None:
    await line.send(head)
    for _ in range(math.ceil(n_bytes / len(chunk))):
        await line.send(chunk)


async def hoard(caller: Caller) -> None:
    """One who asks for large answers and takes nothing of them: it must be let go.

    The names of its requests come back, so that they make an answer as large as a body may be.
    """
    place, loop = caller.place, asyncio.get_running_loop()
    form = raw_forms(caller, 1)[0]
    document = json.loads(
        infer(caller, [form], LONG_MS, is_binary=False, model=place.model).partition(b"\r\n\r\n")[2]
    )
    document["id"] = "x" * (place.max_body_bytes * 7 // 8)
    message = post(f"/v2/models/{place.model}/infer", json.dumps(document).encode(), {}, key=place.key)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_READER_BYTES)
        sock.setblocking(False)
        await loop.sock_connect(sock, (place.host, place.port))
        sent_s = time.monotonic()
        asking = asyncio.create_task(loop.sock_sendall(sock, message * N_HOARDED))
        until_s = sent_s + PATIENCE_S / 2  # a busy server takes its time until it has so much to say
        is_held = True
        while is_held and time.monotonic() < until_s:
            await asyncio.sleep(0.5)
            is_held = sock.getsockname()[1] in held_by(place.port)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    for _ in range(N_HOARDED):
        complaint = "a reader that took nothing was waited for" if is_held else ""
        caller.saw(NOTHING, {NOTHING}, sent_s, counts="perhaps", complaint=complaint)


def held_by(port: int) -> frozenset[int]:
    """Ports from which somebody is connected to this one, as far as the process behind this one holds on.

    What a process has closed, but what the system cannot get rid of (nobody takes the rest), is not held.

    Source: proc_net_tcp.txt of the kernel's documentation; a closed socket has no inode.
    """
    held = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                cells = row.split()
                local, remote = (int(cells[place].rpartition(":")[2], 16) for place in (1, 2))
                if local == port and cells[3] != LISTENING and cells[9] != "0":
                    held.add(remote)
    return frozenset(held)


async def pipeline_too_much(caller: Caller, n: int) -> None:
    """More requests ahead than may be: the connection is closed, and nobody can say how many were served."""
    form = raw_forms(caller, 1)[0]
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(predict(caller.place, form, f"budget_ms={LONG_MS}") * n)
        await line.rest()
        for _ in range(n):
            caller.saw(NOTHING, {NOTHING}, sent_s, counts="perhaps")


# ---- those who meet a failing run ----


async def spring(caller: Caller, trap: Trap) -> None:
    """Send a picture with which the run fails, lasts, or gives NaN."""
    place, pictures = caller.place, caller.pictures
    image_HWC = artifacts.marked(pictures.images_NHWC[caller.rng.randrange(len(pictures.images_NHWC))], trap)
    form = Form(RAW, np.ascontiguousarray(image_HWC).tobytes(), None)
    expected = {"raise": {"500"}, "nan": {"500"}, "raise deep": {"200"}, "stall": {"200"}}[trap]
    async with http(caller) as line:
        sent_s = time.monotonic()
        await line.send(predict(place, form, f"budget_ms={LONG_MS}"))
        response = await line.response()
        caller.saw(response.status, expected | BUSY, sent_s, shares_runs="500" not in expected)


# ---- the administrator ----


async def change(place: Place, model: str, verb: str, parameters: Mapping[str, object]) -> tuple[str, str]:
    """Have the server load or unload a model; returns the status and what it says."""
    async with connected(place.host, place.port) as line:
        await line.send(_change(place, model, verb, parameters))
        response = await line.response()
        return response.status, response.body.decode()


async def begin_change(place: Place, model: str, verb: str, parameters: Mapping[str, object]) -> None:
    """The same, by an administrator who does not wait for the end."""
    async with connected(place.host, place.port) as line:
        await line.send(_change(place, model, verb, parameters))
        await asyncio.sleep(0.1)


def _change(place: Place, model: str, verb: str, parameters: Mapping[str, object]) -> bytes:
    body = json.dumps({"parameters": parameters}).encode()
    return post(f"/v2/repository/models/{model}/{verb}", body, {}, key=place.admin_key)
