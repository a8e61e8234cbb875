"""Offers a scenario to a running server with locust: open-loop, judged by the caller's deadline.

    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 --scenario spike --record a.npz

One greenlet per request starts when the request is due, whatever has become of those before it; latency
counts from then. In locust's tables a request that got no answer in time has failed: its failure ratio is
1 - attainment. `--record` keeps every request for `python -m loadtests.report`. Without `--headless` the same
runs from locust's web page; with `--master` and `--worker` each worker offers its share. A process offers
some 1,500 requests/s; when it falls behind, its lag says so and the report calls the run invalid. Must not
know a server but over HTTP.
"""

import json
import math
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
import numpy as np
from gevent.pool import Pool
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtests.arrivals import Arrivals
from loadtests.offline import processor_name
from loadtests.records import OUTCOME_BY_STATUS, Record
from loadtests.scenarios import Scenario
from loadtests.targets import Pictures, Target

MAX_IN_FLIGHT = 512
"""Requests without a response, per process. Larger: more file handles; at the bound the generator lags."""

TIMEOUT_S = 5.0
"""A connection that says nothing for so long is lost [s]. Larger: a dead server is noticed later."""

LEAD_S = 1.0
"""From the start of the user to the first request: the schedule is made meanwhile [s]."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request; the fields are those of `Record`."""

    due_s: float
    budget_s: float
    latency_s: float
    outcome: str
    columns_run: str
    is_correct: bool
    claims_met: bool
    lag_s: float


@events.init_command_line_parser.add_listener
def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--scenario", default="steady", help="name in loadtests/scenarios, or a .toml file")
    parser.add_argument(
        "--capacity", type=float, default=0.0, help="requests/s of load 1; 0: measured before the test"
    )
    parser.add_argument(
        "--data", default="data", help="folder with CIFAR-10's test images; without them pictures are made up"
    )
    parser.add_argument("--record", default="", help="write every request to this .npz")
    parser.add_argument("--api-key", default="", help="for a server that wants one", is_secret=True)
    parser.add_argument("--n-generators", type=int, default=1, help="processes; set by the master itself")


class Gathering:
    """What the processes of one test have seen; the workers' rows come with their reports to the master."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.begun: datetime = datetime.now(UTC)

    def take(self) -> list[tuple[Any, ...]]:
        """What has not been reported yet."""
        rows, self.rows = self.rows, []
        return rows

    def record(self) -> Record:
        """All of it."""
        columns = zip(*self.rows, strict=True)
        return Record(**{field.name: np.array(c) for field, c in zip(fields(Row), columns, strict=True)})


GATHERING = Gathering()


@events.test_start.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    """Where the test is led: find out what load 1 is; the workers are told with their first users."""
    GATHERING.rows.clear()
    GATHERING.begun = datetime.now(UTC)
    if isinstance(environment.runner, WorkerRunner):
        return
    chosen = _options(environment)
    if isinstance(environment.runner, MasterRunner):
        chosen.n_generators = environment.runner.worker_count
    if not chosen.capacity:
        command = [sys.executable, "-m", "loadtests.capacity", str(environment.host)]
        measured = subprocess.run(  # noqa: S603 - of our own making
            command, check=True, capture_output=True, text=True, timeout=120
        )
        chosen.capacity = float(measured.stdout)


@events.report_to_master.add_listener
def _report(client_id: str, data: dict[str, Any]) -> None:
    data["rows"] = GATHERING.take()


@events.worker_report.add_listener
def _gather(client_id: str, data: Mapping[str, Any]) -> None:
    GATHERING.rows += map(tuple, data["rows"])


@events.test_stop.add_listener
def _keep(environment: Environment, **_: Any) -> None:
    chosen = _options(environment)
    if isinstance(environment.runner, WorkerRunner) or not chosen.record or not GATHERING.rows:
        return
    scenario = Scenario.read(chosen.scenario)
    target = Target(str(environment.host), chosen.api_key)
    GATHERING.record().save(
        Path(chosen.record),
        {
            "scenario": scenario.name,
            "claim": scenario.claim,
            "capacity_hz": chosen.capacity,
            "generators": chosen.n_generators,
            "date": GATHERING.begun.isoformat(timespec="seconds"),
            "model": target.model["name"],
            "processor": f"{os.cpu_count()} cores of {processor_name()}, the generator's machine",
            "is_labelled": target.pictures(Path(chosen.data)).is_labelled,
            "command": "locust " + " ".join(sys.argv[1:]),
        },
    )


class Shape(LoadTestShape):
    """One user per process, until the last request must have ended."""

    def tick(self) -> tuple[int, float] | None:
        """Locust asks once a second: how many users now, or None for the end."""
        assert self.runner is not None, "the shape runs within it"
        chosen = _options(self.runner.environment)
        run_time_s: float = self.get_run_time()  # type: ignore[no-untyped-call] # locust's
        if run_time_s > Scenario.read(chosen.scenario).duration_s + LEAD_S + TIMEOUT_S:
            return None
        return chosen.n_generators, float(chosen.n_generators)


class Caller(User):
    """Offers this process's share of the scenario."""

    @task
    def offer(self) -> None:
        """Send each request when it is due, and stay until all have ended."""
        chosen = _options(self.environment)
        target = Target(str(self.host), chosen.api_key)
        runner = self.environment.runner
        offering = Offering(self.environment, target, target.pictures(Path(chosen.data)))
        schedule = Scenario.read(chosen.scenario).schedule(chosen.capacity, len(offering.pictures))
        first = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        offering.send(schedule, range(first, len(schedule), chosen.n_generators))
        raise StopUser


