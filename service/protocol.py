"""uvicorn's HTTP/1.1 protocol with bounds on what a connection may cost, and less time spent on each request.

Must not know what is served.
"""

import asyncio
import contextlib
import math
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httptools
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_remote_addr

from service.access import client_of
from service.errors import STOPPING, HeadTimeout, HeadTooLarge, Malformed, Problem
from service.settings import Settings, SettingsError
from service.turns import Turns

READ = "anytime.read"
"""Key in the ASGI scope: when the first byte of the request was read [s, time.monotonic], in which `Turn` of
the event loop, and at which place."""

CONNECTION = "anytime.connection"
"""Key in the ASGI scope: the `StampedProtocol` that the request came through."""

HEAD = b"HTTP/1."

FAREWELL_S = 1.0
"""How long is read on from a caller that was told to close [s]: a few times the way there and back, anywhere.
Larger: slower restarts."""

MIN_HOPS = ((socket.IPPROTO_IP, 21), (socket.IPPROTO_IPV6, 73))
"""Linux's IP_MINTTL and IPV6_MINHOPCOUNT: packets whose counter of hops is below that are not taken."""

N_OTHER_FILES = 128
"""Open files beside connections: the event loop's, the artifact's while it is loaded, libraries, logs."""


def connection_options(connections: "Connections") -> dict[str, Any]:
    """What uvicorn's Config has to be told so that connections keep to the settings."""
    settings = connections.settings
    return {
        "http": partial(StampedProtocol, connections),
        "ws": "none",
        # uvicorn's own default believes whoever connects from this machine.
        "proxy_headers": bool(settings.forwarded_allow_ips),
        "forwarded_allow_ips": list(settings.forwarded_allow_ips),
    }


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS 1.2 or later with the operator's certificate; None without one.

    Raises:
        SettingsError: a file cannot be used.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    password = settings.tls_key_password
    try:
        # Never None: OpenSSL would ask on the terminal and wait.
        context.load_cert_chain(
            settings.tls_certificate,
            settings.tls_key,
            password=lambda: password.get_secret_value() if password else "",
        )
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"ANYTIME_TLS_CERTIFICATE {settings.tls_certificate} and ANYTIME_TLS_KEY {settings.tls_key} "
            f"cannot be used ({_reason(error)}): give a PEM certificate and its private key, and "
            "ANYTIME_TLS_KEY_PASSWORD if that is encrypted."
        ) from error
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise SettingsError(
                f"ANYTIME_TLS_CLIENT_CA {settings.tls_client_ca} cannot be used ({_reason(error)}): give a "
                "PEM file with certificates of authorities."
            ) from error
    return context


def allow_open_files(settings: Settings) -> None:
    """Have the system allow as many open files as there may be connections; where it has such a bound.

    Raises:
        SettingsError: it does not.
    """
    try:
        import resource  # noqa: PLC0415 - Windows has none, and no such bound
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + N_OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"ANYTIME_MAX_CONNECTIONS {settings.max_connections} needs {needed} open files and the system "
            f"allows {hard}: lower it, or raise the limit with ulimit -n or LimitNOFILE."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def turn_away(listener: socket.socket) -> None:
    """Have the system ignore who wants to connect from now on, where it can; who has begun to is let in.

    Nobody's packets have a counter of 255, which is what keeps strangers from routers (RFC 5082); unlike a
    packet filter it needs no privilege. Callers ask again after a second, and are refused if it is closed.
    """
    _take_hops(listener, 255)


def _take_hops(of: Any, least: int) -> None:
    """Set the counter that packets must have; of a socket, or what an event loop has for one."""
    if sys.platform == "linux":
        for level, option in MIN_HOPS:
            with contextlib.suppress(OSError):  # of the other version of IP, or of a system that has none
                of.setsockopt(level, option, least)


