"""Streams through a real socket: a record for each rung as it completes, whatever the reader does."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from service.engine import InferenceThread
from service.exchange import Exchange
from service.inference import Inference
from service.models import Asked, Model
from service.record import Record
from service.repository import Repository
from service.settings import Settings
from service.streaming import answer
from tests.service import toy_artifact
from tests.service.conftest import BlockedSession, Launcher, Running, profile_of

PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
RAW = {"content-type": "application/octet-stream"}
URL = "/predict?budget_ms=5000"
Event = tuple[str, dict[str, Any]]


def events(response: httpx.Response) -> Iterator[Event]:
    """What an EventSource, or a reader of lines, makes of a stream, as it comes in."""
    if response.headers["content-type"] == "application/x-ndjson":
        for line in response.iter_lines():
            record = json.loads(line)
            yield record.pop("event"), record
        return
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            yield fields["event"], json.loads(fields["data"])
            fields = {}
    assert not fields, "an event without its end is dropped by an EventSource"


def raw_response(server: Running, version: str, path: str) -> tuple[bytes, bytes]:
    """Head and body of what a server sends until it closes, whatever stands in the head."""
    body = PIXELS.tobytes()
    head = (
        f"POST {path} HTTP/{version}\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: {RAW['content-type']}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with server.connect() as connection:
        connection.sendall(head.encode() + body)
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    before, _, after = response.partition(b"\r\n\r\n")
    return before.lower(), after


def test_a_caller_of_http_1_0_gets_a_stream_without_chunks(server: Running) -> None:
    failed = 'anytime_requests_total{outcome="failed"}'
    before = server.metric(failed)
    head, body = raw_response(server, "1.0", f"{URL}&stream=ndjson")
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    assert [json.loads(line)["event"] for line in body.splitlines()] == ["prediction"] * 3 + ["done"]
    assert server.metric(failed) == before

    head, body = raw_response(server, "1.1", f"{URL}&stream=ndjson")
    assert b"\r\ntransfer-encoding: chunked" in head
    assert body.endswith(b"\r\n0\r\n\r\n")

    head, body = raw_response(server, "1.0", URL)
    assert b"\r\ncontent-length: %d" % len(body) in head
    assert json.loads(body)["deadline_met"]


@pytest.mark.parametrize(
    ("query", "accept", "content_type"),
    [
        ("&stream=sse", "*/*", "text/event-stream"),
        ("&stream=ndjson", "*/*", "application/x-ndjson"),
        ("", "text/event-stream", "text/event-stream"),
        ("", "application/x-ndjson, application/json;q=0.5", "application/x-ndjson"),
        ("&stream=ndjson", "text/event-stream", "application/x-ndjson"),
    ],
)
def test_a_stream_has_a_record_for_each_rung_and_ends_with_done(
    server: Running, query: str, accept: str, content_type: str
) -> None:
    single = server.client.post(f"{URL}&top_k=3", content=PIXELS.tobytes(), headers=RAW).json()
    headers = RAW | {"accept": accept}
    url = f"{URL}&top_k=3{query}"
    with server.client.stream("POST", url, content=PIXELS.tobytes(), headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == content_type
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert "x-request-id" in response.headers
        *rungs, (last, done) = events(response)
    assert [name for name, _ in rungs] == ["prediction"] * 3
    assert [rung["columns_run"] for _, rung in rungs] == [["1"], ["1", "2"], ["1", "2", "3"]]
    assert [rung["column"] for _, rung in rungs] == ["1", "2", "3"]
    assert all(rung.keys() == single.keys() for _, rung in rungs)
    assert all(rung["stopped_by"] is None for _, rung in rungs)
    assert rungs[-1][1]["top"] == single["top"]
    assert last == "done"
    assert (done["stopped_by"], done["columns_run"]) == ("deepest", ["1", "2", "3"])
    elapsed_ms = [record["elapsed_ms"] for _, record in rungs]
    assert elapsed_ms == sorted(elapsed_ms)
    assert (done["elapsed_ms"], done["deadline_met"]) == (elapsed_ms[-1], True)


def test_without_being_asked_for_there_is_no_stream(server: Running) -> None:
    headers = RAW | {"accept": "application/json, text/html, */*"}
    response = server.client.post(URL, content=PIXELS.tobytes(), headers=headers)
    assert response.headers["content-type"] == "application/json"


def test_the_first_rung_is_read_while_the_second_runs(blocked: Running, session: BlockedSession) -> None:
    session.one.release()
    url = f"{URL}&stream=ndjson"
    with blocked.client.stream("POST", url, content=PIXELS.tobytes(), headers=RAW) as response:
        stream = events(response)
        assert next(stream)[1]["columns_run"] == ["1"]
        assert not session.released.is_set()
        session.one.release()
        assert next(stream)[1]["columns_run"] == ["1", "2"]
        session.released.set()
        assert [name for name, _ in stream] == ["prediction", "done"]


def test_a_problem_before_the_first_rung_is_an_ordinary_problem(
    blocked: Running, session: BlockedSession
) -> None:
    session.fails = True
    session.released.set()
    for refused, status in ((URL, 500), ("/predict?budget_ms=0", 422)):
        response = blocked.client.post(
            f"{refused.replace('?', '?stream=sse&')}", content=PIXELS.tobytes(), headers=RAW
        )
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"


def test_one_who_hangs_up_is_refined_no_further(blocked: Running, session: BlockedSession) -> None:
    with blocked.connect() as connection:
        connection.sendall(
            b"POST %b&stream=sse HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
            b"Content-Type: application/octet-stream\r\n\r\n%b"
            % (URL.encode(), PIXELS.size, PIXELS.tobytes())
        )
        session.one.release()
        received = b""
        while b'"columns_run":["1"]' not in received:
            received += connection.recv(1 << 16)
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    session.released.set()
    answered = blocked.client.post(URL, content=PIXELS.tobytes(), headers=RAW)
    assert answered.status_code == 200
    assert len(session.n_images) == 1 + 1 + 3  # its first, the one that was running, and the other caller's
    assert blocked.metric("anytime_inference_saved_seconds_total") > 0
    assert blocked.metric('anytime_requests_total{outcome="answered"}') == 1


def test_a_stream_is_counted_as_one_answer(launch: Launcher) -> None:
    server = launch()
    server.client.post(f"{URL}&stream=sse", content=PIXELS.tobytes(), headers=RAW)
    assert server.metric('anytime_requests_total{outcome="answered"}') == 1
    assert server.metric('anytime_answers_total{column="3",stopped_by="deepest"}') == 1
    assert server.metric('anytime_expected_correct_answers_total{outcome="answered"}') == 0.93


def test_a_reader_that_takes_nothing_holds_up_nobody(inference: Inference) -> None:
    """The first record is never taken: the engine refines it to the end all the same, and serves the next."""

    async def scenario() -> list[str]:
        settings = Settings(profile_cache=None, brief_run_ms=0.0)
        model = Model(settings, inference, InferenceThread(inference), profile_of(1e-5))
        repository = Repository(settings, model)
        loop = asyncio.get_running_loop()
        stuck: asyncio.Future[None] = loop.create_future()
        gone: asyncio.Future[dict[str, str]] = loop.create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await stuck

        async def receive() -> Any:
            return await gone

        async with repository.serving():
            asked = Asked(5.0)
            exchange = Exchange({"headers": []}, receive, send, {}, Record("1", loop.time()))
            slow = asyncio.create_task(answer(exchange, model, PIXELS, 0.0, asked, "sse", loop.time))
            (other,) = await model.answer(
                [PIXELS], asked, record=Record("2", loop.time()), gone=exchange.called_when_gone
            )
            stuck.set_result(None)
            return [*other.served.columns_run, *(await slow).columns_run]

    assert asyncio.run(scenario()) == ["1", "2", "3"] * 2


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_reads_it(server: Running) -> None:
    url = f"{server.client.base_url}{URL}&stream=sse".replace("//predict", "/predict")
    command = [
        "curl",
        "-sS",
        "-N",
        "--noproxy",
        "*",
        "--max-time",
        "30",
        "-H",
        "content-type: application/octet-stream",
    ]
    printed = subprocess.run(
        [*command, "--data-binary", "@-", url], input=PIXELS.tobytes(), capture_output=True, check=True
    ).stdout.decode()
    assert printed.count("event: prediction\ndata: {") == 3
    assert printed.count("event: done\ndata: {") == 1
    assert printed.endswith("}\n\n")
