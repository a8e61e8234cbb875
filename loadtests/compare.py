"""Shows where this server stands against what one would use instead: the same columns behind other servers.

    python -m loadtests.compare --data data --out loadtests/results/compare --page docs/benchmarks.md

Makes an environment for each peer (loadtests/peers), starts all servers on this machine, checks their
answers against the artifact, and gives each the very same requests in turn, while the others are frozen: an
open loop from this process, latency from the due time by its clock, order shuffled anew each time. Load 1 is
what --capacity says, or the rate at which column 1 alone saturates this project's server, measured at the
beginning. A late answer counts as missed, whatever its status. What is done is kept in PATH.runs.jsonl at
once: interrupted, the same command goes on. Knows servers only over HTTP.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import arrivals as schedules
from loadtests import records, report
from loadtests.arrivals import Arrivals
from loadtests.offline import Offline, processor_name, read_test_images
from loadtests.peers import launch
from loadtests.peers.adaptors import PEERS
from loadtests.peers.contest import N_CHECKED, Contestant, own_contestant, peer_contestant
from loadtests.peers.tune import COLUMN, chosen_knobs
from loadtests.records import Point, Summary

OWN = "this server"
BEGIN, END = "<!-- written by loadtests.compare -->", "<!-- end of what loadtests.compare wrote -->"

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run to be done: a load, and which of its repetitions."""

    name: str
    load: float
    repeat: int

    @property
    def panel(self) -> str:
        """As its rows are headed."""
        return f"load {self.load:g}, {self.name}"


def trials(loads: Sequence[float], names: Sequence[str], n_repeats: int) -> list[Trial]:
    """All of them, each load once before any comes again: an interrupted run has fewer repetitions of all."""
    return [
        Trial(name, load, repeat) for repeat, name, load in itertools.product(range(n_repeats), names, loads)
    ]


def requests_of(
    trial: Trial,
    *,
    capacity_hz: float,
    seconds: float,
    budgets_s: Sequence[float],
    n_images: int,
    seed: int,
) -> Arrivals:
    """What every server gets in this trial; a matter of the seed alone."""
    rng = np.random.default_rng([seed, trial.repeat, round(trial.load * 1000)])
    at_s = schedules.named(trial.name, rate_hz=trial.load * capacity_hz, duration_s=seconds, rng=rng)
    return schedules.schedule(at_s, budgets_s=budgets_s, n_images=n_images, rng=rng)


