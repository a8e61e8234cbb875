"""What the protocol adds to uvicorn's: a head never travels alone, and a lost connection is told at once."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.protocol import CONNECTION, RECEIVED_S, StampedProtocol, _JoiningTransport, connection_options
from service.settings import Settings
from tests.service import toy_artifact
from tests.service.conftest import Launcher, Running

BODY = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)


def request(path: str = "/predict?budget_ms=5000") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode() + BODY


class Keeper:
    """An application that keeps the scopes of its requests, and answers none before it is told to."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.lost = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        connection: StampedProtocol = scope[CONNECTION]
        connection.on_lost.add(self.lost.set)
        await receive()
        if scope["path"] == "/answered":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
            return
        await receive()  # until the caller is gone


@pytest.fixture
def keeper() -> Iterator[tuple[Keeper, int]]:
    app = Keeper()
    options = connection_options(Settings(_env_file=None))
    config = uvicorn.Config(app, lifespan="off", log_config=None, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield app, listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def test_the_scope_says_when_a_request_came(keeper: tuple[Keeper, int]) -> None:
    app, port = keeper
    before_s = time.monotonic()
    assert httpx.get(f"http://127.0.0.1:{port}/answered", trust_env=False).status_code == 204
    assert before_s <= app.scopes[0][RECEIVED_S] <= time.monotonic()


def test_who_asked_is_told_that_the_connection_is_lost(keeper: tuple[Keeper, int]) -> None:
    app, port = keeper
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n")
        while not app.scopes:
            pass
        assert not app.lost.is_set()
        assert not app.scopes[0][CONNECTION].is_lost
    assert app.lost.wait(30)
    assert app.scopes[0][CONNECTION].is_lost


RAW = {"content-type": "application/octet-stream"}


class WrittenTo:
    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.writes.append(b"closed")


def test_a_head_is_written_with_what_follows_it_together() -> None:
    async def write(*parts: bytes, close: bool = False) -> list[bytes]:
        written = WrittenTo()
        joining = _JoiningTransport(cast("asyncio.Transport", written))
        for part in parts:
            joining.write(part)
        if close:
            joining.close()
        await asyncio.sleep(0)
        return written.writes

    assert asyncio.run(write(b"HTTP/1.1 200 OK", b"body", b"more")) == [b"HTTP/1.1 200 OKbody", b"more"]
    assert asyncio.run(write(b"HTTP/1.1 204 No Content")) == [b"HTTP/1.1 204 No Content"]
    assert asyncio.run(write(b"HTTP/1.1 400 Bad", close=True)) == [b"HTTP/1.1 400 Bad", b"closed"]


def test_head_and_body_come_together(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(request())
        first = connection.recv(1 << 16)
    head, _, body = first.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body.endswith(b"}")


def test_requests_sent_ahead_are_answered_in_order(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(request() + request("/predict?budget_ms=0"))
        received = b""
        while received.count(b"HTTP/1.1 ") < 2 or not received.endswith(b"}"):
            received += connection.recv(1 << 16)
    assert received.index(b"HTTP/1.1 200") < received.index(b"HTTP/1.1 422")


def test_a_body_is_asked_for_before_it_is_sent(server: Running) -> None:
    head, _, body = request().partition(b"\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_connection_that_is_reset_harms_no_other(launch: Launcher) -> None:
    server = launch()
    for _ in range(5):
        connection = server.connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.sendall(request()[:100])
        connection.close()
    answered: httpx.Response = server.client.post("/predict?budget_ms=5000", content=BODY, headers=RAW)
    assert answered.status_code == 200
