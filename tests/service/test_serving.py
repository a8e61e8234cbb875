"""How a server stops: nobody's request is lost, and it ends in time whatever hangs."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import uvloop
from onnx import TensorProto, helper, numpy_helper

from service import oip_pb2 as pb
from service.access import new_key
from service.protocol import turn_away
from service.serving import N_LISTENERS, listen
from service.settings import Settings
from tests.callers import Callers
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession, Launcher, Running

ROOT = Path(__file__).resolve().parents[2]
BODY = bytes(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3)


def head(target: str = "/predict?budget_ms=9000", n_bytes: int = len(BODY), more: str = "") -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {n_bytes}\r\n{more}"
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


def answer(connection: socket.socket) -> tuple[int, str | None]:
    """Read a response; its status, and whether it was the last on its connection."""
    with contextlib.closing(http.client.HTTPResponse(connection, method="POST")) as response:
        response.begin()
        response.read()
        return response.status, response.getheader("connection")


def is_ready(server: Running) -> bool:
    with server.connect() as connection:
        connection.sendall(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return answer(connection)[0] == 200


# ---- in this process: what each connection is told ----


def test_with_notice_it_is_not_ready_but_answers_and_ends_each_connection(launch: Launcher) -> None:
    server = launch(grpc_port=0)
    with server.connect() as kept, grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        kept.sendall(head() + BODY)
        assert answer(kept) == (200, None)
        assert is_ready(server)

        server.server._announce()

        assert not is_ready(server)
        call: Any = channel.unary_unary
        ready = call("/inference.GRPCInferenceService/ServerReady")(b"")
        assert not pb.ServerReadyResponse.FromString(ready).ready
        named = pb.ModelReadyRequest(name="toy").SerializeToString()
        ready = call("/inference.GRPCInferenceService/ModelReady")(named)
        assert not pb.ModelReadyResponse.FromString(ready).ready
        kept.sendall(head() + BODY)
        assert answer(kept) == (200, "close")
        assert kept.recv(1) == b""
        with server.connect() as new:
            new.sendall(b"GET /v2/models/toy/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(new) == (503, "close")
        with server.connect() as new:
            new.sendall(head("/predict?budget_ms=9000&stream=ndjson") + BODY)
            assert answer(new) == (200, "close")


def test_of_requests_that_were_sent_ahead_only_the_last_ends_the_connection(
    blocked: Running, session: BlockedSession
) -> None:
    with blocked.connect() as connection:
        connection.sendall((head() + BODY) * 3)
        assert session.started.wait(30)
        blocked.stop()
        session.released.set()
        with connection.makefile("rb") as responses:
            heads = responses.read().split(b"HTTP/1.1 ")[1:]
    assert [head[:3] for head in heads] == [b"200"] * 3
    assert [b"\r\nconnection: close\r\n" in head for head in heads] == [False, False, True]


def test_an_idle_connection_has_time_for_a_request_and_is_told_when_that_is_over(
    launch: Launcher,
) -> None:
    patient, brief = launch(drain_linger_s=60), launch(drain_linger_s=0.01)
    for server in (patient, brief):
        with server.connect() as used, server.connect() as fresh:
            used.sendall(head() + BODY)
            assert answer(used) == (200, None)
            server.stop()
            if server is patient:
                server.wait_until_stopping()
                used.sendall(head() + BODY)
                fresh.sendall(head() + BODY)
                assert answer(used) == answer(fresh) == (503, "close")
            else:
                assert answer(used) == answer(fresh) == (408, "close")
                for _ in range(3):  # has crossed that; a connection that was reset would not take it
                    used.sendall(head() + BODY)
                    fresh.sendall(head() + BODY)
                    time.sleep(0.01)


def test_what_runs_is_answered_a_stream_has_its_end_and_who_waits_is_turned_away(
    blocked: Running, session: BlockedSession
) -> None:
    with contextlib.ExitStack() as stack:
        running, streaming, waiting = (stack.enter_context(blocked.connect()) for _ in range(3))
        session.one.release()
        streaming.sendall(head("/predict?budget_ms=9000&stream=ndjson") + BODY)
        stream = stack.enter_context(contextlib.closing(http.client.HTTPResponse(streaming, method="POST")))
        stream.begin()
        assert json.loads(stream.readline())["columns_run"] == ["1"]
        running.sendall(head() + BODY)
        blocked.wait_for(
            "anytime_queue_length", 1
        )  # column 2 of the stream runs, and ends with the batch of both
        blocked.stop()
        blocked.wait_until_stopping()
        waiting.sendall(head() + BODY)
        assert answer(waiting) == (503, "close")
        assert answer(running) == (503, "close")
        session.released.set()
        events = [json.loads(line)["event"] for line in stream.read().splitlines()]
        assert events[-1] == "done"


def test_a_body_that_does_not_come_and_a_caller_that_does_not_close_hold_nobody_up(
    launch: Launcher,
) -> None:
    key, hash_ = new_key()
    server = launch(drain_timeout_s=0.05, drain_linger_s=0.01, send_timeout_s=60, admin_keys=hash_)
    with contextlib.ExitStack() as stack:
        unsent, asking, admin, open_ = (stack.enter_context(server.connect()) for _ in range(4))
        admin.sendall(head("/v2/repository/index", more=f"X-API-Key: {key}\r\n") + BODY[:-1])
        asking.sendall(head("/v2/models/toy/infer") + BODY[:-1])
        unsent.sendall(head() + BODY[:-1])
        while server.service._n_open < 2:
            time.sleep(0.001)
        server.stop()
        assert answer(unsent) == answer(asking) == answer(admin) == (503, "close")
        server.wait_until_ended()
        assert answer(open_) == (408, "close")


def test_an_answer_that_comes_before_its_body_is_read_is_not_taken_back(launch: Launcher) -> None:
    server = launch(max_body_bytes=1000)
    with server.connect() as connection:
        connection.sendall(head(n_bytes=1 << 20, more="Connection: close\r\n") + bytes(1 << 10))
        connection.sendall(bytes((1 << 20) - (1 << 10)))  # after the answer has been sent
        assert answer(connection) == (413, "close")
        assert connection.recv(1) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's")
def test_who_has_begun_to_connect_is_let_in_and_nobody_after() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as before,
    ):
        turn_away(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.2)
        accepted, _ = listener.accept()
        with accepted:
            before.sendall(b"question")
            assert accepted.recv(8) == b"question"
            accepted.sendall(b"answer")
            assert before.recv(6) == b"answer"


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's")
def test_whoever_is_let_in_late_is_heard(launch: Launcher) -> None:
    server = launch()
    server.server._announce()
    turn_away(server.server.servers[0].sockets[0])
    with socket.socket() as late:
        late.setsockopt(
            socket.IPPROTO_IP, socket.IP_TTL, 255
        )  # gets through; others whose handshake had begun
        late.connect(server.address)
        late.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 64)
        late.sendall(head() + BODY)
        assert answer(late) == (200, "close")


# ---- a process of its own: signals ----


class Process:
    """A server as `make serve` starts it, until it says where it listens."""

    def __init__(self, artifact: Path, *arguments: str, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service", "serve", "--artifact", str(artifact), f"--port={port}"),
                *("--profile-seconds", "0.01", "--batch-sizes", "1,2", "--profile-cache=", *arguments),
            ],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("ANYTIME_")},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""

    def wait_for(self, text: str) -> str:
        """Read on until it says so; returns all that it has said."""
        assert self._process.stderr is not None
        while text not in self.said:
            line = self._process.stderr.readline()
            assert line, self.said
            self.said += line
        return self.said

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(re.findall(r"127\.0\.0\.1:(\d+)/predict", self.wait_for("curl"))[0])

    def own_address(self) -> tuple[str, int]:
        return "127.0.0.1", int(re.findall(r"alone is at port (\d+)", self.wait_for("curl"))[0])

    def grpc_target(self) -> str:
        return re.findall(r"gRPC at (\S+):", self.wait_for("curl"))[0]  # type: ignore[no-any-return]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def status(self) -> int:
        """Wait for its end."""
        _, rest = self._process.communicate(timeout=50)
        self.said += rest
        assert "Traceback" not in self.said
        return self._process.returncode

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate(timeout=50)


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Callable[..., Process]:
    """Starts processes, and ends them with the test."""

    def started(artifact: Path, *arguments: str, port: int = 0) -> Process:
        process = Process(artifact, *arguments, port=port)
        request.addfinalizer(process.end)
        return process

    return started


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("notice_s", [0, 0.3])
def test_every_request_that_was_sent_is_answered(
    start: Callable[..., Process], artifact: Path, number: signal.Signals, notice_s: float
) -> None:
    process = start(artifact, "--grpc-port=", f"--drain-notice-s={notice_s}")
    callers = Callers(process.address(), BODY)

    with callers.calling():
        callers.wait_for(lambda: callers.n_answered > 200)
        process.send(number)
        status = process.status()

    assert callers.unanswered == []
    assert set(callers.statuses) <= {200, 429, 503}
    assert callers.statuses[200] > 0
    assert status == 0


def test_every_call_over_grpc_is_answered_or_called_unavailable(
    start: Callable[..., Process], artifact: Path
) -> None:
    process = start(artifact, "--grpc-port=0", "--drain-notice-s=0.3")
    request = pb.ModelInferRequest(
        model_name="toy",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3]}],
        raw_input_contents=[BODY],
    ).SerializeToString()
    codes: list[grpc.StatusCode] = []

    with grpc.insecure_channel(process.grpc_target()) as channel:
        infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while grpc.StatusCode.UNAVAILABLE not in codes:
            codes.append(infer.future(request, timeout=30).code())
            if len(codes) == 50:
                process.send(signal.SIGTERM)

    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes[50] == grpc.StatusCode.OK, "there is notice"
    assert process.status() == 0


def metric(address: tuple[str, int], pattern: str) -> float:
    """The sum of what /metrics of this address says in lines that match."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=30) as response:
        return sum(map(float, re.findall(pattern, response.read().decode(), re.MULTILINE)))