class Connections:
    """What all connections of one server share: their bounds, how many there are of whom, and their end.

    Nobody's request is lost when the server stops. As long as `is_closing`, every answer says that it is the
    last on its connection. `close_idle` leaves time for one more request to those that are not in use. Who is
    silent until that is over is told as well: a request that is already on its way then finds an answer.

    Args:
        settings: The bounds.
        tls: Secures every connection; None if none is.

    Raises:
        SettingsError: the files for TLS cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tls = tls_context(settings)
        self.keep_alive_s = settings.keep_alive_s
        """How long an idle connection is kept now."""
        self.watch_s = min(settings.header_timeout_s, settings.keep_alive_s, settings.send_timeout_s)
        self.is_closing = False
        """Every answer is to be the last of its connection."""
        self.turns = Turns()
        self._entered: set[StampedProtocol] = set()
        self._n_by_client = Counter[str]()
        self._none_left = asyncio.Event()
        self._none_left.set()

    def enter(self, connection: "StampedProtocol", client: str) -> bool:
        """Count a new connection; False if there is no room for it."""
        most, most_each = self.settings.max_connections, self.settings.max_connections_per_client
        if len(self._entered) >= most or (most_each and self._n_by_client[client] >= most_each):
            return False
        self._entered.add(connection)
        self._n_by_client[client] += 1
        self._none_left.clear()
        return True

    def leave(self, connection: "StampedProtocol", client: str) -> None:
        """Count a connection no more."""
        self._entered.remove(connection)
        self._n_by_client[client] -= 1
        if not self._n_by_client[client]:
            del self._n_by_client[client]
        if not self._entered:
            self._none_left.set()

    def close_idle(self, after_s: float) -> None:
        """From now on, close every connection on which nothing has been asked for so long."""
        self.is_closing = True
        self.keep_alive_s = min(self.keep_alive_s, after_s)
        self.watch_s = min(self.watch_s, after_s)
        for connection in tuple(self._entered):
            connection.hurry(after_s)

    async def wait_for_none(self, timeout_s: float) -> None:
        """Wait until there are no connections any more, at most for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()

    def break_off(self, *, only_half_answered: bool) -> None:
        """Abort connections: those that have a part of an answer, or all."""
        for connection in tuple(self._entered):
            connection.break_off(only_half_answered=only_half_answered)


