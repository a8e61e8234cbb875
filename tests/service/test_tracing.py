"""Spans as a collector gets them over OTLP, from a server behind a real socket."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from service import oip_pb2 as pb
from service.access import new_key
from service.inference import Inference
from service.settings import Settings, SettingsError
from service.tracing import Tracer
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession, Launcher, Running

PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
RAW = {"content-type": "application/octet-stream"}
URL = "/predict?budget_ms=5000"
CALLER = "00f067aa0ba902b7"
MANY = 1000.0
"""Traces a second: more than any test asks for."""


@dataclass(frozen=True)
class Span:
    """One span, in the words of the tests."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool
    trace_state: str

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


def attributes_of(pairs: Sequence[Any]) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


class Collector(TraceServiceServicer):
    """A collector in this process; it can be told to wait before it answers, or to refuse."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.metadata: list[dict[str, str]] = []
        self.n_calls = 0
        self.called = threading.Event()
        self.answers = threading.Event()
        self.answers.set()
        self.refuses_with: grpc.StatusCode | None = None
        self._server = grpc.server(ThreadPoolExecutor(32))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        self.n_calls += 1
        self.called.set()
        assert self.answers.wait(30)
        if self.refuses_with:
            context.abort(self.refuses_with, "not today")
        self.metadata.append(dict(context.invocation_metadata()))
        for resource in request.resource_spans:
            self.resources.append(attributes_of(resource.resource.attributes))
            self.spans += [told(span) for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def wait_for(self, n_traces: int) -> dict[str, list[Span]]:
        """The spans by trace, once there are so many traces; the test's own timeout ends it otherwise."""
        while len(traces := self.traces()) < n_traces:
            time.sleep(0.005)
        return traces

    def traces(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in list(self.spans):
            found.setdefault(span.trace_id, []).append(span)
        return found

    def one(self) -> list[Span]:
        """The spans of the only trace."""
        (spans,) = self.wait_for(1).values()
        return spans

    def stop(self) -> None:
        self.answers.set()
        self._server.stop(None).wait()


def told(span: OtlpSpan) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        attributes_of(span.attributes),
        span.status.code == Status.STATUS_CODE_ERROR,
        span.trace_state,
    )


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture
def traced(launch: Launcher, collector: Collector) -> Running:
    """A server that traces whatever its callers trace, and nothing else."""
    return launch(traces_endpoint=collector.url, trace_share=0.0, max_traces_per_second=MANY, grpc_port=0)


def context(number: int = 1, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{number:032x}-{CALLER}-{flags}"}


def ask(server: Running, headers: dict[str, str] | None = None, url: str = URL) -> httpx.Response:
    return server.client.post(url, content=PIXELS.tobytes(), headers=RAW | (headers or {}))


def root_of(spans: Sequence[Span]) -> Span:
    (root,) = [span for span in spans if span.kind == OtlpSpan.SPAN_KIND_SERVER]
    return root


def below(spans: Sequence[Span]) -> list[Span]:
    """The others, in the order of time; each is the server span's child."""
    root = root_of(spans)
    others = [span for span in spans if span is not root]
    assert {span.parent_id for span in others} <= {root.span_id}
    assert {span.kind for span in others} <= {OtlpSpan.SPAN_KIND_INTERNAL}
    return sorted(others, key=lambda span: (span.start_ns, span.end_ns))


# ---- what a trace says ----


def test_a_request_is_a_server_span_below_its_caller_s(traced: Running, collector: Collector) -> None:
    before_ns = time.time_ns()
    response = ask(traced, context(7) | {"tracestate": "vendor=1", "x-request-id": "mine"})
    answer = response.json()
    root = root_of(spans := collector.one())

    assert (root.trace_id, root.parent_id) == (f"{7:032x}", CALLER)
    assert {span.trace_state for span in spans} == {"vendor=1"}
    assert root.name == "POST /predict"
    assert not root.is_error
    elapsed_ms = root.attributes.pop("anytime.elapsed_ms")
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "url.path": "/predict",
        "url.scheme": "http",
        "anytime.request_id": "mine",
        "anytime.outcome": "answered",
        "anytime.model": "toy",
        "anytime.version": "7",
        "anytime.budget_ms": 5000,
        "anytime.column": "3",
        "anytime.columns_run": ["1", "2", "3"],
        "anytime.stopped_by": "deepest",
        "anytime.pictures": 1,
        "anytime.body_bytes": PIXELS.size,
    }
    assert answer["elapsed_ms"] <= elapsed_ms <= root.duration_ms + 0.001
    # The arrival is taken to be a little earlier than it was seen, and clocks are read one after the other.
    assert before_ns - 1e9 < root.start_ns < root.end_ns < time.time_ns() + 1e9
    assert "traceparent" not in response.headers  # the standard has it for requests only