class Journal:
    """What has been done, one JSON document a line: first what the run is, then each trial of a server.

    Args:
        path: Of the file; it may be there from an interrupted run.

    Raises:
        ValueError: the file's first line is broken; the message says what to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            self.head: Row | None = json.loads(lines[0]) if lines else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} does not begin with what its run is: remove it") from error
        self.rows: list[Row] = []
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was cut off
                self.rows.append(json.loads(line))

    def begin(self, head: Row) -> Row:
        """Keep what the run is; one that goes on keeps its own.

        Raises:
            ValueError: what is kept there is of another run.
        """
        if self.head is None:
            self._append(head)
            self.head = head
        elif self.head["plan"] != head["plan"]:
            raise ValueError(
                f"{self._path} holds another run ({self.head['plan']}): remove it or change --out"
            )
        return self.head

    def add(self, row: Row) -> None:
        """Keep one trial."""
        self._append(row)
        self.rows.append(row)

    def has(self, trial: Trial, name: str) -> bool:
        """It is done."""
        return any(
            (row["panel"], row["repeat"], row["server"]) == (trial.panel, trial.repeat, name)
            for row in self.rows
        )

    def _append(self, row: Row) -> None:
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in {b"", b"\n"}
        with self._path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(row) + "\n")


@contextlib.contextmanager
def contestants(artifact: Path, pixels: Sequence[bytes], peers: Sequence[str]) -> Iterator[list[Contestant]]:
    """This server and the peers, all started, all at rest."""
    logs = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - logs to read, gone with the machine
    with contextlib.ExitStack() as stack:
        own = own_contestant("anytime", artifact, pixels, logs / "compare-own.log", OWN)
        started = [stack.enter_context(own)]
        for peer in (PEERS[name] for name in peers):
            print(f"Starting {peer.title} {launch.version_of(peer)} ...", flush=True)
            knobs = chosen_knobs(peer)
            log, title = logs / f"compare-{peer.name}.log", f"{peer.title}, column {knobs[COLUMN]}"
            started.append(
                stack.enter_context(peer_contestant(peer, artifact, knobs[COLUMN], pixels, log, knobs, title))
            )
        yield started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--peers", default=",".join(PEERS), help="with commas")
    parser.add_argument("--loads", default="0.5,0.8,1.0,1.5", help="shares of the capacity, with commas")
    parser.add_argument("--arrivals", default="poisson,gamma-4", help=f"of {', '.join(schedules.NAMES)}")
    parser.add_argument("--budgets", default="2,5,10,50", help="mix of budgets [ms], with commas")
    parser.add_argument("--seconds", type=float, default=3.5, help="length of one run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, every time with other requests")
    parser.add_argument("--capacity", type=float, help="requests/s of load 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="write PATH.json, .md, .svg and .runs.jsonl")
    parser.add_argument("--page", type=Path, help="put tables and picture between the marks of this page")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out

    spec = json.loads((chosen.artifact / "manifest.json").read_text())
    images_NHWC, labels = read_test_images(
        chosen.data, 10_000, spec["input"]["height"], spec["input"]["width"]
    )
    pixels = [image.tobytes() for image in images_NHWC]
    peers = [name for name in chosen.peers.split(",") if name]
    for name in peers:
        launch.make(PEERS[name])
    journal = Journal(chosen.out.with_suffix(".runs.jsonl"))
    plan = {
        "artifact": f"{spec['name']}@{spec['version']}",
        "capacity_hz": chosen.capacity,
        "loads": [float(load) for load in chosen.loads.split(",")],
        "arrivals": chosen.arrivals.split(","),
        "budgets_ms": [float(budget) for budget in chosen.budgets.split(",")],
        "seconds": chosen.seconds,
        "seed": chosen.seed,
        "knobs": {name: chosen_knobs(PEERS[name]) for name in peers},
    }
    with contestants(chosen.artifact, pixels, peers) as servers:
        offline = Offline(chosen.artifact, images_NHWC[:N_CHECKED])
        n_checked = {server.name: server.check(offline) for server in servers}
        print("Every answer compared is the artifact's: " + json.dumps(n_checked), flush=True)
        if journal.head is None:
            own_hz = _capacity_hz(chosen.artifact, pixels)
            journal.begin(
                {
                    "plan": plan,
                    "command": "python -m loadtests.compare " + " ".join(arguments or sys.argv[1:]),
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "processor": processor_name(),
                    "cores": os.cpu_count(),
                    "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
                    "python": platform.python_version(),
                    "versions": {PEERS[name].title: launch.version_of(PEERS[name]) for name in peers},
                    "n_checked": n_checked,
                    "capacity_hz": round(chosen.capacity or own_hz, 1),
                    "servers": {
                        server.name: {
                            "capacity_hz": round(own_hz if server.name == OWN else server.capacity_hz(), 1),
                            "idle_cores": round(server.idle_share, 3),
                        }
                        for server in servers
                    },
                }
            )
        head = journal.begin({"plan": plan})
        print(f"Load 1 is {head['capacity_hz']:.0f} requests/s. {json.dumps(head['servers'])}", flush=True)
        order = random.Random(chosen.seed)  # noqa: S311 - an order, not a secret
        for trial in trials(plan["loads"], plan["arrivals"], chosen.repeats):
            arrivals = requests_of(
                trial,
                capacity_hz=head["capacity_hz"],
                seconds=chosen.seconds,
                budgets_s=[budget / 1e3 for budget in plan["budgets_ms"]],
                n_images=len(pixels),
                seed=chosen.seed,
            )
            for server in order.sample(servers, len(servers)):
                if journal.has(trial, server.name):
                    continue
                seen = server.measure(arrivals, labels)
                journal.add(
                    {"panel": trial.panel, "repeat": trial.repeat, "server": server.name, **asdict(seen)}
                )
                print(_line(trial.panel, server.name, seen), flush=True)
            write(chosen.out, head, journal.rows, chosen.page)
    return 0


def write(out: Path, head: Row, rows: Sequence[Row], page: Path | None) -> None:
    """Everything as JSON, the tables as Markdown, the picture as SVG, and both put into a page."""
    points = [_point(server, panel, of) for (panel, server), of in _grouped(rows).items()]
    out.with_suffix(".json").write_text(json.dumps(head | {"runs": rows}, indent=1) + "\n")
    report.draw_plane(points, out.with_suffix(".svg"), "The same columns behind other servers")
    out.with_suffix(".md").write_text(
        "\n".join([_provenance(head, rows), "", report.table(points), remainder_table(rows)])
    )
    if page:
        picture = os.path.relpath(out.with_suffix(".svg"), page.parent)
        details = os.path.relpath(out.with_suffix(".md"), page.parent)
        fill(page, "\n".join([_provenance(head, rows), "", *_page_parts(head, points, picture, details)]))


def fill(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the figures: put {BEGIN} and {END} into it")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def remainder_table(rows: Sequence[Row]) -> str:
    """What became of the requests that had no answer in time, as Markdown: means over the runs."""
    lines = [
        "| load | server | late, % | refused, % | timed out, % | failed, % | median, ms | p99, ms | valid |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (panel, server), of in _grouped(rows).items():
        mean = {name: float(np.mean([row["outcomes"][name] for row in of])) for name in records.OUTCOMES}
        late = mean["answered"] - float(np.mean([row["attainment"] for row in of]))
        shares = [late, mean["rejected"], mean["expired"], mean["failed"] + mean["lost"]]
        latencies = [1e3 * float(np.mean([row["latency_s"][name] for row in of])) for name in ("p50", "p99")]
        cells = [f"{100 * share:.1f}" for share in shares] + [f"{value:.1f}" for value in latencies]
        n_valid = sum(row["is_valid"] for row in of)
        lines.append(f"| {panel} | {server} | {' | '.join(cells)} | {n_valid} of {len(of)} |")
    return "\n".join([*lines, ""])


def _page_parts(head: Row, points: Sequence[Point], picture: str, details: str) -> list[str]:
    servers = "\n".join(
        f"| {name} | {seen['capacity_hz']:.0f} | {seen['idle_cores']:.2f} |"
        for name, seen in head["servers"].items()
    )
    return [
        "Right and in time, % of all requests:",
        "",
        _matrix(points, "accuracy_of_all"),
        "In time, % of all requests:",
        "",
        _matrix(points, "attainment"),
        f"![Attainment against accuracy]({picture})",
        "",
        f"[Accuracy and goodput, and what became of the other requests]({details})",
        "",
        "Alone on the machine, with 16 connections that never pause, and with none (this server with column",
        "1 for everybody; alone it would refine every answer):",
        "",
        "| server | answers/s | cores taken idle |",
        "|---|---:|---:|",
        servers,
    ]


def _matrix(points: Sequence[Point], figure: str) -> str:
    """One row per server, one column per load."""
    panels = list(dict.fromkeys(point.panel for point in points))
    by_place = {(point.policy, point.panel): getattr(point, figure) for point in points}
    lines = [f"| server | {' | '.join(panels)} |", f"|---|{'---:|' * len(panels)}"]
    for server in dict.fromkeys(point.policy for point in points):
        cells = [by_place.get((server, panel)) for panel in panels]
        texts = [_percent(*cell) if cell else "" for cell in cells]
        lines.append(f"| {server} | {' | '.join(texts)} |")
    return "\n".join([*lines, ""])


def _percent(mean: float, half: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def _provenance(head: Row, rows: Sequence[Row]) -> str:
    n_runs = len({row["repeat"] for row in rows})
    n_invalid = sum(not row["is_valid"] for row in rows)
    plan = head["plan"]
    versions = ", ".join(f"{title} {version}" for title, version in head["versions"].items())
    return (
        f"`{head['command']}`, begun {head['date']} on {head['cores']} cores of {head['processor']} "
        f"({head['machine']}, Python {head['python']}). {plan['artifact']}; "
        f"load 1 is {head['capacity_hz']:.0f} requests/s; "
        f"budgets of {', '.join(f'{budget:g}' for budget in plan['budgets_ms'])} ms in equal parts; "
        f"{n_runs} runs of {plan['seconds']:g} s each, means with 95 % intervals (Student's t). "
        f"{versions}. {n_invalid} of {len(rows)} runs are invalid, because the generator was more than "
        f"{records.MAX_LAG_S * 1e3:g} ms late with over 1 % of the requests; they are in the means."
    )


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """By load and server, in a lasting order: loads as planned, servers as started."""
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    servers = sorted({row["server"] for row in rows}, key=lambda name: (name != OWN, name))
    grouped = {
        (panel, server): [row for row in rows if (row["panel"], row["server"]) == (panel, server)]
        for panel in panels
        for server in servers
    }
    return {key: of for key, of in grouped.items() if of}


def _point(server: str, panel: str, of: Sequence[Mapping[str, Any]]) -> Point:
    return records.point(server, panel, [Summary(**{key: row[key] for key in _FIELDS}) for row in of])


_FIELDS = tuple(Summary.__dataclass_fields__)


def _capacity_hz(artifact: Path, pixels: Sequence[bytes]) -> float:
    """Of this project's server with column 1 alone."""
    log = Path(os.environ.get("TMPDIR", "/tmp")) / "compare-column-1.log"  # noqa: S108 - as in contestants
    with own_contestant("fixed-shallow", artifact, pixels, log, "column 1 alone") as own:
        return own.capacity_hz()


def _line(panel: str, server: str, seen: Summary) -> str:
    return (
        f"{panel:20} {server:34} in time {seen.attainment:.4f} accuracy {seen.accuracy:.4f} of all "
        f"{seen.accuracy_of_all:.4f} goodput {seen.goodput_hz:5.0f}/s lag p99 {seen.lag_p99_s * 1e3:.2f} ms"
        f"{'' if seen.is_valid else ' INVALID'}"
    )


if __name__ == "__main__":
    sys.exit(main())
