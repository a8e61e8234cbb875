"""Bodies through a real socket: what comes compressed, and how much memory they may take together."""

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator

import pytest

from service.exchange import arrival
from service.protocol import READ
from service.turns import LEAST_WAIT_S, Turn
from tests.service import toy_artifact
from tests.service.conftest import Launcher, Running

PIXELS = bytes(range(toy_artifact.HEIGHT * toy_artifact.WIDTH * 3))
RAW = {"content-type": "application/octet-stream"}
URL = "/predict?budget_ms=5000"


@pytest.mark.parametrize(
    ("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)]
)
def test_a_compressed_body_leads_to_the_same_answer(
    server: Running, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    plain = server.client.post(URL, content=PIXELS, headers=RAW).json()
    headers = RAW | {"content-encoding": encoding}
    answer = server.client.post(URL, content=encode(PIXELS), headers=headers).json()
    assert answer["top"] == plain["top"]


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(bytes(1001)), 413),
        ("gzip", gzip.compress(PIXELS)[:-1], 400),
        ("gzip", PIXELS, 400),
        ("br", PIXELS, 415),
        ("gzip, gzip", PIXELS, 415),
    ],
)
def test_what_cannot_be_undone_within_bounds_is_refused(
    launch: Launcher, encoding: str, body: bytes, status: int
) -> None:
    server = launch(max_body_bytes=1000)
    refused = server.client.post(URL, content=body, headers=RAW | {"content-encoding": encoding})
    assert refused.status_code == status
    assert refused.headers["content-type"] == "application/problem+json"
    assert ("accept-encoding" in refused.headers) == (status == 415)


def test_a_body_that_is_declared_too_large_is_refused_before_any_of_it_comes(launch: Launcher) -> None:
    with launch(max_body_bytes=1000).connect() as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_a_body_that_says_what_its_budget_is_is_not_waited_for_either(launch: Launcher) -> None:
    with launch(body_timeout_s=0.05).connect() as connection:
        connection.settimeout(20)
        connection.sendall(
            b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_bodies_share_their_memory_and_give_it_back(launch: Launcher) -> None:
    server = launch(max_bodies_bytes=2 * len(PIXELS) - 1)
    half_sent, is_refused = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield PIXELS
        half_sent.set()
        assert is_refused.wait(30)

    statuses: list[int] = []

    def first() -> None:
        response = server.client.post("/predict?budget_ms=9000", content=slowly(), headers=RAW)
        statuses.append(response.status_code)

    caller = threading.Thread(target=first)
    caller.start()
    assert half_sent.wait(30)
    while True:  # until the server has read what was sent
        refused = server.client.post(URL, content=PIXELS, headers=RAW)
        if refused.status_code == 429:
            break
    assert "memory" in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1
    is_refused.set()
    caller.join()
    assert statuses == [200]
    assert server.client.post(URL, content=PIXELS, headers=RAW).status_code == 200


def test_a_request_came_before_it_was_read_if_it_has_lain_in_its_socket() -> None:
    turn, sleep, brief = Turn(0.004), Turn(0.0), Turn(1.9 * LEAST_WAIT_S)
    turn.n_read = sleep.n_read = 2
    brief.n_read = 1
    for place, came_s in enumerate((9.997, 9.999)):
        arrived_s, has_waited = arrival({READ: (10.0, turn, place)}, 11.0)
        assert arrived_s == pytest.approx(came_s)
        assert has_waited
    assert arrival({READ: (10.0, sleep, 1)}, 11.0) == (10.0, False)
    assert not arrival({READ: (10.0, brief, 0)}, 11.0)[1]


def test_where_it_is_not_told_when_a_request_was_read_it_comes_when_it_is_served() -> None:
    assert arrival({}, 11.0) == (11.0, False)