@pytest.mark.skipif(
    sys.platform != "linux", reason="Linux deals connections out among those who share a port"
)
def test_processes_share_a_port_each_with_one_of_its_own_and_one_may_stop(
    start: Callable[..., Process], artifact: Path
) -> None:
    options = ("--grpc-port=", "--shares-port=true", "--own-port=0")
    first = start(artifact, *options)
    second = start(artifact, *options, port=first.address()[1])
    assert second.address() == first.address()
    assert len({first.address(), first.own_address(), second.own_address()}) == 3
    callers = Callers(first.address(), BODY)

    with callers.calling():
        callers.wait_for(lambda: callers.n_answered > 200)
        answered = [
            metric(each.own_address(), r"^anytime_requests_total{.*} (\S+)$") for each in (first, second)
        ]
        first.send(signal.SIGTERM)
        assert first.status() == 0
        before = callers.n_answered
        callers.wait_for(lambda: callers.n_answered > before + 200)
        second.send(signal.SIGTERM)
        assert second.status() == 0

    assert min(answered) > 0
    assert callers.unanswered == []
    assert set(callers.statuses) <= {200, 429, 503}


@pytest.mark.parametrize(
    "options", [("--shares-port=true", "no"), ("no", "--shares-port=true"), ("no", "no")]
)
def test_a_port_is_shared_only_if_all_agree(
    start: Callable[..., Process], artifact: Path, options: tuple[str, str]
) -> None:
    said, also = (("--grpc-port=", *(option for option in [one] if option != "no")) for one in options)
    first = start(artifact, *said)

    second = start(artifact, *also, port=first.address()[1])

    assert second.status() == 2
    assert "choose another with ANYTIME_HOST and ANYTIME_PORT" in second.said


