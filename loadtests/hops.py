"""Shows what each hop before the server costs: nginx, HAProxy, Ray Serve; against no hop at all.

    python -m loadtests.hops --ray .venv-ray/bin/python --out loadtests/results/hops

One server, asked one request at a time over kept connections, straight and through each hop as deploy/ has
it. A request for column 1 alone shows the time that a hop adds; budgets show what is noticed of it: which
share of the answers is in time by the client's clock. Ways that are compared take turns request by request,
so that whatever else the machine does hits all of them alike. Ray keeps a core busy when nobody asks, so it
has rounds of its own, with a direct way of its own beside it: what is added is against that. What is not
installed is left out. Knows the service only over HTTP.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from loadtests import records
from loadtests.hosting import Server, answers, free_port, hosting
from loadtests.offline import processor_name
from loadtests.targets import Target

DEPLOY = Path(__file__).parents[1] / "deploy"
BALANCERS: Mapping[str, Path] = {
    "nginx": DEPLOY / "balancer" / "nginx.conf",
    "haproxy": DEPLOY / "balancer" / "haproxy.cfg",
}
START_LIMIT_S = 120.0
ASK_LIMIT_S = 30.0
N_WARM_UP = 50
REFUSALS = (429, 504)
RAW = {"Content-Type": "application/octet-stream"}
COLUMN_1 = "budget_ms=1000&min_confidence=0"
"""Any confidence is enough, so that every answer takes the same little work."""


@dataclass(frozen=True)
class Asked:
    """One request's end: status, and the time until its last byte was read [s]."""

    status: int
    took_s: float

    def is_in_time(self, budget_ms: str) -> bool:
        """It was answered within this budget."""
        return self.status == 200 and self.took_s * 1e3 <= float(budget_ms)


@dataclass(frozen=True)
class Row:
    """One way in one round.

    Attributes:
        way: What is between the client and the server.
        round: Which.
        p50_ms: Of requests for column 1, as `p99_ms`.
        p99_ms: See there.
        added_ms: Median of how much longer it took than the one that went straight at about the same time.
        in_time: By budget [ms], the share of all requests answered within it by the client's clock.
        refused: By budget, the share that got 429 or 504.
    """

    way: str
    round: int
    p50_ms: float
    p99_ms: float
    added_ms: float
    in_time: Mapping[str, float]
    refused: Mapping[str, float]


# ---- the ways ----


