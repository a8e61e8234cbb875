"""What hops cost: ways take turns, figures are added up rightly, and a real server can be measured."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtests import hops
from loadtests.hops import Row


class Fake(ThreadingHTTPServer):
    """Answers every budget but the one of 5 ms."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.paths: list[str] = []


class _Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        self.send_response(429 if self.path.endswith("budget_ms=5") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def fakes() -> Iterator[dict[str, Fake]]:
    fakes = {"direct": Fake(), "through": Fake()}
    threads = [threading.Thread(target=fake.serve_forever, args=(0.05,)) for fake in fakes.values()]
    for thread in threads:
        thread.start()
    yield fakes
    for fake, thread in zip(fakes.values(), threads, strict=True):
        fake.shutdown()
        fake.server_close()
        thread.join()


def test_every_way_is_sent_the_same_and_is_judged_by_the_client(fakes: dict[str, Fake]) -> None:
    ways = {way: f"http://127.0.0.1:{fake.server_address[1]}" for way, fake in fakes.items()}

    rows = hops.measure(ways, [b"pixels"], ["5", "9000"], n=4, n_rounds=2)

    assert [(row.way, row.round) for row in rows] == [
        *(("direct", 0), ("through", 0), ("direct", 1), ("through", 1))
    ]
    assert fakes["direct"].paths == fakes["through"].paths
    assert len(fakes["direct"].paths) == hops.N_WARM_UP + 2 * 3 * 4
    for row in rows:
        assert row.in_time == {"5": 0.0, "9000": 1.0}
        assert row.refused == {"5": 1.0, "9000": 0.0}
        assert 0 < row.p50_ms <= row.p99_ms
    assert {row.added_ms for row in rows if row.way == "direct"} == {0.0}


def test_a_way_that_does_not_answer_is_no_result(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {way: f"http://127.0.0.1:{fake.server_address[1]}" for way, fake in fakes.items()}
    monkeypatch.setattr(hops, "COLUMN_1", "budget_ms=5")

    with pytest.raises(RuntimeError, match="not answered"):
        hops.measure(ways, [b"pixels"], [], n=1, n_rounds=1)


def test_the_table_has_each_way_once_and_what_it_adds() -> None:
    rows = [Row("direct", round_, 1.0, 2.0, 0.0, {"5": 0.9}, {"5": 0.1}) for round_ in range(3)] + [
        Row("nginx", round_, 1.5, 3.0, added, {"5": 0.8}, {"5": 0.2})
        for round_, added in enumerate((0.4, 0.5, 0.6))
    ]

    lines = hops.table(rows).splitlines()

    assert lines[2:] == [
        "| direct | 1.00 | 2.00 |  | 90.0 |",
        "| nginx | 1.50 | 3.00 | 0.50 ± 0.25 | 80.0 |",
    ]


@pytest.mark.parametrize("kind", hops.BALANCERS)
def test_a_balancer_is_run_as_it_is_configured_but_for_its_ports(kind: str) -> None:
    ports = {8080: 18080, 8081: 18081, 8000: 18000, 8010: 18010, 8001: 18001, 8011: 18011}

    written = hops.configured(kind, ports)

    original = hops.BALANCERS[kind].read_text(encoding="utf-8")
    for port, other in ports.items():
        assert written.count(f":{other}") == original.count(f":{port}") > 0
        assert f"127.0.0.1:{port}" not in written


@pytest.mark.slow
def test_a_real_server_is_measured_and_the_result_written(tmp_path: Path) -> None:
    assert hops.main(["--n", "2", "--rounds", "2", "--budgets", "50", "--out", str(tmp_path / "hops")]) == 0

    written = json.loads((tmp_path / "hops.json").read_text())
    ways = {row["way"] for row in written["rows"]}
    assert "direct" in ways
    assert all(f"| {way} |" in (tmp_path / "hops.md").read_text() for way in ways)
