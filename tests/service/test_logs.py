"""What is written to standard error: a line a record whatever is logged, its request, and nobody's data."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import oip_pb2 as pb
from service.access import new_key
from service.inference import Inference
from service.logs import JsonFormatter, RequestLog, TextFormatter
from service.record import Record, TraceContext, current
from service.settings import Settings
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession, Launcher, Running

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
RAW = {"content-type": "application/octet-stream"}
URL = "/predict?budget_ms=5000"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ANYTHING = st.text(st.characters(), max_size=60)  # halves of surrogate pairs included


def record_of(message: object, *arguments: object, **attributes: Any) -> logging.LogRecord:
    record = logging.LogRecord("anyone", logging.WARNING, __file__, 1, message, arguments, None)
    record.__dict__.update(attributes)
    return record


def raised(message: str) -> Any:
    try:
        int(message + " is no number")
    except ValueError:
        return sys.exc_info()
    raise AssertionError


# ---- the two forms ----


@given(message=ANYTHING, problem=ANYTHING, field=ANYTHING)
def test_a_record_is_one_line_of_json_whatever_is_logged(message: str, problem: str, field: str) -> None:
    record = record_of("%s", message, exc_info=raised(problem), fields={"field": field})
    written = JsonFormatter().format(record).encode()  # is text that can be written
    assert written.splitlines() == [written]
    document = json.loads(written)
    assert list(document) == ["time", "level", "logger", "message", "field", "exception"]
    assert "Traceback" in document["exception"]
    if not any("\ud800" <= character <= "\udfff" for character in message + field):
        assert (document["message"], document["field"]) == (message.strip("\n"), field)


@given(message=ANYTHING, problem=ANYTHING, field=ANYTHING)
def test_a_record_is_one_line_of_text_and_its_stack_is_indented(
    message: str, problem: str, field: str
) -> None:
    record = record_of("%s", message, exc_info=raised(problem), fields={"field": field})
    first, *stack = TextFormatter().format(record).splitlines()
    assert first.startswith("WARNING ")
    assert all(line.startswith("    ") for line in stack)
    assert stack[0].strip().startswith("Traceback")


def test_a_line_says_when_and_how_bad() -> None:
    record = record_of("here")
    record.created = datetime(2026, 11, 27, 9, 5, 7, 120_400, UTC).timestamp()
    document = json.loads(JsonFormatter().format(record))
    assert document == {
        "time": "2026-11-27T09:05:07.120Z",
        "level": "warning",
        "logger": "anyone",
        "message": "here",
    }
    assert TextFormatter().format(record) == "WARNING here"


def test_text_steers_no_terminal() -> None:
    assert TextFormatter().format(record_of("a\x1b[2Jb\rc\nd")) == r"WARNING a\x1b[2Jb\rc\nd"
    assert TextFormatter().format(record_of("a\x9b2Jb\x85c\u2028d")) == r"WARNING a\x9b2Jb\x85c\u2028d"


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_what_cannot_be_formatted_is_logged_all_the_same(formatter: logging.Formatter) -> None:
    assert "%d pictures (cannot" in formatter.format(record_of("%d pictures", "three"))
    assert "it is %s (cannot" in formatter.format(record_of("it is %s", Unspeakable()))
    assert "Unspeakable" in formatter.format(record_of(Unspeakable()))
    formatter.format(record_of("here", fields={"field": Unspeakable}))


def test_a_line_names_the_request_that_it_belongs_to() -> None:
    token = current.set(Record("mine", 0.0, trace=TraceContext(TRACE)))
    try:
        assert TextFormatter().format(record_of("here")) == f"WARNING here request_id=mine trace_id={TRACE}"
        document = json.loads(JsonFormatter().format(record_of("here")))
        assert (document["request_id"], document["trace_id"]) == ("mine", TRACE)
        other = json.loads(JsonFormatter().format(record_of("here", request=Record("other", 0.0))))
        assert (other["request_id"], "trace_id" in other) == ("other", False)
    finally:
        current.reset(token)


# ---- requests ----


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.setLevel(before)
    root.removeHandler(handler)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def requests_in(log: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(log) if line["logger"] == "service.requests"]


def ask(server: Running, url: str = URL, **headers: str) -> Any:
    return server.client.post(url, content=PIXELS.tobytes(), headers=RAW | headers)


def infer(server: Running) -> Any:
    """Ask over gRPC; returns the call."""
    request = pb.ModelInferRequest(
        inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, *PIXELS.shape]}],
        raw_input_contents=[PIXELS.tobytes()],
    )
    request.parameters["budget_ms"].double_param = 5000
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        method: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return method.with_call(request.SerializeToString())[1]


def test_requests_are_logged_if_they_are_to_be(launch: Launcher, log: io.StringIO) -> None:
    server = launch(log_requests=1.0)
    answer = ask(server, traceparent=f"00-{TRACE}-00f067aa0ba902b7-00")
    refused = ask(server, "/predict?budget_ms=0.1")
    wrong = server.client.get("/v2/models/someone/infer")
    server.client.get("/healthz/live")
    first, second, third = requests_in(log)
    elapsed_ms = first.pop("elapsed_ms")
    assert {name: value for name, value in first.items() if name not in {"time", "logger"}} == {
        "level": "info",
        "message": "POST /predict",
        "request_id": answer.headers["x-request-id"],
        "trace_id": TRACE,
        "outcome": "answered",
        "status": 200,
        "column": "3",
        "stopped_by": "deepest",
        "budget_ms": 5000,
        "model": "toy",
        "version": "7",
        "body_bytes": PIXELS.size,
    }
    assert answer.json()["elapsed_ms"] <= elapsed_ms
    assert (second["outcome"], second["status"]) == ("rejected", 429)
    assert second["reason"] in {"budget", "body", "load"}
    assert second["request_id"] == refused.headers["x-request-id"]
    assert (third["message"], third["outcome"], third["status"]) == (
        *("GET /v2/models/{name}/infer", "invalid", 405),
    )
    assert third["request_id"] == wrong.headers["x-request-id"]


def test_without_the_setting_no_request_is_logged(launch: Launcher, log: io.StringIO) -> None:
    server = launch()
    ask(server)
    ask(server, "/predict?budget_ms=0.1")
    assert requests_in(log) == []


def test_a_share_of_the_requests_is_logged(log: io.StringIO) -> None:
    draws = iter([0.0, 0.3, 0.2, 0.9])
    request_log = RequestLog(Settings(_env_file=None, log_requests=0.3), lambda: next(draws))
    for number in range(4):
        request_log.take(Record(str(number), 0.0, "POST", route="/predict", outcome="expired"))
    assert [line["request_id"] for line in requests_in(log)] == ["0", "2"]


def test_a_stream_and_a_call_over_grpc_are_logged(launch: Launcher, log: io.StringIO) -> None:
    server = launch(log_requests=1.0, grpc_port=0)
    streamed = ask(server, f"{URL}&stream=sse")
    call = infer(server)
    server.wait_for('anytime_requests_total{outcome="answered"}', 2)
    first, second = requests_in(log)
    assert (first["request_id"], first["column"]) == (streamed.headers["x-request-id"], "3")
    assert second["message"] == "inference.GRPCInferenceService/ModelInfer"
    assert (second["status"], second["outcome"], second["column"]) == ("OK", "answered", "3")
    assert second["request_id"] == dict(call.trailing_metadata())["x-request-id"]


# ---- failures ----


def test_a_failed_run_names_itself_and_every_request_that_it_failed(
    launch: Launcher, session: BlockedSession, inference: Inference, log: io.StringIO
) -> None:
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    server = launch(inference=Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64))
    session.released.set()
    assert ask(server).status_code == 200
    session.fails = True
    failed = ask(server, **{"x-request-id": "mine"})
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "mine")
    run, request = [line for line in lines(log) if line["level"] == "error"]
    assert "CUDA error 700" in run["exception"]
    assert "request_id" not in run, "a run belongs to all who are in it, and is no one's"
    assert (request["logger"], request["request_id"], request["status"]) == ("service.requests", "mine", 500)
    assert run["message"].startswith(f"Run {request['run']}, of column 1 ")


@pytest.fixture
def faulty(launch: Launcher, session: BlockedSession, inference: Inference) -> Running:
    """A server that fails at every answer: it has lost what each says of its depth."""
    session.released.set()
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    broken = Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)
    broken.depth = {}
    return launch(inference=broken, grpc_port=0)


def assert_a_fault_is_logged(log: io.StringIO, request_id: str) -> None:
    stack, request = [line for line in lines(log) if line["level"] == "error"]
    assert "KeyError" in stack["exception"]
    assert (request["logger"], request["outcome"]) == ("service.requests", "failed")
    assert stack["request_id"] == request["request_id"] == request_id


@pytest.mark.parametrize("url", [URL, "/v2/models/toy/infer"])
def test_a_fault_of_ours_is_logged_with_its_stack_and_the_id_in_the_answer(
    faulty: Running, log: io.StringIO, url: str
) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, *PIXELS.shape], "data": [PIXELS.tolist()]}
    asked = {"inputs": [tensor], "parameters": {"budget_ms": 5000}}
    failed = ask(faulty, url) if url == URL else faulty.client.post(url, json=asked)
    assert failed.status_code == 500
    assert_a_fault_is_logged(log, failed.headers["x-request-id"])


def test_so_is_one_over_grpc(faulty: Running, log: io.StringIO) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        infer(faulty)
    error: Any = refused.value
    assert error.code() == grpc.StatusCode.INTERNAL
    faulty.wait_for('anytime_requests_total{outcome="failed"}', 1)
    assert_a_fault_is_logged(log, dict(error.trailing_metadata())["x-request-id"])


def test_what_uvicorn_logs_of_a_request_names_it(server: Running, log: io.StringIO) -> None:
    server.repository.metrics._families.append(None)  # type: ignore[arg-type]  # any fault will do
    try:
        failed = server.client.get("/metrics")
    finally:
        server.repository.metrics._families.pop()
    assert failed.status_code == 500
    (stack,) = [line for line in lines(log) if line["level"] == "error"]
    assert stack["logger"] == "uvicorn.error"
    assert "AttributeError" in stack["exception"]
    assert stack["request_id"] == failed.headers["x-request-id"]


# ---- the whole process ----


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("ANYTIME_")},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_line_of_a_server_is_json_and_nothing_in_it_is_a_caller_s(artifact: Path) -> None:
    key, hash_ = new_key()
    process = start(
        *("-m", "service", "serve", "--artifact", str(artifact), "--port", "0", "--grpc-port", ""),
        *("--profile-seconds", "0.01", "--batch-sizes", "1,2", "--profile-cache", ""),
        *("--log-format", "json", "--log-requests", "1", "--log-level", "debug", "--api-keys", hash_),
        *("--forwarded-allow-ips", "127.0.0.1"),
    )
    assert process.stderr is not None
    with process:
        said = [process.stderr.readline()]
        while not (found := re.search(r"(http://[^/]+)/predict", said[-1])):
            said.append(process.stderr.readline())
            assert said[-1], said
        ids = [post_as_somebody(found[1], key, number) for number in range(3)]
        process.send_signal(signal.SIGTERM)
        said += process.stderr.readlines()
        assert process.wait(30) in {0, -signal.SIGTERM}
    documents = [json.loads(line) for line in said]
    logged = [one for one in documents if one["logger"] == "service.requests"]
    assert [(one["request_id"], one["status"]) for one in logged] == list(
        zip(ids, (200, 415, 401), strict=True)
    )
    for theirs in (key, hash_, "203.0.113.9", "holiday.png", "mozilla", "127.0.0.1:", *toy_artifact.LABELS):
        found_in = [line for line in said if theirs in line and '"logger":"service"' not in line]
        assert found_in == [], theirs


def post_as_somebody(url: str, key: str, number: int) -> str:
    """Send a picture, with all that could identify who sends it; returns the id in the answer."""
    part = 'Content-Disposition: form-data; name="image"; filename="holiday.png"\r\nContent-Type: image/png'
    body = f"--x\r\n{part}\r\n\r\nno picture {number}\r\n--x--\r\n".encode()
    pixels = PIXELS.tobytes()
    is_form = number == 1
    request = urllib.request.Request(
        f"{url}/predict?budget_ms=5000",
        body if is_form else pixels,
        {
            "content-type": "multipart/form-data; boundary=x" if is_form else RAW["content-type"],
            "x-api-key": "wrong-" + key if number == 2 else key,
            "x-forwarded-for": "203.0.113.9",
            "user-agent": "mozilla",
        },
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return str(response.headers["x-request-id"])
    except urllib.error.HTTPError as refused:
        return str(refused.headers["x-request-id"])


def test_whatever_logs_in_this_process_writes_such_lines() -> None:
    code = """