def test_an_own_port_that_is_taken_is_said_and_nothing_is_left_open(
    start: Callable[..., Process], artifact: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(artifact, "--grpc-port=", f"--own-port={taken.getsockname()[1]}")
        assert process.status() == 2
    assert "choose another with ANYTIME_HOST and ANYTIME_OWN_PORT" in process.said


@pytest.mark.skipif(sys.platform == "win32", reason="one handle waits for a socket there")
def test_all_who_connect_while_the_loop_was_at_work_are_accepted_in_one_turn() -> None:
    """Libuv accepts one for each handle that listens."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        made: list[asyncio.BaseTransport] = []

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.append(transport)

        listeners = listen(Settings(host="127.0.0.1", port=0))
        with contextlib.ExitStack() as opened:
            for listener in listeners:
                opened.callback((await loop.create_server(Accepted, sock=listener)).close)
            address = listeners[0].getsockname()
            for _ in range(N_LISTENERS):
                opened.enter_context(socket.create_connection(address))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            n_made = len(made)
            for transport in made:
                transport.abort()  # type: ignore[attr-defined]
        assert n_made == N_LISTENERS

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def endless(folder: Path) -> Path:
    """An artifact whose columns never end on a picture that is white."""
    toy_artifact.write(folder)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still_going"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.INT64, []),
        ],
    )
    graphs = {}
    for column in toy_artifact.COLUMNS:
        model = onnx.load_from_string(toy_artifact.graph(column))
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(1 << 62, np.int64), "very_often"),
                numpy_helper.from_array(np.array(1, np.int64), "once"),
                numpy_helper.from_array(np.array(0, np.int64), "nothing"),
                numpy_helper.from_array(np.array(254.5, np.float32), "nearly_white"),
                numpy_helper.from_array(np.array(True), "yes"),
                numpy_helper.from_array(np.array(0.0, np.float32), "zero"),
            ]
        )
        output = model.graph.output[0].name
        model.graph.node[-1].output[0] = "logits"
        model.graph.node.extend(
            [
                helper.make_node("ReduceMin", ["pixels"], ["darkest"], keepdims=0),
                helper.make_node("Greater", ["darkest", "nearly_white"], ["is_white"]),
                helper.make_node("Where", ["is_white", "very_often", "once"], ["how_often"]),
                helper.make_node("Loop", ["how_often", "yes", "nothing"], ["result"], body=body),
                helper.make_node("Cast", ["result"], ["number"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["number", "zero"], ["none"]),
                helper.make_node("Add", ["logits", "none"], [output]),
            ]
        )
        onnx.checker.check_model(model)
        graphs[column] = bytes(model.SerializeToString())
        (folder / f"column-{column}.onnx").write_bytes(graphs[column])
    (folder / "manifest.json").write_text(json.dumps(toy_artifact.manifest(graphs)))
    return folder


def n_waiting(address: tuple[str, int]) -> float:
    return metric(address, r"^anytime_queue_length (\S+)$")


def test_a_run_that_does_not_end_by_itself_is_ended_when_nobody_waits_for_it(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    process = start(
        endless(tmp_path), "--grpc-port=", "--brief-run-ms=0", "--drain-timeout-s=0.5", "--drain-linger-s=0.1"
    )
    with contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        while not connections or not n_waiting(process.address()):  # behind the run that does not end
            connections.append(stack.enter_context(socket.create_connection(process.address())))
            connections[-1].sendall(head() + b"\xff" * len(BODY))
        process.send(signal.SIGTERM)
        assert {answer(connection) for connection in connections} == {(503, "close")}

    assert process.status() == 0
    assert "did not end within 0.5 s" in process.said
    assert "left behind" not in process.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    start: Callable[..., Process], artifact: Path, number: signal.Signals
) -> None:
    process = start(artifact, "--grpc-port=", "--drain-notice-s=600")
    process.wait_for("curl")
    process.send(signal.SIGTERM)
    process.wait_for("answered for 600 s")
    for _ in range(10):
        with socket.create_connection(process.address()) as connection:
            connection.sendall(head() + BODY)
            assert answer(connection) == (200, "close")
        time.sleep(0.05)  # all of it longer than connections are let in without notice
    process.send(number)

    assert process.status() == 128 + number


def test_before_it_serves_it_ends_at_once(start: Callable[..., Process], artifact: Path) -> None:
    process = start(artifact, "--profile-seconds=600")
    process.wait_for("Measuring latencies")
    process.send(signal.SIGTERM)

    assert process.status() == 0
