"""Sends requests over HTTP/1.1 when they are due, whatever has become of those before: an open loop.

A slow server so gets the load it was to get, and what it delays counts against it (no coordinated omission).
Everything that can be is prepared before the first request and judged after the last, because generator and
server may share cores. Must not know schedules, artifacts, or what makes an answer good.
"""

import asyncio
import contextlib
import gc
import json
import math
import re
import selectors
import urllib.parse
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

Head = Callable[[urllib.parse.SplitResult, float, str, int], bytes]
"""From the server's address, a budget [s], a content type and the length of a body [bytes] to all that is
sent before that body."""

MAX_CONNECTIONS = 900
"""select() takes no file handle from 1,024 on, and a process has others open."""

N_SPARE = 16
"""Free connections to keep ready. Larger finds more of them in a burst; smaller leaves less to keep alive."""

IDLE_S = 4.0
"""A connection idle for longer is not used again. Larger than the server's own limit (uvicorn's is 5 s) loses
requests on connections that it is about to close; smaller opens more anew."""

HEAD = re.compile(
    rb"HTTP/1\.1 (\d{3}) .*?\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE | re.DOTALL
)
CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request. Times are seconds since the start, by the generator's monotonic clock.

    Attributes:
        image: Which body was sent.
        due_s: When it was to be sent.
        sent_s: When it was handed to the socket; NaN if it never was.
        done_s: When the last byte of the response was read; NaN without one.
        status: Of the response; 0 without one: the connection was lost, or time was up.
        body: Of the response.
        noticed_s: When the generator saw that it was due, to send it once a connection is free; NaN if never.
    """

    image: int
    due_s: float
    sent_s: float
    done_s: float
    status: int
    body: bytes
    noticed_s: float = math.nan

    @property
    def lag_s(self) -> float:
        """How late it was sent, waits for a connection included; NaN if it never was."""
        return self.sent_s - self.due_s

    @property
    def own_lag_s(self) -> float:
        """How late the generator itself was; NaN if it never saw the request.

        A server that leaves every connection without a response, or accepts no more, keeps requests from
        being sent. That is its doing, and counts in the latency.
        """
        return self.noticed_s - self.due_s


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an answer says; the fields are named and measured as in the response of /predict."""

    columns_run: tuple[str, ...]
    index: int
    deadline_met: bool
    stopped_by: str
    elapsed_ms: float
    timing_ms: Mapping[str, float]


def read_reply(reply: Reply) -> Prediction:
    """Read the answer in a reply of status 200.

    Raises:
        ValueError: the reply has another status, or its body is no JSON.
        KeyError: the body lacks a field; is it /predict that has answered?
    """
    if reply.status != 200:
        raise ValueError(f"a reply of status {reply.status} holds no prediction: read those of status 200")
    answer = json.loads(reply.body)
    return Prediction(
        columns_run=tuple(answer["columns_run"]),
        index=answer["index"],
        deadline_met=answer["deadline_met"],
        stopped_by=answer["stopped_by"],
        elapsed_ms=answer["elapsed_ms"],
        timing_ms=answer["timing_ms"],
    )


