"""What the protocol adds to uvicorn's: a head never travels alone, and a lost connection is told at once."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.protocol import (
    CONNECTION,
    READ,
    Connections,
    StampedProtocol,
    _JoiningTransport,
    allow_open_files,
    connection_options,
    tls_context,
)
from service.settings import Settings, SettingsError
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession, Launcher, Running

BODY = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)


def request(path: str = "/predict?budget_ms=5000") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode() + BODY


class Keeper:
    """An application that keeps the scopes of its requests, and answers none before it is told to."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.loop: asyncio.AbstractEventLoop | None = None
        self.scopes: list[Scope] = []
        self.lost = threading.Event()

    def break_off(self, *, only_half_answered: bool) -> int:
        """How many connections are left."""

        async def call() -> int:
            self.connections.break_off(only_half_answered=only_half_answered)
            await asyncio.sleep(0.01)
            return len(self.connections._entered)

        assert self.loop
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.loop = asyncio.get_running_loop()
        connection: StampedProtocol = scope[CONNECTION]
        connection.on_lost.add(self.lost.set)
        await receive()
        if scope["path"] == "/answered":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
            return
        if scope["path"] == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not connection.is_lost:
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await receive()  # until the caller is gone


@pytest.fixture
def keeper() -> Iterator[tuple[Keeper, int]]:
    app = Keeper(Connections(Settings(_env_file=None, send_timeout_s=0.2)))
    options = connection_options(app.connections)
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
    assert before_s <= app.scopes[0][READ][0] <= time.monotonic()


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
        joining = _JoiningTransport(cast("asyncio.Transport", written), lambda: None)
        for part in parts:
            joining.write(part)
        if close:
            joining.finish()
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


def test_an_answer_has_the_headers_that_the_server_gives_to_all(server: Running) -> None:
    raw = {"content-type": "application/octet-stream"}
    response = server.client.post("/predict?budget_ms=5000", content=BODY, headers=raw)
    live = server.client.get("/healthz/live")
    assert response.headers["date"][:17] == live.headers["date"][:17]
    assert response.headers["content-length"] == str(len(response.content))


def test_who_asks_for_the_head_alone_gets_no_body(server: Running) -> None:
    with server.connect() as connection:
        connection.settimeout(20)
        connection.sendall(
            b"HEAD /predict HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz/live HTTP/1.1\r\nHost: x\r\n"
            b"Connection: close\r\n\r\n"
        )
        both = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert both.startswith(b"HTTP/1.1 405")
    assert b"\r\n\r\nHTTP/1.1 200" in both  # nothing stands between the two heads


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


# ---- bounds ----

HEAD = b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n"


def until_closed(connection: socket.socket, timeout_s: float = 20.0) -> bytes:
    """All that comes before the connection is closed, one way or the other; TimeoutError if it is not."""
    connection.settimeout(timeout_s)
    received = b""
    try:
        while part := connection.recv(1 << 16):
            received += part
    except ConnectionError:
        pass
    return received


def is_served(connection: socket.socket) -> bool:
    """Whether a request is answered; otherwise the connection was closed."""
    try:
        connection.sendall(HEAD + b"\r\n")
        return connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 400 + b" HTTP/1.1\r\n",
        HEAD + b"X: " + b"a" * 400 + b"\r\nY",
        HEAD + b"X: a\r\n" * 100,
        b"\r\n" * 200,
    ],
)
def test_a_head_that_is_too_large_is_refused(launch: Launcher, head: bytes) -> None:
    server = launch(max_header_bytes=300, header_timeout_s=0.5)
    with server.connect() as connection:
        assert is_served(connection)
        connection.sendall(head)
        refusal = until_closed(connection)
    if head.strip():  # without a first line there is no request to answer
        assert refusal.startswith(b"HTTP/1.1 431")
        assert b"300 bytes" in refusal


def test_what_surrounds_the_chunks_of_a_body_is_bounded_as_a_head_is(launch: Launcher) -> None:
    server = launch(max_header_bytes=300)
    head = request().partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
        connection.sendall(b"1;" + b"a" * 400 + b"\r\nx\r\n")
        assert b"HTTP/1.1 431" in until_closed(connection)


def test_a_head_that_does_not_come_is_not_waited_for(launch: Launcher) -> None:
    server = launch(header_timeout_s=0.05)
    with server.connect() as silent:
        assert until_closed(silent) == b""
    with server.connect() as slow:
        slow.sendall(HEAD)
        assert until_closed(slow).startswith(b"HTTP/1.1 408")


def test_an_idle_connection_is_closed(launch: Launcher) -> None:
    server = launch(keep_alive_s=0.05)
    with server.connect() as connection:
        assert is_served(connection)
        assert until_closed(connection) == b""