def test_the_parts_of_a_request_follow_each_other_and_add_up(traced: Running, collector: Collector) -> None:
    timing = ask(traced, context()).json()["timing_ms"]
    spans = collector.one()
    root, parts = root_of(spans), below(spans)

    assert [part.name for part in parts] == [
        *("read", "decode", "queue", "column 1", "queue", "column 2", "queue", "column 3", "queue", "write")
    ]
    assert (parts[0].start_ns, parts[-1].end_ns) == (root.start_ns, root.end_ns)
    for one, next_ in itertools.pairwise(parts):
        assert one.start_ns <= one.end_ns <= next_.start_ns
    spent = {
        kind: sum(p.duration_ms for p in parts if p.name.startswith(kind))
        for kind in ("decode", "queue", "column")
    }
    assert spent["decode"] == pytest.approx(timing["decode"], abs=0.001)
    assert spent["queue"] == pytest.approx(timing["queue"], abs=0.001)
    assert spent["column"] == pytest.approx(timing["inference"], abs=0.001)
    runs = [part.attributes for part in parts if part.name.startswith("column")]
    assert [run["anytime.column"] for run in runs] == ["1", "2", "3"]
    assert [run["anytime.images"] for run in runs] == [1, 1, 1]
    assert [run["anytime.run"] for run in runs] == [1, 2, 3]
    assert all(run["anytime.predicted_ms"] > 0 for run in runs)


def test_a_stream_is_traced(traced: Running, collector: Collector) -> None:
    ask(traced, context(), f"{URL}&stream=sse")
    parts = below(collector.one())
    assert [part.name for part in parts if part.name != "queue"] == [
        *("read", "decode", "column 1", "column 2", "column 3", "write")
    ]


def test_a_request_with_several_pictures_has_each_run_once(traced: Running, collector: Collector) -> None:
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [3, *PIXELS.shape],
        "data": [PIXELS.tolist()] * 3,
    }
    asked = {"inputs": [tensor], "parameters": {"budget_ms": 5000}}
    traced.client.post("/v2/models/toy/versions/7/infer", json=asked, headers=context()).raise_for_status()
    spans = collector.one()
    root = root_of(spans)
    assert root.name == "POST /v2/models/{name}/versions/{version}/infer"
    assert root.attributes["url.path"] == "/v2/models/toy/versions/7/infer"
    assert root.attributes["anytime.pictures"] == 3
    runs = [part.attributes["anytime.run"] for part in below(spans) if part.name.startswith("column")]
    assert len(runs) == len(set(runs)) >= 3


def infer(server: Running, metadata: dict[str, str], model: str = "") -> Any:
    request = pb.ModelInferRequest(
        inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, *PIXELS.shape]}],
        raw_input_contents=[PIXELS.tobytes()],
        model_name=model,
    )
    request.parameters["budget_ms"].double_param = 5000
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return call.with_call(request.SerializeToString(), metadata=tuple(metadata.items()))


