"""The HTTP contract through a real socket: the answer, every status, and what a departing caller causes."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.types import Message

from service.engine import InferenceThread, Served
from service.errors import OUTCOMES, Problem
from service.inference import Inference
from service.models import Asked, Model
from service.record import Answer
from service.settings import Settings
from tests.service import toy_artifact
from tests.service.conftest import (
    BATCH_SIZES,
    BlockedSession,
    Launcher,
    Running,
    nothing_left_of,
    profile_of,
)

PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
RAW = {"content-type": "application/octet-stream"}


def png(pixels: NDArray[np.uint8] = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def expected_probabilities(columns: Sequence[str]) -> NDArray[np.float64]:
    """What the toy artifact must answer, computed by hand and in double precision."""
    logits_CK = [PIXELS.reshape(-1) / 255.0 @ toy_artifact.projection(column) for column in columns]
    log_p_CK = [logits_K - np.log(np.exp(logits_K).sum()) for logits_K in logits_CK]
    odds_K = np.exp(np.mean(log_p_CK, axis=0) / 2.0)
    probabilities_K: NDArray[np.float64] = odds_K / odds_K.sum()
    return probabilities_K


def assert_problem(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem.keys() == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert says in problem["detail"]
    assert problem["type"].startswith("urn:anytime:problem:")


# ---- the answer ----


def test_an_answer_has_exactly_the_fields_of_the_contract(server: Running) -> None:
    response = server.client.post(
        "/predict?budget_ms=5000&top_k=3", content=png(), headers={"content-type": "image/png"}
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    expected_K = expected_probabilities(["1", "2", "3"])
    order = np.argsort(-expected_K)[:3]
    assert list(answer) == [
        *("model", "version", "label", "index", "confidence", "top", "column", "depth", "columns_run"),
        *("stopped_by", "budget_ms", "timing_ms"),
        *("elapsed_ms", "deadline_met"),  # last, because decided when all else is written
    ]
    assert [one["index"] for one in answer["top"]] == order.tolist()
    assert [one["label"] for one in answer["top"]] == [toy_artifact.LABELS[i] for i in order]
    assert [one["probability"] for one in answer["top"]] == pytest.approx(expected_K[order], rel=1e-4)
    assert (answer["label"], answer["index"]) == (answer["top"][0]["label"], answer["top"][0]["index"])
    assert answer["confidence"] == answer["top"][0]["probability"]
    assert (answer["model"], answer["version"]) == ("toy", "7")
    assert (answer["column"], answer["depth"], answer["columns_run"]) == ("3", 12, ["1", "2", "3"])
    assert (answer["stopped_by"], answer["budget_ms"], answer["deadline_met"]) == ("deepest", 5000, True)
    assert answer["timing_ms"].keys() == {"decode", "queue", "inference"}
    assert sum(answer["timing_ms"].values()) <= answer["elapsed_ms"]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"content": png(), "headers": {"content-type": "image/png"}}, id="png"),
        pytest.param({"content": png(), "headers": {"content-type": "image/jpeg"}}, id="png called jpeg"),
        pytest.param({"content": PIXELS.tobytes(), "headers": RAW}, id="raw"),
        pytest.param({"files": {"image": ("a.png", png(), "image/png")}}, id="multipart"),
        pytest.param({"json": {"image": base64.b64encode(png()).decode()}}, id="json"),
    ],
)
def test_every_body_type_leads_to_the_same_answer(server: Running, request_: dict[str, Any]) -> None:
    answer = server.client.post("/predict?budget_ms=5000", **request_).json()
    assert answer["confidence"] == pytest.approx(expected_probabilities(["1", "2", "3"]).max(), rel=1e-4)


def test_the_query_wins_over_the_header_and_the_header_over_the_default(server: Running) -> None:
    def budget(query: str, headers: dict[str, str]) -> float:
        response = server.client.post("/predict" + query, content=PIXELS.tobytes(), headers=RAW | headers)
        return float(response.json()["budget_ms"])

    assert budget("?budget_ms=5000", {"x-budget-ms": "4000"}) == 5000
    assert budget("", {"x-budget-ms": "4000"}) == 4000
    assert budget("", {}) == 50


def test_enough_confidence_ends_it_early(server: Running) -> None:
    url = "/predict?budget_ms=5000&min_confidence=0"
    answer = server.client.post(url, content=PIXELS.tobytes(), headers=RAW).json()
    assert (answer["columns_run"], answer["stopped_by"]) == (["1"], "confidence")


def test_a_sane_request_id_comes_back_and_another_is_replaced(server: Running) -> None:
    sane = server.client.get("/healthz/live", headers={"x-request-id": "abc-123"})
    assert sane.headers["x-request-id"] == "abc-123"
    strange = server.client.get("/healthz/live", headers={"x-request-id": "a b" + "c" * 200})
    assert len(strange.headers["x-request-id"]) == 32


# ---- every refusal ----


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("budget_ms=0", "from 0.1 to 10000"),
        ("budget_ms=-5", "budget_ms"),
        ("budget_ms=nan", "budget_ms"),
        ("budget_ms=1e999", "budget_ms"),
        ("budget_ms=", "budget_ms"),
        ("budget_ms=10001", "budget_ms"),
        ("budget_ms=5&budget_ms=6", "twice"),
        ("top_k=0", "from 1 to 5"),
        ("top_k=6", "from 1 to 5"),
        ("top_k=1.5", "whole number"),
        ("min_confidence=1.1", "from 0 to 1"),
        ("budget=5", "Unknown parameter 'budget'"),
        ("stream=xml", "stream must be sse or ndjson"),
    ],
)
def test_parameters_out_of_range_are_refused(server: Running, query: str, says: str) -> None:
    assert_problem(server.client.post(f"/predict?{query}", content=PIXELS.tobytes(), headers=RAW), 422, says)


def test_a_budget_header_out_of_range_is_refused(server: Running) -> None:
    response = server.client.post("/predict", content=PIXELS.tobytes(), headers=RAW | {"x-budget-ms": "soon"})
    assert_problem(response, 422, "budget_ms")


def test_other_refusals_name_the_remedy(server: Running) -> None:
    post = server.client.post
    assert_problem(
        post("/predict", content=b"GIF89a", headers={"content-type": "image/gif"}), 415, "use one of"
    )
    assert_problem(
        post("/predict", content=b"hello", headers={"content-type": "image/png"}), 415, "convert it"
    )
    assert_problem(post("/predict", content=b"", headers={"content-type": "image/png"}), 400, "empty")
    assert_problem(post("/predict", content=b"x", headers=RAW), 400, "192 bytes")
    assert_problem(server.client.get("/nothing"), 404, "/docs")
    wrong_method = server.client.get("/predict")
    assert_problem(wrong_method, 405, "POST")
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/predict", "/v2/models/toy/infer", "/v2/models/toy/versions/7/infer"])
@pytest.mark.parametrize("more", ["%0A", "%0D", "%00", "%7F", "%C2%85"])
def test_a_path_with_a_control_character_is_nothing(server: Running, path: str, more: str) -> None:
    """Starlette would take a newline at the end for the end."""
    for method in ("POST", "GET"):
        refused = server.client.request(method, path + more, content=b"")
        assert refused.status_code == 404, refused.text
        assert "There is nothing at" in refused.text


def test_a_body_beyond_its_bound_is_refused_by_its_header_and_while_it_streams(launch: Launcher) -> None:
    server = launch(max_body_bytes=1000)
    assert_problem(server.client.post("/predict", content=b"x" * 1001, headers=RAW), 413, "1000 bytes")
    chunks: Iterator[bytes] = (b"x" * 100 for _ in range(11))
    assert_problem(server.client.post("/predict", content=chunks, headers=RAW), 413, "1000 bytes")


def test_a_body_that_never_ends_is_let_go(launch: Launcher) -> None:
    server = launch(body_timeout_s=0.05)
    assert b" 408 " in send_half_a_body(server, budget_ms=5000)
    assert b" 429 " in send_half_a_body(server, budget_ms=10)
    assert server.metric('anytime_requests_total{outcome="invalid"}') == 1
    assert server.metric('anytime_requests_total{outcome="rejected"}') == 1
    assert server.metric('anytime_rejections_total{reason="body"}') == 1


def test_a_picture_that_takes_longer_to_decode_than_the_budget_is_refused_when_that_ends(
    launch: Launcher,
) -> None:
    png = io.BytesIO()
    Image.new("RGB", (2900, 2900)).save(png, "PNG", compress_level=1)
    server = launch()
    refused = server.client.post(
        "/predict?budget_ms=5", content=png.getvalue(), headers={"content-type": "image/png"}
    )
    assert_problem(refused, 429, "while the picture was decoded")
    assert server.metric('anytime_rejections_total{reason="decode"}') == 1


def test_only_so_many_threads_decode_pictures(launch: Launcher) -> None:
    server, others = launch(decode_threads=1), set(threading.enumerate())
    picture = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(picture, "PNG", compress_level=1)

    def ask() -> None:
        url = f"http://127.0.0.1:{server.address[1]}/predict?budget_ms=9000"
        httpx.post(url, content=picture.getvalue(), headers={"content-type": "image/png"}, trust_env=False)

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sum(thread.name.startswith("decode") for thread in set(threading.enumerate()) - others) == 1


def send_half_a_body(server: Running, *, budget_ms: float) -> bytes:
    with server.connect() as connection:
        connection.sendall(
            f"POST /predict?budget_ms={budget_ms} HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n"
            "Content-Type: application/octet-stream\r\n\r\nhalf".encode()
        )
        return connection.recv(1000)


def test_what_cannot_be_had_in_time_is_rejected_with_both_retry_headers(launch: Launcher) -> None:
    server = launch(profile=profile_of(1.0))
    rejected = server.client.post("/predict?budget_ms=300", content=PIXELS.tobytes(), headers=RAW)
    assert_problem(rejected, 429, "grant at least 100")
    assert int(rejected.headers["retry-after"]) >= 1
    assert int(rejected.headers["retry-after-ms"]) >= 1


class Caller(threading.Thread):
    """A client of its own, so that the test can go on while it waits."""

    def __init__(self, server: Running, budget_ms: float) -> None:
        super().__init__()
        self._url = f"{server.client.base_url}/predict?budget_ms={budget_ms}"
        self._response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self._response = httpx.post(
            self._url, content=PIXELS.tobytes(), headers=RAW, timeout=30, trust_env=False
        )

    def response(self) -> httpx.Response:
        self.join()
        assert self._response is not None
        return self._response


def test_a_request_that_waits_in_vain_gets_504_while_the_processor_is_still_busy(
    blocked: Running, session: BlockedSession
) -> None:
    first = Caller(blocked, 5000)
    assert session.started.wait(30)
    assert_problem(
        blocked.client.post("/predict?budget_ms=50", content=PIXELS.tobytes(), headers=RAW), 504, "waited"
    )
    assert not session.released.is_set()
    session.released.set()
    assert first.response().status_code == 200
    assert session.n_images == [1, 1, 1]  # three columns for the first; the expired one cost no run


def test_an_answer_past_its_deadline_says_so(blocked: Running, session: BlockedSession) -> None:
    first = Caller(blocked, 30)
    assert session.started.wait(30)
    # A second request with the same budget, sent later, has expired: so the first is past its deadline.
    assert (
        blocked.client.post("/predict?budget_ms=40", content=PIXELS.tobytes(), headers=RAW).status_code == 504
    )
    session.released.set()
    answer = first.response().json()
    assert answer["deadline_met"] is False
    assert answer["elapsed_ms"] > answer["budget_ms"]
    assert blocked.metric('anytime_requests_total{outcome="late"}') == 1


def test_the_time_it_takes_to_write_a_long_answer_counts(
    inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def slow_dumps(document: dict[str, Any]) -> bytes:
        nonlocal now_s
        now_s += 1.0 if "top" in document else 0.0
        return json.dumps(document).encode()

    processor = InferenceThread(inference)
    model = Model(Settings(profile_cache=None), inference, processor, profile_of(1e-5), lambda: now_s)
    monkeypatch.setattr(orjson, "dumps", slow_dumps)
    served = Served(
        outcome="answered",
        arrived_s=0.0,
        deadline_s=0.5,
        entered_s=0.0,
        settled_s=0.0,
        queue_s=0.0,
        inference_s=0.0,
        columns_run=("1",),
        probabilities_K=np.full(5, 0.2, np.float32),
    )
    answer = json.loads(model.document(Answer(served, 0.0), Asked(0.5, 5))[0])
    processor.close()
    assert answer["deadline_met"] is False
    assert answer["elapsed_ms"] == 1000


def test_a_run_that_fails_is_500_and_the_next_is_served(blocked: Running, session: BlockedSession) -> None:
    session.fails = True
    session.released.set()
    url = "/predict?budget_ms=5000"
    assert_problem(blocked.client.post(url, content=PIXELS.tobytes(), headers=RAW), 500, "retry")
    session.fails = False
    assert blocked.client.post(url, content=PIXELS.tobytes(), headers=RAW).status_code == 200


def test_draining_answers_the_running_and_turns_the_rest_away(
    blocked: Running, session: BlockedSession
) -> None:
    running = Caller(blocked, 5000)
    assert session.started.wait(30)
    waiting = Caller(blocked, 5000)
    blocked.wait_for("anytime_queue_length", 1)
    drain = threading.Thread(target=blocked.on_loop, args=[blocked.service.drain()])
    drain.start()
    assert_problem(waiting.response(), 503, "another one")
    assert_problem(blocked.client.get("/healthz/ready"), 503, "another")
    assert_problem(
        blocked.client.post("/predict?budget_ms=5000", content=PIXELS.tobytes(), headers=RAW),
        503,
        "another one",
    )
    assert blocked.client.get("/healthz/live").status_code == 200
    session.released.set()
    drain.join()
    assert running.response().json()["columns_run"] == ["1"]


def test_a_server_that_cancels_whom_it_has_lost_is_obeyed(server: Running) -> None:
    """Not ours, which only cancels what is left when draining ends."""
    sent: list[Message] = []

    async def nothing() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def keep(message: Message) -> None:
        sent.append(message)

    async def cancelled(path: str) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        task = asyncio.create_task(server.service(scope, nothing, keep))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = server.metric('anytime_requests_total{outcome="disconnected"}')
    server.on_loop(cancelled("/predict"))
    server.on_loop(cancelled("/v2/models/toy/infer"))
    assert sent == []
    assert server.metric('anytime_requests_total{outcome="disconnected"}') == before + 2


def test_one_who_hangs_up_while_waiting_costs_no_inference(blocked: Running, session: BlockedSession) -> None:
    first = Caller(blocked, 5000)
    assert session.started.wait(30)
    with blocked.connect() as connection:
        connection.sendall(
            b"POST /predict?budget_ms=9000 HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n"
            b"Content-Type: application/octet-stream\r\n\r\n" + PIXELS.tobytes()
        )
        blocked.wait_for("anytime_queue_length", 1)
    blocked.wait_for("anytime_queue_length", 0)
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    session.released.set()
    assert first.response().status_code == 200
    assert session.n_images == [1, 1, 1]


def test_one_who_hangs_up_while_running_harms_nobody(blocked: Running, session: BlockedSession) -> None:
    with blocked.connect() as connection:
        connection.sendall(
            b"POST /predict?budget_ms=9000 HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n"
            b"Content-Type: application/octet-stream\r\n\r\n" + PIXELS.tobytes()
        )
        assert session.started.wait(30)
        second = Caller(blocked, 5000)
        blocked.wait_for("anytime_queue_length", 1)
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    session.released.set()
    assert second.response().json()["columns_run"] == ["1", "2", "3"]
    assert session.n_images == [1, 1, 1, 1]


def test_too_many_open_requests_are_refused_and_counted_but_health_is_not(launch: Launcher) -> None:
    server = launch(max_open_requests=1)
    with server.connect() as connection:
        connection.sendall(
            b"POST /predict?budget_ms=9000 HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n"
            b"Content-Type: application/octet-stream\r\nExpect: 100-continue\r\n\r\n"
        )
        assert b" 100 " in connection.recv(1000)  # asked for the body: so it is inside
        refused = server.client.post("/predict", content=PIXELS.tobytes(), headers=RAW)
        assert_problem(refused, 429, "1 requests are open")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.get("/healthz/live").status_code == 200
        assert server.metric('anytime_requests_total{outcome="rejected"}') == 1
        assert server.metric('anytime_rejections_total{reason="load"}') == 1
    server.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    answered = server.client.post("/predict?budget_ms=5000", content=PIXELS.tobytes(), headers=RAW)
    assert answered.status_code == 200


# ---- everything else ----


def test_every_request_is_counted_once(launch: Launcher) -> None:
    server = launch()
    url = "/predict?budget_ms=5000"
    server.client.post(url, content=PIXELS.tobytes(), headers=RAW)
    server.client.post("/predict?budget_ms=0", content=b"")
    server.client.post(url, content=b"x", headers=RAW)
    server.client.get("/predict")
    server.client.get("/model")
    counted = {
        outcome: server.metric(f'anytime_requests_total{{outcome="{outcome}"}}') for outcome in OUTCOMES
    }
    assert counted == dict.fromkeys(OUTCOMES, 0) | {"answered": 1, "invalid": 3}
    assert server.metric('anytime_expected_correct_answers_total{outcome="answered"}') == 0.93
    assert server.metric('anytime_stage_seconds_count{stage="way_out"}') == 1
    assert server.metric('anytime_stage_seconds_sum{stage="inference"}') > 0
    assert server.metric('anytime_answers_total{column="3",stopped_by="deepest"}') == 1
    assert server.metric("anytime_latency_seconds_count") == 1
    assert server.metric("anytime_latency_over_budget_ratio_count") == 1
    assert server.metric('anytime_inference_seconds_count{batch="1",column="2"}') == 1
    assert server.metric('anytime_latency_over_budget_ratio_bucket{le="1.0"}') == 1


def test_a_refused_request_leaves_nothing_of_its_body_to_the_garbage_collector(server: Running) -> None:
    """Through plain sockets: a client's own circles would be found as well."""
    n_bytes = 100_000
    with nothing_left_of(Problem, n_bytes=n_bytes):
        for path, content_type, begins, status in (
            ("/predict?budget_ms=5000", "image/png", b"no picture", 415),
            ("/predict?budget_ms=5000", "image/png", png()[:100], 400),
            ("/predict?budget_ms=5000", "application/octet-stream", b"", 400),
            ("/predict?budget_ms=5000", "application/json", b"{", 400),
            ("/predict?budget_ms=5000", "multipart/form-data; boundary=x", b"", 400),
            ("/v2/models/toy/infer", "application/json", b'{"inputs": 1}', 400),
        ):
            head = (
                f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                f"content-type: {content_type}\r\ncontent-length: {n_bytes}\r\n\r\n"
            )
            with server.connect() as connection:
                connection.sendall(head.encode() + begins.ljust(n_bytes))
                response = b"".join(iter(lambda: connection.recv(65536), b""))
            assert int(response.split()[1]) == status, response