def run(sending: Coroutine[Any, Any, T]) -> T:
    """Run `send(...)` in an event loop of its own, with timers finer than a millisecond.

    Source: Python's select() hands the kernel microseconds, its epoll_wait() milliseconds, rounded up.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(sending)


async def send(
    url: str,
    at_s: Sequence[float] | NDArray[np.float64],
    budget_s: Sequence[float] | NDArray[np.float64],
    image: Sequence[int] | NDArray[np.int64],
    bodies: Sequence[bytes],
    *,
    content_type: str,
    head: Head | None = None,
    max_connections: int = 256,
    timeout_s: float = 10.0,
) -> list[Reply]:
    """Send request i at `at_s[i]` after the start, on a kept connection that is free, or else on a new one.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        at_s: When each request is due [s, from the start]; ascending, 0 or later.
        budget_s: What each grants [s].
        image: Which of the bodies each sends.
        bodies: What can be sent.
        content_type: Of all bodies.
        head: What stands before a body; `predict_head` if not given. Called once for each budget and length,
            before the first request is sent.
        max_connections: When all of them are busy, a request waits for one; its lag shows it. 1 to 900.
        timeout_s: Whatever has no response this long after the last due time is lost [s].

    Returns:
        One reply per request, in the order given.

    Raises:
        ValueError: the arguments do not fit together; the message says what to do.
        OSError: nobody listens there: start the server first.

    Cost: done after the last due time and twice `timeout_s` at the latest. While it runs no garbage is
    collected: it is to be the only work of its process.
    """
    if not 1 <= max_connections <= MAX_CONNECTIONS:
        raise ValueError(
            f"max_connections is {max_connections}: give 1 to {MAX_CONNECTIONS}, select() takes no more"
        )
    address = urllib.parse.urlsplit(url)
    if address.scheme != "http" or address.hostname is None:
        raise ValueError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000")
    due_s: list[float] = np.asarray(at_s, np.float64).tolist()
    budgets_s: list[float] = np.asarray(budget_s, np.float64).tolist()
    images: list[int] = np.asarray(image, np.int64).tolist()
    if not len(due_s) == len(budgets_s) == len(images):
        raise ValueError(
            f"{len(due_s)} due times, {len(budgets_s)} budgets, {len(images)} images: give as many of each"
        )
    if due_s != sorted(due_s) or min(due_s, default=0) < 0:
        raise ValueError("at_s must be ascending and begin at 0 or later: sort the requests by it")
    if not 0 <= min(images, default=0) <= max(images, default=0) < max(1, len(bodies)):
        raise ValueError(f"image must be from 0 to {len(bodies) - 1}: it is an index into the bodies")
    if not due_s:
        return []
    head_of = cache(partial(head or predict_head, address))
    messages = [
        (head_of(each_s, content_type, len(bodies[i])), bodies[i])
        for each_s, i in zip(budgets_s, images, strict=True)
    ]
    sending = _Sending(due_s, messages, max_connections)
    try:
        await sending.connect(address.hostname, address.port or 80, timeout_s)
        with _without_garbage_collection():
            await sending.until_settled(timeout_s)
    finally:
        await sending.close()
    columns = (sending.sent_s, sending.done_s, sending.status, sending.body, sending.noticed_s)
    return [Reply(*row) for row in zip(images, due_s, *columns, strict=True)]


def predict_head(
    address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int
) -> bytes:
    """Ask this project's /predict."""
    budget_ms = f"{budget_s * 1e3:.6f}".rstrip("0").rstrip(".")  # as %g, but never with an exponent
    return (
        f"POST {address.path.rstrip('/')}/predict?budget_ms={budget_ms} HTTP/1.1\r\n"
        f"Host: {address.netloc}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {n_bytes}\r\n\r\n"
    ).encode("ascii")


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """No pause while it matters: what lives now need not be looked at, and little garbage comes to be."""
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        if not was_frozen:
            gc.unfreeze()