class Offering:
    """Calls a server and judges what comes back.

    Args:
        environment: Told of each request.
        target: The server.
        pictures: What is sent.
    """

    def __init__(self, environment: Environment, target: Target, pictures: Pictures) -> None:
        self.pictures = pictures
        self._environment = environment
        self._headers = target.headers
        self._client = HTTPClient.from_url(
            target.url, concurrency=MAX_IN_FLIGHT, connection_timeout=TIMEOUT_S, network_timeout=TIMEOUT_S
        )

    def send(self, schedule: Arrivals, which: Sequence[int]) -> None:
        """Send these requests of the schedule when each is due; returns when all have ended."""
        in_flight = Pool(MAX_IN_FLIGHT)
        start_s = time.perf_counter() + LEAD_S
        for request in which:
            due_s = start_s + float(schedule.at_s[request])
            gevent.sleep(max(0.0, due_s - time.perf_counter()))
            in_flight.spawn(
                self._call, start_s, due_s, float(schedule.budget_s[request]), int(schedule.image[request])
            )
        in_flight.join()
        self._client.close()

    def _call(self, start_s: float, due_s: float, budget_s: float, image: int) -> None:
        lag_s = time.perf_counter() - due_s
        status, body = 0, b""
        try:
            response = self._client.post(
                f"/predict?budget_ms={budget_s * 1e3:g}", self.pictures.bodies[image], self._headers
            )
            body = bytes(response.read())
            status = response.status_code
        except (OSError, HTTPParseError):  # refused, reset or silent: nobody answered
            pass
        latency_s = time.perf_counter() - due_s
        answer = json.loads(body) if status == 200 else None
        row = Row(
            due_s=due_s - start_s,
            budget_s=budget_s,
            latency_s=latency_s if status else math.nan,
            outcome=OUTCOME_BY_STATUS.get(status, "failed"),
            columns_run="+".join(answer["columns_run"]) if answer else "",
            is_correct=bool(
                answer and self.pictures.labels and answer["index"] == self.pictures.labels[image]
            ),
            claims_met=bool(answer and answer["deadline_met"]),
            lag_s=lag_s,
        )
        GATHERING.rows.append(astuple(row))
        self._tell(row, len(body))

    def _tell(self, row: Row, n_bytes: int) -> None:
        missed = None
        if row.outcome != "answered" or row.latency_s > row.budget_s:
            missed = Missed("late" if row.outcome == "answered" else row.outcome)
        self._environment.events.request.fire(
            request_type="POST",
            name=f"/predict {row.budget_s * 1e3:g} ms, {row.columns_run or row.outcome}",
            response_time=row.latency_s * 1e3 if row.latency_s == row.latency_s else None,
            response_length=n_bytes,
            exception=missed,
            context={},
        )


class Missed(Exception):
    """There was no answer in time."""


def _options(environment: Environment) -> Namespace:
    options: Namespace | None = environment.parsed_options
    assert options is not None, "locust has read them"
    return options
