"""nginx and HAProxy as deploy/balancer configures them, with two replicas that have their troubles."""

import contextlib
import http.client
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import pytest

from loadtests.hops import BALANCERS, balancing
from loadtests.hosting import free_port
from tests.service.conftest import Launcher, artifact, inference, launch

__all__ = ["artifact", "inference", "launch"]  # fixtures

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(not shutil.which(kind), reason=f"needs {kind} (Debian: apt install)")
    )
    for kind in BALANCERS
]


class Replica(ThreadingHTTPServer):
    """Speaks HTTP/1.1 as the server does, and answers as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.status = 200
        self.is_ready = True
        self.headers: dict[str, str] = {}
        self.asked: list[dict[str, str]] = []
        self.may_end = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Replica

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200 if self.server.is_ready else 503)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
        if "stream" in self.path:
            self._stream()
        else:
            self._answer(self.server.status)

    def _answer(self, status: int) -> None:
        body = str(self.server.port).encode()
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a check wants no body
            self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("X-Accel-Buffering", "no")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        self.wfile.flush()
        self.server.may_end.wait(30)
        self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")


@dataclass
class Balanced:
    """A balancer in front of two replicas."""

    replicas: tuple[Replica, Replica]
    client: httpx.Client
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.port = self.client.base_url.port or 0

    def ask(self) -> httpx.Response:
        return self.client.post("/predict?budget_ms=50", content=b"picture")

    def ask_until(self, is_so: Callable[[httpx.Response], bool]) -> None:
        """Ask on; the test's own timeout ends it otherwise."""
        while not is_so(self.ask()):
            time.sleep(0.05)


@pytest.fixture(params=KINDS)
def balanced(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Balanced]:
    with contextlib.ExitStack() as stack:
        replicas = Replica(), Replica()
        for replica in replicas:
            thread = threading.Thread(target=replica.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(replica.server_close)
            stack.callback(replica.shutdown)
        ports = {8080: free_port(), 8081: free_port()}
        for http_port, grpc_port, replica in zip((8000, 8010), (8001, 8011), replicas, strict=True):
            ports |= {http_port: replica.port, grpc_port: replica.port}
        server = stack.enter_context(balancing(request.param, ports, tmp_path))
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=30, trust_env=False))
        yield Balanced(replicas, client)


def test_both_replicas_are_asked(balanced: Balanced) -> None:
    balanced.ask_until(lambda _: all(replica.asked for replica in balanced.replicas))


def test_a_replica_that_leaves_costs_nobody_an_answer(balanced: Balanced) -> None:
    """As the server does it: first it only says that it is not ready, then it turns callers away."""
    leaving, staying = balanced.replicas
    balanced.ask_until(lambda _: bool(leaving.asked))

    leaving.is_ready = False
    end_s = time.monotonic() + 3  # ANYTIME_DRAIN_NOTICE_S: more than checks take to see it
    statuses = {balanced.ask().status_code for _ in iter(lambda: time.monotonic() < end_s, False)}
    leaving.status = 503
    answers = [balanced.ask() for _ in range(40)]

    assert statuses == {200}
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, str(staying.port))}


def test_a_replica_that_is_gone_costs_nobody_an_answer(balanced: Balanced) -> None:
    gone, _ = balanced.replicas
    balanced.ask_until(lambda _: bool(gone.asked))

    gone.shutdown()
    gone.server_close()

    assert {balanced.ask().status_code for _ in range(40)} == {200}


def test_a_replica_that_is_back_is_asked_again(balanced: Balanced) -> None:
    one, _ = balanced.replicas
    one.status, one.is_ready = 503, False
    balanced.ask_until(lambda answer: answer.status_code == 200 and answer.text != str(one.port))
    n_before = len(one.asked)

    one.status, one.is_ready = 200, True

    balanced.ask_until(lambda _: len(one.asked) > n_before + 1)


def test_a_refusal_for_load_reaches_the_caller_as_it_is_and_no_other_replica(balanced: Balanced) -> None:
    for replica in balanced.replicas:
        replica.status = 429
        replica.headers = {"Retry-After": "1", "retry-after-ms": "37"}

    answer = balanced.ask()

    assert answer.status_code == 429
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "37")
    assert sum(len(replica.asked) for replica in balanced.replicas) == 1


def test_a_request_that_expired_is_not_asked_for_again(balanced: Balanced) -> None:
    for replica in balanced.replicas:
        replica.status = 504

    assert balanced.ask().status_code == 504
    assert sum(len(replica.asked) for replica in balanced.replicas) == 1


def test_a_stream_comes_through_rung_by_rung(balanced: Balanced) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", balanced.port, timeout=30)
    connection.request("POST", "/predict?stream=sse", b"picture")
    response = connection.getresponse()

    assert response.read(5) == b"first"
    for replica in balanced.replicas:
        replica.may_end.set()
    assert response.read() == b"last"
    connection.close()


def test_metrics_of_one_replica_or_another_are_not_to_be_had(balanced: Balanced) -> None:
    assert balanced.client.get("/metrics").status_code == 404
    assert balanced.client.get("/healthz/ready").status_code == 200


def test_a_caller_cannot_say_that_it_is_somebody_else(balanced: Balanced) -> None:
    balanced.client.post("/predict", content=b"", headers={"X-Forwarded-For": "192.0.2.1"})

    (asked,) = [headers for replica in balanced.replicas for headers in replica.asked]
    assert asked["x-forwarded-for"] == "127.0.0.1"


@pytest.mark.parametrize("kind", KINDS)
def test_calls_over_grpc_come_through_to_both_servers(kind: str, launch: Launcher, tmp_path: Path) -> None:
    servers = [launch(grpc_port=0) for _ in range(2)]
    ports = {8080: free_port(), 8081: free_port()}
    for http_port, grpc_port, server in zip((8000, 8010), (8001, 8011), servers, strict=True):
        assert server.grpc_port
        ports |= {http_port: server.address[1], grpc_port: server.grpc_port}
    with (
        balancing(kind, ports, tmp_path),
        grpc.insecure_channel(f"127.0.0.1:{ports[8081]}") as channel,
    ):
        method = "/inference.GRPCInferenceService/ServerReady"
        is_ready: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        answers = {is_ready(b"", timeout=30, wait_for_ready=True) for _ in range(10)}

    assert answers == {b"\x08\x01"}


def test_haproxy_finds_nothing_to_complain_of() -> None:
    if not (haproxy := shutil.which("haproxy")):
        pytest.skip("needs haproxy (Debian: apt install)")
    done = subprocess.run(
        [haproxy, "-c", "-f", BALANCERS["haproxy"]], capture_output=True, text=True, check=False
    )

    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