def test_a_call_over_grpc_is_traced(traced: Running, collector: Collector) -> None:
    _, call = infer(traced, context(9) | {"x-request-id": "mine"})
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    spans = collector.one()
    root = root_of(spans)
    assert (root.trace_id, root.parent_id) == (f"{9:032x}", CALLER)
    assert root.name == "inference.GRPCInferenceService/ModelInfer"
    said = {name: root.attributes.get(name) for name in root.attributes if name.startswith(("rpc", "http"))}
    assert said == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "OK",
    }
    assert root.attributes["anytime.request_id"] == "mine"
    assert [part.name for part in below(spans) if part.name != "queue"] == [
        *("read", "column 1", "column 2", "column 3", "write")
    ]


def test_a_call_over_grpc_that_is_refused_says_so(traced: Running, collector: Collector) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        infer(traced, context() | {"x-request-id": "mine"}, model="nobody")
    error: Any = refused.value
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"
    root = root_of(collector.one())
    assert root.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert (root.attributes["anytime.outcome"], root.is_error) == ("invalid", False)


def test_a_refusal_and_an_odd_method_say_why(traced: Running, collector: Collector) -> None:
    ask(traced, context(1), "/predict?budget_ms=0.1")
    refused = root_of(collector.wait_for(1)[f"{1:032x}"])
    assert refused.attributes["http.response.status_code"] == 429
    assert (refused.attributes["anytime.outcome"], refused.is_error) == ("rejected", False)
    assert refused.attributes["anytime.reason"] in {"budget", "body", "load"}
    traced.client.request("PROPFIND", "/predict", headers=context(2))
    odd = root_of(collector.wait_for(2)[f"{2:032x}"])
    assert odd.name == "HTTP /predict"
    assert odd.attributes["http.request.method"] == "_OTHER"
    assert odd.attributes["http.request.method_original"] == "PROPFIND"


@pytest.fixture
def gated(launch: Launcher, session: BlockedSession, inference: Inference, collector: Collector) -> Running:
    """As `traced`, but every run waits for the session."""
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    waiting = Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)
    return launch(
        inference=waiting, traces_endpoint=collector.url, trace_share=0.0, max_traces_per_second=MANY
    )


def test_a_failed_run_is_an_error(gated: Running, session: BlockedSession, collector: Collector) -> None:
    session.fails = True
    session.released.set()
    assert ask(gated, context()).status_code == 500
    spans = collector.one()
    assert root_of(spans).is_error
    assert root_of(spans).attributes["error.type"] == "500"
    assert [part.name for part in below(spans) if part.is_error] == ["column 1"]


def test_those_who_were_run_together_name_the_same_run(
    gated: Running, session: BlockedSession, collector: Collector
) -> None:
    url = f"http://127.0.0.1:{gated.address[1]}{URL}&min_confidence=0"

    def post(number: int) -> None:
        headers = RAW | context(number)
        httpx.post(url, content=PIXELS.tobytes(), headers=headers, timeout=30, trust_env=False)

    with ThreadPoolExecutor(3) as threads:
        threads.submit(post, 1)
        assert session.started.wait(30)
        threads.submit(post, 2)
        threads.submit(post, 3)
        gated.wait_for("anytime_queue_length", 2)
        session.released.set()
    traces = collector.wait_for(3)
    runs = {
        number: [
            part.attributes for part in below(traces[f"{number:032x}"]) if "anytime.run" in part.attributes
        ]
        for number in (1, 2, 3)
    }
    assert [one["anytime.images"] for one in runs[1]] == [1]
    assert runs[2] == runs[3]
    assert runs[2][0]["anytime.images"] == 2
    assert runs[1][0]["anytime.run"] != runs[2][0]["anytime.run"]