def test_of_connections_only_the_half_answered_are_broken_off_or_all(keeper: tuple[Keeper, int]) -> None:
    app, port = keeper
    with (
        socket.create_connection(("127.0.0.1", port)) as endless,
        socket.create_connection(("127.0.0.1", port)) as silent,
    ):
        silent.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
        endless.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        endless.recv(1)
        assert app.break_off(only_half_answered=True) == 1
        until_closed(endless)
        with pytest.raises(TimeoutError):
            until_closed(silent, timeout_s=0.05)
        assert app.break_off(only_half_answered=False) == 0
        assert until_closed(silent) == b""


def test_a_reader_that_takes_nothing_is_let_go(keeper: tuple[Keeper, int]) -> None:
    app, port = keeper
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert app.lost.wait(20)


@pytest.mark.parametrize("setting", ["max_connections", "max_connections_per_client"])
def test_beyond_so_many_connections_new_ones_are_closed_until_one_leaves(
    launch: Launcher, setting: str
) -> None:
    bound: dict[str, Any] = {setting: 2}
    server = launch(header_timeout_s=60, **bound)  # not what closes the third
    with server.connect() as first, server.connect() as second, server.connect() as third:
        assert is_served(first)
        assert is_served(second)
        assert until_closed(third) == b""
        first.close()
        while True:  # until the server has noticed
            with server.connect() as next_:
                if is_served(next_):
                    break


def test_only_so_many_requests_are_kept_ahead(blocked: Running) -> None:
    most = Settings(_env_file=None).max_pipelined_requests
    with blocked.connect() as connection:
        connection.sendall(request() * (1 + most + 1))
        assert until_closed(connection) == b""
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)


def test_who_leaves_with_requests_ahead_is_no_fault(
    blocked: Running, session: BlockedSession, caplog: pytest.LogCaptureFixture
) -> None:
    with blocked.connect() as connection:
        connection.sendall(request() * 3)
        assert session.started.wait(30)
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_as_many_files_as_connections_must_be_allowed() -> None:
    resource = pytest.importorskip("resource")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("this system has no bound")
    with pytest.raises(SettingsError, match=r"ANYTIME_MAX_CONNECTIONS .* ulimit -n"):
        allow_open_files(Settings(_env_file=None, max_connections=hard))


# ---- TLS ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


def secured(server: Running, certificate: Path, shown: tuple[Path, Path] | None = None) -> int:
    """The status of a request over TLS."""
    context = ssl.create_default_context(cafile=certificate)
    if shown:
        context.load_cert_chain(*shown)
    with httpx.Client(verify=context, trust_env=False, timeout=20) as client:
        return client.get(f"https://127.0.0.1:{server.address[1]}/healthz/live").status_code


def test_with_a_certificate_nothing_is_served_in_the_clear(
    launch: Launcher, files: tuple[Path, Path]
) -> None:
    certificate, key = files
    server = launch(tls_certificate=certificate, tls_key=key)
    assert secured(server, certificate) == 200
    with server.connect() as connection:
        assert not is_served(connection)


def test_a_handshake_that_comes_at_once_is_lost_by_no_connection(
    launch: Launcher, files: tuple[Path, Path]
) -> None:
    """A caller's first bytes may be read before TLS is there to take them."""
    certificate, key = files
    server = launch(tls_certificate=certificate, tls_key=key, header_timeout_s=2)
    assert [secured(server, certificate) for _ in range(20)] == [200] * 20


def test_a_handshake_that_does_not_come_is_not_waited_for(launch: Launcher, files: tuple[Path, Path]) -> None:
    certificate, key = files
    server = launch(tls_certificate=certificate, tls_key=key, header_timeout_s=0.05)
    with server.connect() as silent:
        assert until_closed(silent) == b""


def test_with_authorities_only_clients_with_a_certificate_are_served(
    launch: Launcher, files: tuple[Path, Path]
) -> None:
    certificate, key = files
    server = launch(tls_certificate=certificate, tls_key=key, tls_client_ca=certificate)
    assert secured(server, certificate, files) == 200
    with pytest.raises(httpx.TransportError):
        secured(server, certificate)


@pytest.mark.parametrize(
    ("swapped", "says"),
    [
        ({"tls_key": "certificate.pem"}, "ANYTIME_TLS_CERTIFICATE .* cannot be used"),
        ({"tls_key": "absent.pem"}, "ANYTIME_TLS_CERTIFICATE .* cannot be used"),
        ({"tls_client_ca": "absent.pem"}, "ANYTIME_TLS_CLIENT_CA .* cannot be used"),
    ],
)
def test_files_that_cannot_secure_refuse_to_start(
    files: tuple[Path, Path], swapped: dict[str, str], says: str
) -> None:
    certificate, key = files
    chosen: dict[str, Any] = {"tls_certificate": certificate, "tls_key": key}
    chosen |= {name: certificate.parent / file for name, file in swapped.items()}
    with pytest.raises(SettingsError, match=says):
        tls_context(Settings(_env_file=None, **chosen))
