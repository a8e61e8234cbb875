"""The Open Inference Protocol over HTTP: Triton's own client is served; every mistake has its sentence."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.access import new_key
from service.inference import Inference
from service.scheduling import Admission
from service.turns import Turn, Turns
from service.waiting import TrafficMonitor
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES, BlockedSession, Launcher, Running

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.random.default_rng(1).integers(0, 256, (toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8)
INFER = "/v2/models/toy/infer"
ADMIN_KEY, ADMIN_HASH = new_key()
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def asking(**changes: Any) -> dict[str, Any]:
    image = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, *PIXELS.shape],
        "data": PIXELS.ravel().tolist(),
    }
    return {"inputs": [image | changes], "parameters": {"budget_ms": 5000}}


def expected(server: Running, more: str = "") -> dict[str, Any]:
    """What /predict answers."""
    url = f"/predict?budget_ms=5000&top_k={len(toy_artifact.LABELS)}{more}"
    headers = {"content-type": "application/octet-stream"}
    answer: dict[str, Any] = server.client.post(url, content=PIXELS.tobytes(), headers=headers).json()
    return answer


def by_index(answer: dict[str, Any]) -> list[float]:
    return [one["probability"] for one in sorted(answer["top"], key=lambda one: one["index"])]


@pytest.fixture
def server(launch: Launcher, tmp_path: Path) -> Running:
    toy_artifact.write(tmp_path / "toy" / "8", "8")
    return launch(
        model_repository=tmp_path, admin_keys=(ADMIN_HASH,), profile_seconds=0.01, batch_sizes=BATCH_SIZES
    )


def test_triton_s_client_is_served(server: Running) -> None:
    answer = expected(server)
    probabilities, shallow = by_index(answer), by_index(expected(server, "&min_confidence=0"))
    address = f"{server.address[0]}:{server.address[1]}"
    command = [sys.executable, str(ROOT / "tests/clients/oip_http.py"), address, ADMIN_KEY]
    done = subprocess.run(command, input=png(), capture_output=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, True, False])
    assert found["server"]["name"] == "anytime-inference"
    assert {"binary_tensor_data", "model_repository"} <= set(found["server"]["extensions"])
    assert (found["model"]["name"], found["model"]["versions"], found["version"]) == ("toy", ["7"], "toy")
    assert found["model"]["inputs"][0] == {"name": "image", "datatype": "UINT8", "shape": [-1, *PIXELS.shape]}
    for answered in found["probabilities"]:
        assert answered == [pytest.approx(probabilities, abs=1e-5)]
    assert found["three"] == [pytest.approx(shallow, abs=1e-5)] * 3
    assert found["chosen"] == ["mine", [answer["label"]], ["3"]]
    assert [text.split(":")[2] for text in found["classes"][0]] == [one["label"] for one in answer["top"][:2]]
    told = found["parameters"]
    assert (told["column"], told["columns_run"], told["stopped_by"]) == ("1", "1", "confidence")
    assert (told["budget_ms"], told["deadline_met"]) == (5000, True)
    assert 0 < told["inference_ms"] < told["elapsed_ms"]
    assert [int(status) for status, _ in found["refusals"]] == [422, 400, 400, 404, 401, 404]
    assert "budget_ms must be a number" in found["refusals"][0][1]
    listed = {(one["name"], one["version"]): one["state"] for one in found["index"]}
    assert listed == {("toy", "7"): "READY", ("toy", "8"): "UNAVAILABLE"}
    assert (found["swapped"], found["unloaded"]) == ("8", False)


def assert_error(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    assert says in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", INFER, 405, "POST"),
        ("POST", "/v2/models/toy", 405, "takes GET"),
        ("GET", "/v2/nothing", 404, "/docs"),
        ("GET", "/v2/models/toy/versions/6", 404, "version '6' is not loaded"),
        ("POST", "/v2/models/toy/versions/6/infer", 404, "version '6' is not loaded"),
        ("GET", "/v2/models/toy/versions/6/ready", 404, "is not loaded"),
        ("POST", "/v2/repository/index", 401, "key"),
    ],
)
def test_a_mistake_is_an_error_of_this_protocol(
    server: Running, method: str, path: str, status: int, says: str
) -> None:
    assert_error(server.client.request(method, path), status, says)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("index", {"ready": 1}, 422, "type bool"),
        ("index", [], 400, "object"),
        ("index", {"redy": True}, 422, "'redy'"),
        ("models/toy/load", {"parameters": {"config": "{}"}}, 422, "'config'"),
        ("models/toy/load", {"parameters": {"version": "9"}}, 404, "toy/9"),
        ("models/../load", {}, 404, ""),
        ("models/dog/unload", {}, 404, "not loaded"),
    ],
)
def test_changes_of_the_models_are_checked(
    server: Running, path: str, body: object, status: int, says: str
) -> None:
    assert_error(server.client.post(f"/v2/repository/{path}", json=body, headers=ADMIN), status, says)
    assert server.client.get("/v2/models/toy/ready").json() == {"name": "toy", "ready": True}


def test_an_operator_s_versions_live_side_by_side(server: Running) -> None:
    wanted = {"parameters": {"version": "8", "keep_others": True}}
    loaded = server.client.post("/v2/repository/models/toy/load", json=wanted, headers=ADMIN)
    assert (loaded.status_code, loaded.json()) == (200, {})
    for place, version in (("", "8"), ("/versions/7", "7"), ("/versions/8", "8")):
        answered = server.client.post(f"/v2/models/toy{place}/infer", json=asking()).json()
        assert answered["model_version"] == version
    ready = server.client.post("/v2/repository/index", json={"ready": True}, headers=ADMIN).json()
    assert [one["version"] for one in ready] == ["7", "8"]
    unload = {"parameters": {"version": "8", "unload_dependents": False}}
    assert (
        server.client.post("/v2/repository/models/toy/unload", json=unload, headers=ADMIN).status_code == 200
    )
    assert server.client.get("/v2/models/toy").json()["versions"] == ["7"]


def test_a_body_whose_json_is_longer_than_it_is_malformed(server: Running) -> None:
    headers = {"inference-header-content-length": "100"}
    assert_error(server.client.post(INFER, content=b"{}", headers=headers), 400, "2 bytes")


def test_an_answer_is_counted_once_and_so_is_a_refusal(launch: Launcher) -> None:
    server = launch()
    assert server.client.post(INFER, json=asking()).status_code == 200
    assert server.client.post(INFER, json=asking(name="dog")).status_code == 400
    assert server.metric('anytime_requests_total{outcome="answered"}') == 1
    assert server.metric('anytime_requests_total{outcome="invalid"}') == 1
    assert server.metric('anytime_answers_total{column="3",stopped_by="deepest"}') == 1
    assert server.metric('anytime_expected_correct_answers_total{outcome="answered"}') == 0.93


def test_one_who_hangs_up_is_refined_no_further(blocked: Running, session: BlockedSession) -> None:
    body = json.dumps(asking()).encode()
    with blocked.connect() as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (INFER.encode(), len(body), body)
        )
        assert session.started.wait(30)
    blocked.wait_for('anytime_requests_total{outcome="disconnected"}', 1)
    session.released.set()
    assert blocked.client.post(INFER, json=asking()).status_code == 200
    assert len(session.n_images) == 1 + 3


def test_if_one_picture_is_none_no_other_of_its_request_runs(
    blocked: Running, session: BlockedSession
) -> None:
    good = png()
    files = {"name": "image_bytes", "datatype": "BYTES", "shape": [3]}
    elements = b"".join(len(one).to_bytes(4, "little") + one for one in (good, good[:-30], good))
    header = json.dumps(
        {
            "inputs": [files | {"parameters": {"binary_data_size": len(elements)}}],
            "parameters": {"budget_ms": 5000},
        }
    ).encode()
    refused = blocked.client.post(
        INFER, content=header + elements, headers={"inference-header-content-length": str(len(header))}
    )
    assert_error(refused, 400, "send the file whole")
    session.released.set()
    assert blocked.client.post(INFER, json=asking()).status_code == 200
    assert session.n_images == [1, 1, 1]


def test_if_there_is_no_room_for_all_pictures_of_a_request_none_stays(
    launch: Launcher, session: BlockedSession, inference: Inference
) -> None:
    sessions = dict.fromkeys(toy_artifact.COLUMNS, session)
    waiting = Inference(inference.manifest, sessions, provider="cpu", sha256="0" * 64)
    server = launch(inference=waiting, max_waiting=2)
    pictures = {"shape": [3, *PIXELS.shape], "data": PIXELS.ravel().tolist() * 3}
    assert_error(server.client.post(INFER, json=asking(**pictures)), 429, "2 requests wait")
    assert server.metric("anytime_queue_length") == 0
    session.released.set()
    assert server.client.post(INFER, json=asking()).status_code == 200


def test_a_change_of_a_myriad_of_values_is_refused(server: Running) -> None:
    body = b'{"ready":[' + b"[]," * 200_000 + b"[]]}"
    refused = server.client.post("/v2/repository/index", content=body, headers=ADMIN)

    assert refused.status_code == 413
    assert "more than 262144 values" in refused.json()["error"]


def test_it_is_documented(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v2", "/v2/health/ready", "/v2/models/{name}/infer", "/v2/repository/index"} <= paths.keys()


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("url", ["/predict", INFER])
def test_who_found_the_loop_at_work_is_counted_as_such(
    server: Running, monkeypatch: pytest.MonkeyPatch, url: str, status: int
) -> None:
    """Whoever answers, and whether there is an answer or none in time."""
    turn, counted = Turn(0.004), list[bool]()
    turn.n_read = 1
    monkeypatch.setattr(Turns, "take_place", lambda _: (turn, 0))
    monkeypatch.setattr(TrafficMonitor, "arrived", lambda *_, has_waited=False: counted.append(has_waited))
    if status == 429:
        refused = Admission(is_accepted=False, needs_s=1.0)
        monkeypatch.setattr(server.repository.model().engine._policy, "admit", lambda *_: refused)
    if url == INFER:
        response = server.client.post(url, json=asking())
    else:
        headers = {"content-type": "application/octet-stream"}
        response = server.client.post(f"{url}?budget_ms=5000", content=PIXELS.tobytes(), headers=headers)
    assert response.status_code == status
    assert counted == [True]