class StampedProtocol(HttpToolsProtocol):
    """Bounds a connection, notes when a request came, tells of a loss, sends head and body together.

    uvicorn starts the application one turn of the event loop later, and a busy loop's turn takes
    milliseconds; it has an application wait in a task of its own for the caller to leave; it writes head
    and body one by one: twice the system calls, and the client is woken up for a head; and it makes a timer
    for each response. Here one timer for each connection looks after everything that may take too long, and
    finds when that would be when it rings.

    Args:
        connections: Those of this server.
        uvicorns: What uvicorn gives to its own protocol.
    """

    on_lost: set[Callable[[], None]]
    is_lost: bool

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._all = connections
        self._bounds = connections.settings
        self._client: str | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._early = b""
        self._watcher: asyncio.TimerHandle | None = None
        self._due_s = math.inf
        """When the caller must have done the next thing; infinity while it is owed an answer [s]."""
        self._serving: RequestResponseCycle | None = None
        self._is_open = False
        self._is_in_head = False
        self._is_deaf = False
        self._n_head_bytes = 0
        self._n_around_bytes = 0
        self._n_taken_bytes = 0
        self._taken_s = 0.0

    # ---- the connection ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, if there is room for it, and secure it, if it is to be.

        Without room it is closed without a word: to read a request first would be to take it.
        """
        self.on_lost = set()
        self.is_lost = False
        if self._all.is_closing:  # it may have inherited that nobody is heard
            _take_hops(transport.get_extra_info("socket"), 0)
        peer = get_remote_addr(transport)
        client = client_of(peer[0]) if peer else ""
        if not self._all.enter(self, client):
            transport.abort()
            return
        self._client = client
        if self._all.tls:
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._shake_hands(transport, self._all.tls))
        else:
            self._open(transport)

    async def _shake_hands(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Secure the connection; here and not in the listener, whose handshakes nobody counts or bounds."""
        timeout_s = self._bounds.header_timeout_s
        handshake = self.loop.create_task(
            self.loop.start_tls(transport, self, tls, server_side=True, ssl_handshake_timeout=timeout_s)
        )
        await asyncio.sleep(0)  # its first step puts TLS between the connection and us
        self._hand_over_to(transport.get_protocol())
        try:
            secured = await handshake
        except OSError:  # the caller's business: ssl.SSLError, a timeout and a lost connection all are
            transport.abort()
            self._leave()
        else:
            if secured and not self.is_lost:
                self._open(secured)

    def _hand_over_to(self, tls: Any) -> None:
        """Give what was read before TLS was there to it: uvloop reads on, however it was told to pause.

        Args:
            tls: A buffered protocol, as asyncio has them; uvloop's does not inherit from asyncio's.
        """
        if self._early:
            early, self._early = self._early, b""
            memoryview(tls.get_buffer(len(early)))[: len(early)] = early
            tls.buffer_updated(len(early))

    def _open(self, transport: asyncio.Transport) -> None:
        """Put the joining transport between uvicorn and the connection."""
        super().connection_made(_JoiningTransport(transport, self._close))  # type: ignore[arg-type]
        self._is_open = True
        self._due_s = time.monotonic() + self._bounds.header_timeout_s
        self._watch()
        if self._early:
            early, self._early = self._early, b""
            self.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell those who asked to be told.

        uvicorn tells only the request that came last, and takes the one that is being served for a fault if
        others wait behind it on the connection.
        """
        if self._serving and not self._serving.response_complete:
            self._serving.disconnected = True
            self._serving.message_event.set()
        self.is_lost = True
        if self._is_open:
            super().connection_lost(exc)
        if self._watcher:
            self._watcher.cancel()
        self._leave()
        for tell in tuple(self.on_lost):
            tell()

    def _leave(self) -> None:
        if self._client is not None:
            self._all.leave(self, self._client)
            self._client = None

    # ---- what comes in ----

    def data_received(self, data: bytes) -> None:
        """Parse, and count what is neither head nor body: around and after chunks, before the first line."""
        if not self._is_open:  # before the handshake, or the first request that came with its end
            self._early += data
            return
        if self._is_deaf:
            return
        self._all.turns.begin(time.monotonic())
        self._n_around_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The parser has lost its place, and what follows must not be taken for another request.
            self._is_deaf = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            why = error.__context__
            if not isinstance(why, Problem):
                why = Malformed(f"This is no HTTP/1.1 request ({error}): send what RFC 9112 describes.")
            self._refuse(why)
        else:
            if self._n_around_bytes > self._bounds.max_header_bytes:
                self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        """Take the time."""
        super().on_message_begin()
        now_s = time.monotonic()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[READ] = (now_s, *self._all.turns.take_place())
        scope[CONNECTION] = self
        self._is_in_head = True
        self._n_head_bytes = self._n_around_bytes = 0
        if self._due_s < math.inf:  # otherwise an answer is owed, and until then nothing is read
            self._due_s = now_s + self._bounds.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """Count."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count; what comes after a body is no header, and the application has seen the headers by then."""
        self._count_head(len(name) + len(value))
        if self._is_in_head:
            super().on_header(name, value)

    def _count_head(self, n_bytes: int) -> None:
        self._n_head_bytes += n_bytes + 4  # a colon, a blank, the end of the line
        if self._n_head_bytes > self._bounds.max_header_bytes:
            raise self._head_too_large()

    def _head_too_large(self) -> HeadTooLarge:
        most = self._bounds.max_header_bytes
        return HeadTooLarge(
            f"A request's line and headers may have {most} bytes: send fewer or shorter ones."
        )

    def on_headers_complete(self) -> None:
        """Have the request served, now or in its turn.

        Raises:
            Malformed: too many have their turn before it, or it is to be more than a request.
        """
        if self.parser.should_upgrade() and (
            self.parser.get_method() == b"CONNECT"
            or any(name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers)
        ):
            # httptools does not read the body of such a request: it would be taken for the next one.
            raise Malformed("This server speaks HTTP/1.1 and is no proxy: send no Upgrade with a body.")
        if self._due_s == math.inf and len(self.pipeline) >= self._bounds.max_pipelined_requests:
            raise Malformed("Too many requests were sent ahead: wait for the answers.")
        super().on_headers_complete()
        self._is_in_head = False
        self._n_around_bytes = 0
        self._due_s = math.inf

    def on_body(self, body: bytes) -> None:
        """Take what surrounds a body for as much as the body at most, so that chunks are not refused."""
        self._n_around_bytes = max(0, self._n_around_bytes - 2 * len(body))
        super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._serving = cycle
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, partial(_without_chunks, cycle, app) if is_old else app)

    def on_response_complete(self) -> None:
        """Turn to the next request; as uvicorn's, but without a timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._is_deaf:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            wait_s = self._bounds.header_timeout_s if self._is_in_head else self._all.keep_alive_s
            self._due_s = time.monotonic() + wait_s

    @property
    def has_whole_body(self) -> bool:
        """Whether the request that is being served is here to its last byte."""
        return self._serving is not None and not self._serving.more_body

    def take_body(self) -> bytes:
        """The body of the request that is being served, once all of it is here; as ASGI's `receive`."""
        cycle = self._serving
        assert cycle is not None  # noqa: S101 - for the type checker: a request is being served
        body, cycle.body = bytes(cycle.body), bytearray()
        cycle.flow.resume_reading()  # else nobody learns that the caller has gone
        cycle.message_event.clear()
        return body

    def answer(self, send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole answer to the request that is being served, in a third of the time that ASGI takes.

        Args:
            send: What ASGI gave for this request; somebody else's would want to see the answer.
            status: HTTP's.
            headers: All but the body's length. They are not looked at: none may come from a caller unchecked.
            body: To be sent as it is.

        Returns:
            Whether that was done: an answer that is not of the usual kind takes the long way.
        """
        cycle = self._serving
        if cycle is None or send != cycle.send or not cycle.keep_alive or cycle.scope["method"] == "HEAD":
            return False
        if cycle.response_started or cycle.disconnected or cycle.flow.write_paused or self.is_last_answer:
            return False
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        joining: _JoiningTransport = self.transport  # type: ignore[assignment]
        cycle.waiting_for_100_continue = False
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        joining.write_whole(
            b"%b%bcontent-length: %d\r\n\r\n%b" % (STATUS_LINE[status], b"".join(lines), len(body), body)
        )
        cycle.on_response()
        return True

    # ---- the end ----

    @property
    def is_last_answer(self) -> bool:
        """Whether the answer that begins now is to say that the connection will be closed after it."""
        return self._all.is_closing and not self.pipeline

    def hurry(self, after_s: float) -> None:
        """Expect the next request, or the rest of its head, within this time; what is owed has its own."""
        if self._is_open and not self._is_deaf and self._due_s < math.inf:
            self._due_s = min(self._due_s, time.monotonic() + after_s)
        if self._watcher:
            self._watcher.cancel()
            self._watch()

    def break_off(self, *, only_half_answered: bool) -> None:
        """Abort the connection, or do so only if an answer has begun and not ended."""
        if not self._is_open:
            if self._handshake and not only_half_answered:
                self._handshake.cancel()
        elif not only_half_answered or (
            self._serving and self._serving.response_started and not self._serving.response_complete
        ):
            self.transport.abort()

    def _close(self) -> None:
        """Close, as uvicorn asks; gently if the caller is still sending what nobody reads any more."""
        last: RequestResponseCycle | None = self.cycle
        if last and last.more_body and not (self._is_deaf or self.is_lost):
            self._close_gently(self._bounds.header_timeout_s)
        else:
            self._finish()

    def _close_gently(self, timeout_s: float) -> None:
        """End what is said, but read on and throw it away until the caller closes, at most for so long.

        To close at once would reset the connection while something is on its way here, and a reset takes back
        what the caller has not read yet.
        """
        self._is_deaf = True
        self._due_s = time.monotonic() + timeout_s
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _finish(self) -> None:
        joining: _JoiningTransport = self.transport  # type: ignore[assignment]
        self._is_deaf = True
        joining.finish()

    # ---- what takes too long, or is too much ----

    def _watch(self) -> None:
        """Break off what takes too long, and ring again when something next could."""
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._end_waiting()
        joining: _JoiningTransport = self.transport  # type: ignore[assignment]
        n_waiting = joining.get_write_buffer_size()
        n_taken_bytes = joining.n_written_bytes - n_waiting
        if not n_waiting or n_taken_bytes != self._n_taken_bytes:
            self._n_taken_bytes, self._taken_s = n_taken_bytes, now_s
        elif now_s - self._taken_s >= self._bounds.send_timeout_s:
            self.transport.abort()
            return
        next_s = min(self._due_s, self._taken_s + self._bounds.send_timeout_s, now_s + self._all.watch_s)
        self._watcher = self.loop.call_later(next_s - now_s, self._watch)

    def _end_waiting(self) -> None:
        """Close, because the next request or the rest of its head has not come.

        Who has sent nothing is told why only where it is our doing: of a request that has crossed it on the
        way, 408 says that it was not read (RFC 9110, section 15.5.9).
        """
        self._due_s = math.inf
        if self._is_deaf:
            self._finish()
        elif self._all.is_closing:
            self._say(HeadTimeout(STOPPING))
            self._close_gently(FAREWELL_S)
        else:
            if self._is_in_head:
                timeout_s = self._bounds.header_timeout_s
                self._say(
                    HeadTimeout(f"The headers did not arrive within {timeout_s:g} s: send them faster.")
                )
            self._finish()

    def _refuse(self, problem: Problem) -> None:
        """Take nothing more, and say why, if it is clear which request that answers."""
        owes_answer = self._due_s == math.inf
        if owes_answer or not self._is_in_head:
            if owes_answer and not (self._is_in_head or self.pipeline or self.cycle.response_started):
                self._say(problem)
            self._finish()
            return
        self._say(problem)
        self._close_gently(self._bounds.header_timeout_s)

    def _say(self, problem: Problem) -> None:
        body = orjson.dumps(problem.document)
        self.transport.write(
            b"%bcontent-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[problem.status], len(body), body)
        )


class _JoiningTransport:
    """Keeps the head of a response back until what follows it is written, or the loop turns.

    Args:
        transport: Of the connection.
        close: What is done when uvicorn closes it.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self.close = close
        self._held = b""
        self.n_written_bytes = 0

    def write(self, data: bytes) -> None:
        self.n_written_bytes += len(data)
        if not self._held and data.startswith(HEAD):
            self._held = data
            asyncio.get_running_loop().call_soon(self._release)
            return
        held, self._held = self._held, b""
        self._transport.write(held + data)

    def write_whole(self, answer: bytes) -> None:
        """Write an answer to its end."""
        self.n_written_bytes += len(answer)
        self._release()
        self._transport.write(answer)

    def write_eof(self) -> None:
        self._release()
        self._transport.write_eof()

    def finish(self) -> None:
        self._release()
        self._transport.close()

    def _release(self) -> None:
        if held := self._held:
            self._held = b""
            self._transport.write(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def _without_chunks(
    cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer a caller of HTTP/1.0, which knows no chunks: a body without a length ends with the connection.

    Source: RFC 9112, 6.1 and 6.3.
    """
    has_length = True

    async def send_plainly(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not has_length:  # uvicorn is told of one, and the caller is not
                cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
        elif not has_length and not message.get("more_body"):
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plainly)


def _reason(error: Exception) -> str:
    """What OpenSSL or the system says, without the place in its source."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
