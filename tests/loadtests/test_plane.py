"""The comparison on real servers, with the toy artifact: one short run of everything."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtests import hosting, plane
from loadtests.arrivals import Arrivals
from loadtests.openloop import Prediction, Reply
from tests.service import toy_artifact


def answer(elapsed_ms: float, decode: float, queue: float, inference: float) -> bytes:
    timing_ms = {"decode": decode, "queue": queue, "inference": inference}
    return json.dumps(
        {"columns_run": ["1"], "index": 2, "deadline_met": True, "stopped_by": "budget"}
        | {"elapsed_ms": elapsed_ms, "timing_ms": timing_ms}
    ).encode()


def reply(status: int, body: bytes = b"", *, done_s: float = 0.003) -> Reply:
    return Reply(image=0, due_s=0.0, sent_s=0.001, done_s=done_s, status=status, body=body)


def test_what_the_server_added_is_what_is_not_inference() -> None:
    added = plane.added_ms([reply(200, answer(1.5, 0.2, 0.3, 0.6)), reply(429)])
    assert {name: part["p50"] for name, part in added.items()} == pytest.approx(
        {"added": 0.9, "decode": 0.2, "queue": 0.3, "other": 0.4, "outside": 0.5}
    )
    assert plane.added_ms([reply(504)]) == {}


def test_replies_are_judged_by_label_and_by_the_clients_clock() -> None:
    arrivals = Arrivals(np.zeros(4), np.full(4, 0.005), np.zeros(4, np.int64))
    replies = [reply(200, answer(1, 0, 0, 1)), reply(429), reply(504), reply(0, done_s=float("nan"))]
    record = plane.record(replies, arrivals, np.array([2]))
    assert record.outcome.tolist() == ["answered", "rejected", "expired", "lost"]
    assert record.is_correct.tolist() == [True, False, False, False]
    assert record.latency_s[0] == pytest.approx(0.003)


@pytest.mark.slow
def test_every_policy_serves_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = toy_artifact.write(tmp_path / "toy")
    data = tmp_path / "cifar-10-batches-py"
    data.mkdir()
    side = toy_artifact.HEIGHT
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3 * side * side), dtype=np.uint8)
    (data / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [0] * 20}))
    out = tmp_path / "results" / "plane"
    arguments = ["--data", str(tmp_path), "--artifact", str(artifact), "--policies", "anytime,fixed-deep"]
    arguments += ["--loads", "0.5", "--arrivals", "poisson", "--seconds", "0.5", "--repeats", "1"]
    arguments += ["--capacity", "100", "--out", str(out)]
    assert plane.main(arguments) == 0
    runs = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert {run["policy"] for run in runs} == {"anytime", "fixed-deep"}
    assert len({run["n"] for run in runs}) == 1
    assert all(run["outcomes"]["answered"] > 0 for run in runs)
    assert out.with_suffix(".svg").exists()
    assert "fixed-deep" in capsys.readouterr().out


REFUSING = """
import http.server, sys

class Refusing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

http.server.ThreadingHTTPServer.request_queue_size = 64
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Refusing).serve_forever()
"""


def test_a_server_without_an_answer_has_no_capacity(tmp_path: Path) -> None:
    port = hosting.free_port()
    refusing = hosting.hosting(
        [sys.executable, "-c", REFUSING, str(port)],
        port,
        environment={},
        log=tmp_path / "log",
        is_ready=hosting.answers,
        limit_s=30,
    )
    with refusing as server, pytest.raises(RuntimeError, match="gave no answer"):
        plane.capacity_hz(server.url, [b"picture"], n=20)


def test_another_server_is_read_in_its_own_words() -> None:
    arrivals = Arrivals(np.zeros(2), np.full(2, 0.005), np.zeros(2, np.int64))
    record = plane.record(
        [reply(200, b"2"), reply(418)],
        arrivals,
        np.array([2]),
        read=lambda each: Prediction(("3",), int(each.body), False, "", 0.0, {}),
        outcome_by_status={200: "answered", 418: "rejected"},
    )
    assert record.outcome.tolist() == ["answered", "rejected"]
    assert record.columns_run.tolist() == ["3", ""]
    assert record.is_correct.tolist() == [True, False]
