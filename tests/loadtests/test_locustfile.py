"""The whole way: locust offers a scenario to a real server, each request is kept, and the report shows it."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtests import report
from loadtests.hosting import Server
from loadtests.plane import serving
from loadtests.records import Record
from loadtests.scenarios import Scenario
from loadtests.targets import Target
from tests.service import toy_artifact

ROOT = Path(__file__).parents[2]
CAPACITY_HZ = 100.0
SCENARIO = """
claim = "Short."
arrivals = "poisson"
load = 0.5
seconds = 2
seed = 3

[[budgets]]
ms = 0.1
weight = 1.0

[[budgets]]
ms = 5000.0
weight = 1.0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    artifact = toy_artifact.write(folder / "toy")
    with serving("anytime", artifact, folder / "log", {"ANYTIME_PROFILE_SECONDS": "0.1"}) as running:
        yield running


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "short.toml"
    path.write_text(SCENARIO)
    return path


def locust(url: str, scenario: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--host", url]
    command += ["--scenario", str(scenario), "--capacity", str(CAPACITY_HZ), "--only-summary", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def kept(server: Server, scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "run.npz"
    running = locust(server.url, scenario, "--record", str(path), "--exit-code-on-error", "0")
    said, _ = running.communicate(timeout=50)
    assert running.returncode == 0, said
    return path


def test_every_request_of_the_scenario_is_offered_once_and_kept(kept: Path, scenario: Path) -> None:
    schedule = Scenario.read(str(scenario)).schedule(CAPACITY_HZ, 1)
    record, about = Record.load(kept)

    assert len(record) == len(schedule)
    assert np.sort(record.due_s) == pytest.approx(schedule.at_s, abs=1e-6)
    assert (record.outcome[record.budget_s > 1] == "answered").all()
    assert "rejected" in record.outcome[record.budget_s < 1]
    assert np.nanmin(record.latency_s) > 0
    assert about["scenario"] == "short"
    assert about["is_labelled"] is False


def test_the_report_shows_what_was_kept(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(kept), str(kept), "--out", str(tmp_path / "shown")]) == 0
    page = (tmp_path / "shown.html").read_text()
    [first, _] = json.loads((tmp_path / "shown.json").read_text())

    record, _ = Record.load(kept)
    in_time = (record.outcome == "answered") & (record.latency_s <= record.budget_s)
    assert first["summary"]["attainment"] == pytest.approx(in_time.mean())
    assert first["figures"]["attainment, %"]["value"] == pytest.approx(100 * in_time.mean())
    assert page.count("<svg") == 5
    assert "nothing is known of the accuracy" in page
    assert "accuracy of those in time" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://127.0.0.1", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "in time" in capsys.readouterr().out


@pytest.mark.slow
def test_two_workers_share_a_scenario(server: Server, scenario: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    path = tmp_path / "shared.npz"
    options = ["--exit-code-on-error", "0", "--record", str(path)]
    master = locust(
        server.url, scenario, "--master", "--expect-workers", "2", "--master-bind-port", port, *options
    )
    workers = [locust(server.url, scenario, "--worker", "--master-port", port) for _ in range(2)]
    said, _ = master.communicate(timeout=50)
    for worker in workers:
        worker.communicate(timeout=10)
    record, about = Record.load(path)

    assert master.returncode == 0, said
    assert about["generators"] == 2
    schedule = Scenario.read(str(scenario)).schedule(CAPACITY_HZ, 1)
    assert np.sort(record.due_s) == pytest.approx(schedule.at_s, abs=1e-6)


def test_pictures_are_of_the_size_that_the_server_takes(server: Server, tmp_path: Path) -> None:
    target = Target(server.url)
    pictures = target.pictures(tmp_path)

    assert {len(body) for body in pictures.bodies} == {toy_artifact.HEIGHT * toy_artifact.WIDTH * 3}
    assert not pictures.is_labelled


def test_no_record_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    assert report.main([str(tmp_path / "absent.npz")]) == 2
    assert report.main([str(tmp_path / "other.npz")]) == 2
    assert "is no record of a load test" in capsys.readouterr().err