import logging, threading, warnings
from service import logs
from service.settings import Settings
logs.configure(Settings(_env_file=None, log_format="json"))
logging.getLogger("uvicorn.error").error("one\\ntwo")
logging.getLogger("grpc._cython.cygrpc").warning("three")
logging.getLogger("grpc._cython.cygrpc").error("ExecuteBatchError raised in core by servicer method [/x]")
logging.getLogger("PIL.PngImagePlugin").error("parts of a picture")
warnings.warn("four", stacklevel=1)
def fail():
    raise ValueError("five")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""
    process = start("-c", code)
    _, said = process.communicate(timeout=50)
    documents = [json.loads(line) for line in said.splitlines()]
    assert [one["logger"] for one in documents] == [
        *("uvicorn.error", "grpc._cython.cygrpc", "py.warnings", "service.logs", "service.logs")
    ]
    assert documents[0]["message"] == "one\ntwo"
    assert "four" in documents[2]["message"]
    assert all("ValueError: five" in one["exception"] for one in documents[3:])
    assert process.returncode == 1


def test_a_mistake_in_the_settings_is_json_too_once_that_is_known(artifact: Path) -> None:
    process = start(
        *("-m", "service", "serve", "--artifact", str(artifact / "nowhere"), "--log-format", "json"),
    )
    _, said = process.communicate(timeout=50)
    assert process.returncode == 2
    (document,) = [json.loads(line) for line in said.splitlines()]
    assert (document["level"], "ANYTIME_ARTIFACT" in document["message"]) == ("critical", True)