def test_the_model_describes_itself(server: Running) -> None:
    model = server.client.get("/model").json()
    assert (model["name"], model["labels"]) == ("toy", list(toy_artifact.LABELS))
    assert model["input"]["height"] == toy_artifact.HEIGHT
    assert [rung["accuracy"] for rung in model["rungs"]] == [0.80, 0.85, 0.90]
    assert model["latency_ms"]["3"].keys() == {str(size) for size in BATCH_SIZES}
    assert model["budget_ms"]["default"] == 50
    assert model["provider"] == "cpu"


def test_health_and_documentation(server: Running) -> None:
    assert server.client.get("/healthz/live").json() == {"status": "live"}
    assert server.client.get("/healthz/ready").json() == {"status": "ready"}
    assert "openapi.json" in server.client.get("/docs").text
    operation = server.client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {
        *("budget_ms", "top_k", "min_confidence", "stream", "X-Budget-Ms", "X-Request-Id")
    }
    assert {"image/png", "application/json"} <= operation["requestBody"]["content"].keys()
    assert operation["responses"].keys() == {
        *("200", "400", "401", "403", "408", "413", "414", "415", "422", "429", "431", "500", "503", "504")
    }
    assert json.dumps(operation).count("application/problem+json") == 13
    assert len(operation["security"]) == 2


def test_what_the_way_takes_is_taken_off_the_budget(launch: Launcher) -> None:
    server = launch(network_ms=300.0)
    answer = server.client.post("/predict?budget_ms=5000", content=PIXELS.tobytes(), headers=RAW).json()
    assert answer["elapsed_ms"] > 300
    refused = server.client.post("/predict?budget_ms=290", content=PIXELS.tobytes(), headers=RAW)
    assert refused.status_code == 429
