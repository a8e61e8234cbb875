"""uvicorn's HTTP/1.1 protocol with three things added, each of which saves a good part of a millisecond.

Must not know what is served.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

RECEIVED_S = "anytime.received_s"
"""Key in the ASGI scope: when the first byte of the request was read [s, time.monotonic]."""

CONNECTION = "anytime.connection"
"""Key in the ASGI scope: the `StampedProtocol` that the request came through."""

HEAD = b"HTTP/1."


class StampedProtocol(HttpToolsProtocol):
    """Notes when a request came, tells of lost connections, and sends head and body together.

    uvicorn starts the application one turn of the event loop later, and a busy loop's turn takes
    milliseconds; it has an application wait in a task of its own for the caller to leave; and it writes head
    and body one by one: twice the system calls, and the client is woken up for a head.
    """

    on_lost: set[Callable[[], None]]
    is_lost: bool

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Put the joining transport between uvicorn and the connection."""
        self.on_lost = set()
        self.is_lost = False
        super().connection_made(_JoiningTransport(transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell those who asked to be told."""
        super().connection_lost(exc)
        self.is_lost = True
        for tell in tuple(self.on_lost):
            tell()

    def on_message_begin(self) -> None:
        """Take the time."""
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[RECEIVED_S] = time.monotonic()
        scope[CONNECTION] = self


class _JoiningTransport:
    """Keeps the head of a response back until what follows it is written, or the loop turns."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""

    def write(self, data: bytes) -> None:
        if not self._held and data.startswith(HEAD):
            self._held = data
            asyncio.get_running_loop().call_soon(self._release)
            return
        held, self._held = self._held, b""
        self._transport.write(held + data)

    def close(self) -> None:
        self._release()
        self._transport.close()

    def _release(self) -> None:
        if held := self._held:
            self._held = b""
            self._transport.write(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
