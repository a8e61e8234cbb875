"""Callers that ask without a pause until nobody listens any more, and know of each request what became of it.

They write to sockets themselves, because what a client library does by itself (ask again, say nothing of a
connection that was closed) is what is to be seen. Know nothing of the server but HTTP.
"""

import contextlib
import http.client
import random
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Literal, get_args

Style = Literal["kept", "pausing", "fresh", "late", "slow", "streaming"]
"""How a caller goes about it: on one connection without a pause or with one, on a new one each time, on one
that waits before it is used for the first time, with a body that comes in two parts, for a stream."""

STYLES: tuple[Style, ...] = get_args(Style)
ANSWER_TIMEOUT_S = 30.0
"""Without a word for so long, there is no answer [s]."""


class Callers:
    """Threads that call the same server.

    Args:
        address: Where it listens.
        body: What is sent.
        target: Where to; may have parameters.
        headers: Of each request, beside what HTTP needs.
        connect_timeout_s: A connection that is not there by then counts as refused.
    """

    def __init__(
        self,
        address: tuple[str, int],
        body: bytes,
        *,
        target: str = "/predict?budget_ms=2000",
        headers: str = "Content-Type: application/octet-stream\r\n",
        connect_timeout_s: float = 5.0,
    ) -> None:
        self._address = address
        self._body = body
        self._target = target
        self._headers = headers
        self._connect_timeout_s = connect_timeout_s
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.statuses = Counter[int]()
        """Of the answers."""
        self.unanswered: list[str] = []
        """Style and reason of each request that was sent and got no answer."""
        self.n_told = 0
        """Connections that were told to close while nothing was asked on them."""

    @property
    def n_answered(self) -> int:
        """Requests that got an answer, whatever it was."""
        return self.statuses.total()

    @contextmanager
    def calling(self, styles: tuple[Style, ...] = STYLES, each: int = 2) -> Iterator[None]:
        """Within it they call; at its end each finishes what it has begun."""
        threads = [
            threading.Thread(target=self._call, args=(style, random.Random(seed)))
            for seed, style in enumerate(styles * each)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until this holds of what has been seen.

        Raises:
            TimeoutError: it never did.
        """
        until_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > until_s:
                raise TimeoutError(f"only {dict(self.statuses)}, unanswered {self.unanswered}")
            time.sleep(0.01)

    def _call(self, style: Style, rng: random.Random) -> None:
        connection: socket.socket | None = None
        while not self._is_over.is_set():
            if connection is None:
                try:
                    connection = socket.create_connection(self._address, self._connect_timeout_s)
                except OSError:
                    break  # nobody listens any more
                connection.settimeout(ANSWER_TIMEOUT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if style == "late":
                    self._is_over.wait(rng.uniform(0, 0.2))
            elif style == "pausing":
                self._is_over.wait(rng.uniform(0, 0.03))
            if select.select([connection], [], [], 0)[0]:  # closed, as a connection that is not in use may be
                self._hear(connection)
            elif self._ask(connection, style, rng) and style not in {"fresh", "late"}:
                continue
            connection.close()
            connection = None
        if connection is not None:
            connection.close()

    def _hear(self, connection: socket.socket) -> None:
        """Take what is said on a connection on which nothing was asked."""
        with self._lock, contextlib.suppress(OSError):
            self.n_told += connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")

    def _ask(self, connection: socket.socket, style: Style, rng: random.Random) -> bool:
        """Send a request and take its answer; whether the connection may be used again."""
        target = self._target + ("&stream=ndjson" if style == "streaming" else "")
        head = (
            f"POST {target} HTTP/1.1\r\nHost: test\r\n{self._headers}"
            f"Content-Length: {len(self._body)}\r\n\r\n"
        ).encode()
        try:
            try:
                if style == "slow":
                    connection.sendall(head + self._body[:50])
                    time.sleep(rng.uniform(0, 0.05))
                    connection.sendall(self._body[50:])
                else:
                    connection.sendall(head + self._body)
            except OSError:
                pass  # it may have been answered all the same
            with closing(http.client.HTTPResponse(connection, method="POST")) as response:
                response.begin()
                content = response.read()
            if style == "streaming" and response.status == 200 and b'"event":"done"' not in content:
                raise http.client.IncompleteRead(content)
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self.unanswered.append(f"{style}: {error!r}")
            return False
        with self._lock:
            self.statuses[response.status] += 1
        return not response.will_close