def test_a_caller_who_leaves_during_a_run_leaves_a_trace(
    gated: Running, session: BlockedSession, collector: Collector
) -> None:
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: {RAW['content-type']}\r\n"
    head += f"Content-Length: {PIXELS.size}\r\ntraceparent: {context()['traceparent']}\r\n\r\n"
    with gated.connect() as connection:
        connection.sendall(head.encode() + PIXELS.tobytes())
        assert session.started.wait(30)
    spans = collector.one()
    root, parts = root_of(spans), below(spans)
    assert root.attributes["anytime.outcome"] == "disconnected"
    assert "http.response.status_code" not in root.attributes
    assert [part.name for part in parts] == ["read", "decode", "queue", "column 1", "write"]
    session.released.set()


# ---- which requests are traced ----


def test_a_request_that_is_not_sampled_sends_nothing(traced: Running, collector: Collector) -> None:
    ask(traced)
    ask(traced, context(1, flags="00"))
    ask(traced, {"traceparent": f"00-{1:032x}-{CALLER}"})
    ask(traced, {"traceparent": "nonsense"})
    traced.client.get("/model", headers=context(2))
    traced.client.get("/healthz/live", headers=context(3))
    ask(traced, context(4))
    assert list(collector.wait_for(1)) == [f"{4:032x}"]


def test_a_share_of_those_without_a_trace_begins_one(launch: Launcher, collector: Collector) -> None:
    server = launch(traces_endpoint=collector.url, trace_share=1.0, max_traces_per_second=MANY)
    ask(server)
    ask(server, {"traceparent": f"00-{0:032x}-{CALLER}-01"})
    ask(server, context(1, flags="00"))
    traces = collector.wait_for(2)
    assert {root_of(spans).parent_id for spans in traces.values()} == {""}
    assert len(traces) == 2
    assert f"{1:032x}" not in traces


def test_callers_cannot_have_more_traced_than_the_rate(launch: Launcher, collector: Collector) -> None:
    server = launch(traces_endpoint=collector.url, max_traces_per_second=1e-6)
    for number in range(1, 6):
        assert ask(server, context(number)).status_code == 200
    collector.wait_for(1)
    launch.stack.close()
    assert list(collector.traces()) == [f"{1:032x}"]


def test_whoever_is_not_let_in_is_not_traced(launch: Launcher, collector: Collector) -> None:
    key, hash_ = new_key()
    server = launch(traces_endpoint=collector.url, api_keys=(hash_,))
    assert ask(server, context(1)).status_code == 401
    assert ask(server, context(2) | {"x-api-key": key}).status_code == 200
    assert list(collector.wait_for(1)) == [f"{2:032x}"]
    assert key not in repr(collector.spans)


# ---- the collector, and its absence ----


def test_the_server_says_what_it_is_and_the_environment_may_say_more(
    launch: Launcher, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=here")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=secret")
    ask(launch(traces_endpoint=collector.url), context())
    collector.wait_for(1)
    (resource,) = collector.resources
    assert resource["service.name"] == "pictures"
    assert resource["deployment.environment.name"] == "here"
    assert {"service.version", "service.instance.id", "telemetry.sdk.language"} <= resource.keys()
    assert collector.metadata[0]["x-token"] == "secret"


def test_a_variable_that_opentelemetry_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "lzma")
    with pytest.raises(SettingsError, match=r"lzma.*correct what begins with OTEL_"):
        Tracer(Settings(_env_file=None, traces_endpoint="http://127.0.0.1:4317"))


def test_stopping_sends_what_waits(launch: Launcher, collector: Collector) -> None:
    collector.answers.clear()
    server = launch(traces_endpoint=collector.url, max_traces_per_second=MANY)
    for number in range(1, 21):
        ask(server, context(number))
    assert collector.called.wait(30)
    stopping = threading.Thread(target=launch.stack.close)
    stopping.start()
    assert server.service._tracer is not None
    assert server.service._tracer._closing.wait(30)
    collector.answers.set()
    stopping.join()
    assert len(collector.traces()) == 20
    assert not any(thread.name == "tracing" for thread in threading.enumerate())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "service.tracing"]