def configured(kind: str, ports: Mapping[int, int]) -> str:
    """A balancer's file with other ports of 127.0.0.1, and without the folders that only root may write."""
    text = BALANCERS[kind].read_text(encoding="utf-8")
    text = re.sub(r"(127\.0\.0\.1:|port )(\d+)", lambda found: found[1] + str(ports[int(found[2])]), text)
    folders = "".join(
        f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return text.replace("http {\n", f"http {{\n{folders}", 1) if kind == "nginx" else text


@contextlib.contextmanager
def balancing(kind: str, ports: Mapping[int, int], folder: Path) -> Iterator[Server]:
    """Run a balancer.

    Args:
        kind: One of `BALANCERS`, and installed.
        ports: In the place of those of its file.
        folder: For what it writes.

    Raises:
        RuntimeError: it does not start.
    """
    file = folder / kind
    file.write_text(configured(kind, ports), encoding="utf-8")
    program = shutil.which(kind) or kind
    command = {
        "nginx": [program, "-p", str(folder), "-c", str(file), "-g", "daemon off; pid nginx.pid;"],
        "haproxy": [program, "-db", "-f", str(file)],
    }[kind]
    with hosting(
        command,
        ports[8080],
        environment={},
        log=folder / f"{kind}.log",
        is_ready=_is_ready,
        limit_s=START_LIMIT_S,
    ) as server:
        yield server


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Run the server."""
    port = free_port()
    environment = {"ANYTIME_PORT": str(port), "ANYTIME_GRPC_PORT": "", "ANYTIME_KEEP_ALIVE_S": "75"}
    with hosting(
        [sys.executable, "-m", "service", "serve"],
        port,
        environment=environment,
        log=folder / "server.log",
        is_ready=_is_ready,
        limit_s=START_LIMIT_S,
    ) as server:
        yield server


@contextlib.contextmanager
def on_ray(python: Path, folder: Path) -> Iterator[Server]:
    """Run one replica on a Ray cluster of one node.

    Args:
        python: Of an environment that has Ray: `make ray-test` makes one.
        folder: For what is written.
    """
    port = free_port()
    text = (DEPLOY / "ray" / "cpu.yaml").read_text(encoding="utf-8")
    text = text.replace("host: 0.0.0.0", "host: 127.0.0.1").replace("port: 8000", f"port: {port}")
    (folder / "ray.yaml").write_text(text, encoding="utf-8")
    with hosting(
        [str(python.with_name("serve")), "run", str(folder / "ray.yaml")],
        port,
        environment={
            "PYTHONPATH": str(DEPLOY.parent),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1 only, as there
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.budgets:middlewares",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        log=folder / "ray.log",
        is_ready=_is_ready,
        limit_s=START_LIMIT_S,
    ) as server:
        yield server


def _is_ready(url: str) -> bool:
    return answers(f"{url}/healthz/ready")


# ---- what is measured ----


def ask(ways: Mapping[str, str], query: str, bodies: Sequence[bytes], n: int) -> dict[str, list[Asked]]:
    """Send so many requests each way, one at a time, the ways in an order that changes each time.

    Args:
        ways: Address by name.
        query: Of every request.
        bodies: What is sent, the same each way.
        n: Requests each way.
    """
    shuffled = random.Random(0)  # noqa: S311 - an order, not a secret
    asked: dict[str, list[Asked]] = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        connections = {}
        for way, url in ways.items():
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=ASK_LIMIT_S)
            connections[way] = stack.enter_context(contextlib.closing(connection))
        for i in range(n):
            for way in shuffled.sample(list(ways), len(ways)):
                started_s = time.perf_counter()
                connections[way].request("POST", f"/predict?{query}", bodies[i % len(bodies)], RAW)
                response = connections[way].getresponse()
                response.read()
                asked[way].append(Asked(response.status, time.perf_counter() - started_s))
    return asked


def measure(
    ways: Mapping[str, str], bodies: Sequence[bytes], budgets: Sequence[str], n: int, n_rounds: int
) -> list[Row]:
    """Compare ways that are up together.

    Args:
        ways: Address by name, the direct one first.
        bodies: What is sent.
        budgets: To be tried [ms].
        n: Requests of each kind, way and round.
        n_rounds: Of all of these.

    Raises:
        RuntimeError: a way does not answer.
    """
    ask(ways, COLUMN_1, bodies, N_WARM_UP)
    rows = []
    for round_ in range(n_rounds):
        alone = ask(ways, COLUMN_1, bodies, n)
        if any(one.status != 200 for of in alone.values() for one in of):
            raise RuntimeError("requests for column 1 were not answered: is the machine this slow?")
        by_budget = {ms: ask(ways, f"budget_ms={ms}", bodies, n) for ms in budgets}
        rows += [_row(way, round_, alone, by_budget) for way in ways]
        for row in rows[-len(ways) :]:
            print(row, flush=True)
    return rows


def _row(
    way: str,
    round_: int,
    alone: Mapping[str, Sequence[Asked]],
    by_budget: Mapping[str, Mapping[str, Sequence[Asked]]],
) -> Row:
    took_ms = np.array([one.took_s * 1e3 for one in alone[way]])
    direct_ms = np.array([one.took_s * 1e3 for one in next(iter(alone.values()))])
    return Row(
        way,
        round_,
        p50_ms=float(np.quantile(took_ms, 0.5)),
        p99_ms=float(np.quantile(took_ms, 0.99)),
        added_ms=float(np.median(took_ms - direct_ms)),
        in_time={ms: float(np.mean([one.is_in_time(ms) for one in of[way]])) for ms, of in by_budget.items()},
        refused={
            ms: float(np.mean([one.status in REFUSALS for one in of[way]])) for ms, of in by_budget.items()
        },
    )


def table(rows: Sequence[Row]) -> str:
    """All rounds of each way in one line, in Markdown: medians, and what is added with its 95 % interval."""
    budgets = list(rows[0].in_time)
    columns = ["way", "p50, ms", "p99, ms", "added, ms", *(f"in time at {ms} ms, %" for ms in budgets)]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        mean, half = records.interval([row.added_ms for row in own])
        cells = [
            way,
            f"{np.median([row.p50_ms for row in own]):.2f}",
            f"{np.median([row.p99_ms for row in own]):.2f}",
            f"{mean:.2f} ± {half:.2f}" if any(row.added_ms for row in own) else "",
            *(f"{np.mean([row.in_time[ms] for row in own]) * 100:.1f}" for ms in budgets),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ray", type=Path, help="Python of an environment that has Ray; without it no Ray")
    parser.add_argument("--budgets", default="5,10,20,50", help="budgets [ms], with commas")
    parser.add_argument("--n", type=int, default=500, help="requests of each kind, way and round")
    parser.add_argument("--rounds", type=int, default=5, help="of all ways")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    chosen = parser.parse_args(arguments)
    budgets = chosen.budgets.split(",")
    rows: list[Row] = []
    folder = Path(tempfile.mkdtemp(prefix="hops-"))  # logs are to be read if something fails
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(folder))
        port = int(server.url.rpartition(":")[2])
        bodies = Target(server.url).pictures(None).bodies
        ways = {"direct": server.url}
        for kind in filter(shutil.which, BALANCERS):
            ports = {8080: free_port(), 8081: free_port()} | dict.fromkeys((8000, 8010, 8001, 8011), port)
            (folder / f"of-{kind}").mkdir()
            ways[kind] = stack.enter_context(balancing(kind, ports, folder / f"of-{kind}")).url
        rows += measure(ways, bodies, budgets, chosen.n, chosen.rounds)
        if chosen.ray:
            ray = stack.enter_context(on_ray(chosen.ray, folder))
            ways = {"direct beside Ray": server.url, "Ray Serve": ray.url}
            rows += measure(ways, bodies, budgets, chosen.n, chosen.rounds)
    shutil.rmtree(folder)
    print(table(rows))
    if chosen.out:
        head = {
            "command": "python -m loadtests.hops " + " ".join(arguments or sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        whole = head | {"rows": [asdict(row) for row in rows]}
        chosen.out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        says = (
            f"`{head['command']}`, {os.cpu_count()} cores of {processor_name()}, {datetime.now(UTC):%Y-%m-%d}"
        )
        chosen.out.with_suffix(".md").write_text(f"{says}\n\n{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