class _Sending:
    """All requests and all connections of one run; settles every request once."""

    def __init__(
        self, due_s: Sequence[float], messages: Sequence[tuple[bytes, bytes]], max_connections: int
    ) -> None:
        n = len(due_s)
        self.noticed_s, self.sent_s, self.done_s = [math.nan] * n, [math.nan] * n, [math.nan] * n
        self.status, self.body = [0] * n, [b""] * n
        self._due_s, self._messages, self._max_connections = due_s, messages, max_connections
        self._loop = asyncio.get_running_loop()
        self._all_settled: asyncio.Future[None] = self._loop.create_future()
        self._n_open_requests = n
        self._n_due = 0
        self._start_s = 0.0
        self._waiting: deque[int] = deque()
        self._free: deque[_Connection] = deque()
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._n_opening = 0
        self._is_closing = False

    async def connect(self, host: str, port: int, timeout_s: float) -> None:
        """Find the server, and open the first connections ahead."""
        async with asyncio.timeout(timeout_s):
            self._n_opening += 1
            transport, _ = await self._loop.create_connection(lambda: _Connection(self), host, port)
            self._address = transport.get_extra_info("peername")[:2]  # no name is looked up from here on
            self._replenish()
            await asyncio.gather(*self._opening)

    async def until_settled(self, timeout_s: float) -> None:
        """Send everything when it is due, and wait for what comes back."""
        self._start_s = self._loop.time()
        end = self._loop.call_at(self._start_s + self._due_s[-1] + timeout_s, self._finish)
        self._send_due()
        await self._all_settled
        end.cancel()

    async def close(self) -> None:
        """Cut every connection; what has no response by now is lost."""
        self._is_closing = True
        self._waiting.clear()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in self._connections:
            connection.transport.abort()
        await asyncio.gather(*(connection.closed for connection in self._connections))

    def now_s(self) -> float:
        return self._loop.time() - self._start_s

    def settle(self, request: int, status: int, body: bytes, done_s: float) -> None:
        """Note the end of a request that was sent, or that never can be."""
        self.status[request], self.body[request], self.done_s[request] = status, body, done_s
        self._n_open_requests -= 1
        if not self._n_open_requests:
            self._finish()

    def opened(self, connection: "_Connection") -> None:
        self._n_opening -= 1
        self._connections.add(connection)
        self.freed(connection)

    def freed(self, connection: "_Connection") -> None:
        connection.free_since_s = self._loop.time()
        self._free.append(connection)
        if self._waiting:
            self._send_waiting()

    def lost(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        with contextlib.suppress(ValueError):
            self._free.remove(connection)
        self._replenish()

    def _send_due(self) -> None:
        if self._is_closing:
            return
        now_s = self.now_s()
        while self._n_due < len(self._due_s) and self._due_s[self._n_due] <= now_s:
            self.noticed_s[self._n_due] = now_s
            self._waiting.append(self._n_due)
            self._n_due += 1
        self._send_waiting()
        if self._n_due < len(self._due_s):
            self._loop.call_at(self._start_s + self._due_s[self._n_due], self._send_due)

    def _send_waiting(self) -> None:
        while self._waiting and (connection := self._take()):
            request = self._waiting.popleft()
            head, body = self._messages[request]
            self.sent_s[request] = self.now_s()
            connection.ask(request, head + body)
        self._replenish()

    def _take(self) -> "_Connection | None":
        """The one that has been free for longest: in turn, none idles until the server closes it."""
        while self._free:
            connection = self._free.popleft()
            if connection.transport.is_closing():
                continue
            if self._loop.time() - connection.free_since_s <= IDLE_S:
                return connection
            connection.transport.abort()
        return None

    def _replenish(self) -> None:
        wanted = len(self._waiting) + N_SPARE - len(self._free) - self._n_opening
        possible = self._max_connections - len(self._connections) - self._n_opening
        for _ in range(0 if self._is_closing else min(wanted, possible)):
            self._n_opening += 1
            task = self._loop.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            await self._loop.create_connection(lambda: _Connection(self), *self._address)
        except OSError:  # refused, or out of file handles: those waiting get a connection that others leave
            self._n_opening -= 1
            if not self._connections and not self._n_opening:
                while self._waiting:
                    self.settle(self._waiting.popleft(), 0, b"", math.nan)

    def _finish(self) -> None:
        if not self._all_settled.done():
            self._all_settled.set_result(None)


class _Connection(asyncio.Protocol):
    """Carries one request at a time; reads responses that say how long they are."""

    def __init__(self, sending: _Sending) -> None:
        self.transport: asyncio.Transport
        self.free_since_s = 0.0
        self.closed = asyncio.get_running_loop().create_future()
        self._sending = sending
        self._request: int | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._sending.opened(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self._request is not None:
            self._sending.settle(self._request, 0, b"", math.nan)
        self._sending.lost(self)
        self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        received = self._received
        end_of_head = received.find(b"\r\n\r\n")
        if end_of_head < 0:
            return
        head = HEAD.match(received, 0, end_of_head + 2)
        if self._request is None or head is None:  # nothing was asked, or it cannot be understood
            self.transport.abort()
            return
        end = end_of_head + 4 + int(head[2])
        if len(received) < end:
            return
        request, self._request, self._received = self._request, None, b""
        self._sending.settle(request, int(head[1]), received[end_of_head + 4 : end], self._sending.now_s())
        if len(received) > end or CLOSE.search(received, 0, end_of_head + 2):
            self.transport.abort()
        else:
            self._sending.freed(self)

    def ask(self, request: int, message: bytes) -> None:
        self._request = request
        self.transport.write(message)