def test_without_a_collector_everything_is_answered_and_one_warning_says_what_is_lost(
    launch: Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    collector = Collector()
    collector.stop()
    server = launch(traces_endpoint=collector.url, max_traces_per_second=MANY, traces_timeout_s=0.2)
    for number in range(1, 31):
        assert ask(server, context(number)).status_code == 200
    while not warnings_of(caplog):
        time.sleep(0.005)
    launch.stack.close()
    first, *others = warnings_of(caplog)
    assert len(others) <= 1, "what was lost since is said at the end"
    lost = [int(one.split()[3]) for one in (first, *others)]
    assert sum(lost) == 30
    assert "StatusCode.UNAVAILABLE" in first
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry")] == []


def test_a_collector_that_refuses_costs_its_spans_only(
    launch: Launcher, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.refuses_with = grpc.StatusCode.UNAUTHENTICATED
    server = launch(traces_endpoint=collector.url)
    assert ask(server, context(1)).status_code == 200
    while not warnings_of(caplog):
        time.sleep(0.005)
    collector.refuses_with = None
    ask(server, context(2))
    assert list(collector.wait_for(1)) == [f"{2:032x}"]
    (warning,) = warnings_of(caplog)
    assert "The spans of 1 requests are lost; answers are not affected." in warning
    assert "UNAUTHENTICATED" in warning


def test_only_so_many_wait_for_a_collector_that_hangs(
    launch: Launcher, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.answers.clear()
    server = launch(
        traces_endpoint=collector.url, max_traces_per_second=MANY, max_waiting_traces=2, traces_timeout_s=30
    )
    assert ask(server, context(1)).status_code == 200
    assert collector.called.wait(30)
    for number in range(2, 12):
        assert ask(server, context(number)).status_code == 200
    collector.answers.set()
    assert list(collector.wait_for(3)) == [f"{number:032x}" for number in (1, 2, 3)]
    launch.stack.close()
    assert len(collector.traces()) == 3
    assert [one.split(";")[0] for one in warnings_of(caplog)] == ["The spans of 8 requests are lost"]


def test_stopping_does_not_wait_for_a_collector_that_hangs(
    launch: Launcher, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.answers.clear()
    server = launch(traces_endpoint=collector.url, max_traces_per_second=MANY, traces_timeout_s=1.0)
    for number in range(1, 41):
        assert ask(server, context(number)).status_code == 200
    assert collector.called.wait(30)
    launch.stack.close()
    assert not any(thread.name == "tracing" for thread in threading.enumerate())
    assert collector.n_calls < 8, "of ten and more that it would take"
    assert sum(int(one.split()[3]) for one in warnings_of(caplog)) == 40


# ---- switched off ----


def test_nothing_is_sent_by_others_because_the_environment_says_so(
    launch: Launcher, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FastAPI's own telemetry would send queries and exceptions; here it would say that it cannot."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    server = launch()
    server.client.get("/model?secret=1", headers=context())
    assert ask(server, context()).status_code == 200
    launch.stack.close()
    assert [record.getMessage() for record in caplog.records if "telemetry" in record.getMessage()] == []
    assert collector.spans == []


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=50
    )


def test_a_server_that_sends_no_spans_does_not_import_what_would() -> None:
    code = "import sys, service.serving, service.oip_grpc; print('opentelemetry.sdk' in sys.modules)"
    assert run(code).stdout == "False\n"


def test_without_the_extra_a_sentence_says_what_to_install(artifact: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; import service.__main__ as it; exit(it.main())"
    )
    settings = (
        "--artifact",
        str(artifact),
        "--port",
        "0",
        "--profile-seconds",
        "0.01",
        "--profile-cache",
        "",
    )
    refused = run(code, "serve", *settings, "--traces-endpoint", "http://127.0.0.1:4317")
    assert refused.returncode == 2
    assert "install the extra `tracing`" in refused.stderr.splitlines()[-1]
