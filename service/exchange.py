"""One HTTP request as the outermost layer sees it: its body in, its response out, and whether anybody waits.

Must not know what is asked or answered.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson
from starlette.types import Message, Receive, Scope, Send

from service import compression
from service.errors import BodyTimeout, CallerGone, Problem, Reason, Rejected, TooLarge
from service.protocol import CONNECTION, READ, StampedProtocol
from service.record import Record
from service.settings import Settings
from service.turns import has_waited

Headers = Sequence[tuple[bytes, bytes]]
Refuse = Callable[[str, Reason], Rejected]
"""Makes a refusal from a sentence for the caller and from what took the time."""

PROBLEM_HEADER = (b"content-type", b"application/problem+json")
CLOSE: Headers = ((b"connection", b"close"),)


class Room:
    """Memory for the bodies of all open requests together.

    Args:
        limit_bytes: Of all.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes

    def take(self, n_bytes: int) -> bool:
        """Have so much of it; false if it is not there."""
        if n_bytes > self._left_bytes:
            return False
        self._left_bytes -= n_bytes
        return True

    def give_back(self, n_bytes: int) -> None:
        """Have it no longer."""
        self._left_bytes += n_bytes


@dataclass(slots=True)
class Exchange:
    """One request, and the way to whoever sent it.

    Args:
        scope: ASGI's.
        receive: ASGI's.
        send: ASGI's.
        headers: The request's, by lower-case name; of a name that comes twice the last.
        record: What is learnt of it.
    """

    scope: Scope
    receive: Receive
    send: Send
    headers: Mapping[bytes, bytes]
    record: Record
    n_taken_bytes: int = 0
    """Of the room for bodies."""

    @property
    def request_id(self) -> tuple[bytes, bytes]:
        """The header that names this request in its response."""
        return b"x-request-id", self.record.request_id.encode()

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole response."""
        connection = self._connection
        if connection and connection.answer(self.send, status, (*headers, self.request_id), body):
            self.record.status = status
            return
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.send({"type": "http.response.body", "body": body})

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of a response."""
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, self.request_id, *farewell(self.scope)],
        }
        await self.send(message)
        self.record.status = status

    async def send_part(self, part: bytes, *, is_last: bool = False) -> None:
        """Send a part of a body whose length was not told."""
        await self.send({"type": "http.response.body", "body": part, "more_body": not is_last})

    async def body(
        self,
        settings: Settings,
        clock: Callable[[], float],
        deadline_s: float,
        refuse: Refuse,
        room: Room,
    ) -> bytes:
        """Read the body within its bounds; one that is slower than the budget is refused when that ends.

        Args:
            settings: The bounds.
            clock: Monotonic time [s].
            deadline_s: On that clock; infinity if the body itself says what the budget is.
            refuse: Makes the refusal of a request whose budget has ended, or for which there is no room.
            room: For the bodies of all requests; whoever ends the exchange gives `n_taken_bytes` back.

        Raises:
            TooLarge: more bytes than the setting `max_body_bytes`, declared, sent or undone.
            UnsupportedEncoding: it is compressed in a way that is not taken.
            BodyTimeout: it took longer than the setting `body_timeout_s`.
            Rejected: it took longer than the budget, or other bodies fill the room.
            CallerGone: it will never come.
        """
        limit = settings.max_body_bytes
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        timeout_s, left_s = settings.body_timeout_s, deadline_s - clock()
        try:
            connection = self._connection
            if connection and connection.has_whole_body and b"content-encoding" not in self.headers:
                body = connection.take_body()  # nothing is to be waited for, so no timer is needed
                self._count(len(body), len(body), limit, room, refuse)
                return body
            async with asyncio.timeout(min(left_s, timeout_s)):
                return await self._awaited_body(limit, room, refuse)
        except TimeoutError as error:
            if left_s <= timeout_s:
                raise refuse(
                    "The budget was used up before the picture was here: grant more or send it faster.",
                    "body",
                ) from error
            raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s: send it faster.") from error
        finally:
            self.record.body_ended_s = clock()

    async def _awaited_body(self, limit: int, room: Room, refuse: Refuse) -> bytes:
        body = bytearray()
        is_last = False
        while not is_last:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            part = message.get("body", b"")
            self._count(len(part), len(body) + len(part), limit, room, refuse)
            body += part
            is_last = not message.get("more_body")
        encoding = self.headers.get(b"content-encoding", b"").decode("latin-1")
        if not encoding:
            return bytes(body)
        # In a thread: a few kilobytes may become as many as are allowed.
        undone = await asyncio.to_thread(compression.undo, encoding, bytes(body), limit)
        self._take(room, len(undone), refuse)
        return undone

    def _count(self, n_bytes: int, n_all_bytes: int, limit: int, room: Room, refuse: Refuse) -> None:
        """Take a part of the body in."""
        self.record.n_body_bytes += n_bytes
        if n_all_bytes > limit:
            raise _too_large(limit)
        self._take(room, n_bytes, refuse)

    @property
    def _connection(self) -> StampedProtocol | None:
        """What the request came through; None under another server than our own."""
        connection: StampedProtocol | None = self.scope.get(CONNECTION)
        return connection

    def _take(self, room: Room, n_bytes: int, refuse: Refuse) -> None:
        if not room.take(n_bytes):
            raise refuse(
                "The bodies of other requests fill the memory that there is for them: retry later.", "load"
            )
        self.n_taken_bytes += n_bytes

    @contextlib.contextmanager
    def called_when_gone(self, leave: Callable[[], None]) -> Iterator[None]:
        """Call when the connection is lost.

        Any server says so to a task that waits for it; our own protocol does without one.
        """
        connection = self._connection
        if connection is None:
            watcher = asyncio.create_task(_leave_when_gone(self.receive, leave))
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


def farewell(scope: Scope) -> Headers:
    """The header that ends the connection, if this answer is to be its last."""
    connection: StampedProtocol | None = scope.get(CONNECTION)
    return CLOSE if connection and connection.is_last_answer else ()


def arrival(scope: Scope, now_s: float) -> tuple[float, bool]:
    """When a request came, as far as that can be known [s], and whether the event loop was at work then."""
    if (read := scope.get(READ)) is None:
        return now_s, False
    read_s, turn, place = read
    waited_s = turn.waited_s(place)
    return read_s - waited_s, has_waited(waited_s)


def problem_document(problem: Problem) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an RFC 9457 problem document."""
    return problem.status, [PROBLEM_HEADER, *problem_headers(problem)], orjson.dumps(problem.document)


def problem_headers(problem: Problem) -> Headers:
    """The headers that belong to a problem, whatever its body looks like."""
    return [(name.encode(), value.encode()) for name, value in problem.headers.items()]


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body has more than {limit} bytes: send a smaller picture.")
