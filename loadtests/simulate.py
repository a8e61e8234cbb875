"""Compares policies on the same requests without a server: the server's own policy code in simulated time.

    python -m loadtests.simulate --profile model.json --arrivals poisson,gamma-4 --loads 0.5,0.8,1.0,1.5 --n
    20000

Claims: which policy gives which attainment and accuracy at which load, and how far that is from an oracle
    that
knows every arrival in advance. A million requests take some minutes. Nothing is measured here but the
profile, which comes from a server (`curl localhost:8000/model > model.json`) or is made up (`--profile gpu`);
what a picture's answer is comes from the artifact run on real pictures (`--data`), or is drawn from the
tables of its manifest. Must not know HTTP or sockets.
"""

import argparse
import heapq
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import arrivals as schedules
from loadtests import records, report
from loadtests.arrivals import Arrivals
from loadtests.offline import Offline, Outcomes, processor_name, read_test_images
from loadtests.oracle import Bound, bound
from loadtests.records import Record
from service import scheduling
from service.ladder import ConfidenceTable, Ladder
from service.latency import Latency, LatencyProfile, LiveProfile
from service.policies import POLICY_NAMES, PolicyName, named
from service.scheduling import Policy
from service.waiting import Queue, Ticket, TrafficMonitor

BALANCES = ("random", "round-robin", "least-loaded", "power-of-two")
QUANTILE = 0.8
"""Of the measured latencies that the policies call high, as in the server."""

SPREAD_AT_HIGH = 0.8416
"""Standard deviations from the median to that quantile of a normal distribution."""

ROUNDING_S = 1e-9
"""An answer at the very end of its budget is in time, whatever the last bit of a sum says."""

MADE_UP_GPU_MS = {"1": 0.25, "2": 0.40, "3": 0.70}
MADE_UP_GPU_SIZES = (1, 2, 4, 8, 16, 32)
"""A GPU of our imagination: a batch of 32 takes twice as long as one image, and runs vary little."""
N_MADE_UP = 20_000


@dataclass(frozen=True)
class Machine:
    """What every replica is.

    Attributes:
        profile: Latency of runs; single runs vary around the median so that the high quantile comes out.
        before_s: From the arrival of a request until it is in the queue: reading and decoding [s].
        reserve_s: Kept free of every budget for the answer's way out, and taken by it [s].
        preemption_s: How long a run goes on that is told to end; infinite where it cannot be told [s].
        stall_share: Share of runs that take `stall_factor` times as long.
        stall_factor: How many times longer those take.
    """

    profile: LatencyProfile
    before_s: float = 0.2e-3
    reserve_s: float = 0.4e-3
    preemption_s: float = math.inf
    stall_share: float = 0.0
    stall_factor: float = 50.0

    def capacity_hz(self, column: str) -> float:
        """Most requests per second that one replica can answer with this column."""
        sizes = self.profile.batch_sizes
        return max(size / self.profile.latency(column, size).median_s for size in sizes)


@dataclass(slots=True, eq=False)
class _Request(Ticket):
    index: int = 0
    image: int = 0


class _Replica:
    """One server: a queue, and at most one run."""

    __slots__ = (
        "batch",
        "busy_until_s",
        "column",
        "end",
        "is_preempted",
        "monitor",
        "profile",
        "queue",
        "started_s",
    )

    def __init__(self, machine: Machine, ladder: Ladder) -> None:
        self.queue: Queue[_Request] = Queue(ladder)
        self.monitor = TrafficMonitor()
        self.profile = LiveProfile(machine.profile, QUANTILE, preemption_s=machine.preemption_s)
        self.batch: tuple[_Request, ...] = ()
        self.column = ""
        self.started_s = self.busy_until_s = 0.0
        self.end = -1
        """The number of the event that will end the run; others were to be before it was preempted."""
        self.is_preempted = False


class Simulation:
    """Plays requests through replicas behind a load balancer.

    Args:
        policy: What each replica decides by.
        machine: What each replica is.
        ladder: Accuracy by combination of columns.
        outcomes: What each combination answers for each picture.
        n_replicas: How many.
        balance: One of `BALANCES`.
        slowed: How many times longer than elsewhere runs take on the first replica; nobody is told.
        seed: For run times and the balancer.
    """

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        ladder: Ladder,
        outcomes: Outcomes,
        *,
        n_replicas: int = 1,
        balance: str = "power-of-two",
        slowed: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._slowed = slowed
        self._policy, self._machine, self._ladder = policy, machine, ladder
        self._confidence = {columns: list(map(float, c)) for columns, c in outcomes.confidence.items()}
        self._is_correct = outcomes.is_correct
        self._rng = np.random.default_rng(seed)
        self._replicas = [_Replica(machine, ladder) for _ in range(n_replicas)]
        self._n_inside = np.zeros(n_replicas, np.int64)
        self._choose = self._balancer(balance)
        self._noise: list[float] = []
        self._ends: list[tuple[float, int, int]] = []
        self._n_ends = 0

    def run(self, arrivals: Arrivals) -> Record:
        """Play it.

        Cost: some 50 microseconds a request.
        """
        n = len(arrivals)
        self._at_s = arrivals.at_s.tolist()
        self._outcome = ["expired"] * n
        self._columns: list[tuple[str, ...]] = [()] * n
        self._done_s = [math.nan] * n
        before_s, reserve_s = self._machine.before_s, self._machine.reserve_s
        for index, (at_s, budget_s, image) in enumerate(
            zip(self._at_s, arrivals.budget_s.tolist(), arrivals.image.tolist(), strict=True)
        ):
            now_s = at_s + before_s
            self._finish_until(now_s)
            self._arrive(_Request(at_s + budget_s - reserve_s, index=index, image=image), now_s)
        self._finish_until(math.inf)
        return self._record(arrivals)

    def _arrive(self, request: _Request, now_s: float) -> None:
        place = self._choose()
        replica = self._replicas[place]
        _drop_expired(replica, now_s)
        replica.monitor.arrived(now_s, request.ready_by_s - now_s)
        busy_until_s, sooner_s = now_s, math.inf
        if replica.batch:
            busy_until_s = replica.busy_until_s
            if not replica.is_preempted and all(other.columns_run for other in replica.batch):
                sooner_s = now_s + replica.profile.preemption_s
        admission = scheduling.admit(
            self._policy,
            request.ready_by_s,
            now_s,
            busy_until_s,
            sooner_s,
            replica.queue,
            replica.profile,
            self._ladder,
            replica.monitor.traffic(now_s),
        )
        if not admission.is_accepted:
            self._outcome[request.index] = "rejected"
            return
        if admission.preempts:
            replica.is_preempted, replica.busy_until_s = True, sooner_s
            self._end_at(sooner_s, place)
        replica.queue.add(request)
        if not replica.batch:
            self._advance(place, now_s)
        self._n_inside[place] = len(replica.queue) + len(replica.batch)

    def _advance(self, place: int, now_s: float) -> None:
        replica = self._replicas[place]
        _drop_expired(replica, now_s)
        plan = self._policy.plan(
            replica.queue, now_s, replica.profile, self._ladder, replica.monitor.traffic(now_s)
        )
        for request, _ in plan.finished:
            replica.queue.remove(request)
            self._settle(request, min(now_s, request.ready_by_s))
        if plan.column is None:
            return
        for request in plan.batch:
            replica.queue.remove(request)
        n = len(plan.batch)
        replica.column, replica.batch, replica.started_s = plan.column, plan.batch, now_s
        replica.busy_until_s = now_s + replica.profile.latency(plan.column, n).likely_s
        factor = self._slowed if place == 0 else 1.0
        end_s = now_s + factor * self._run_s(self._machine.profile.latency(plan.column, n))
        self._end_at(end_s, place)

    def _end_at(self, end_s: float, place: int) -> None:
        """Have the run of this replica end then, and at no other time."""
        self._n_ends += 1
        self._replicas[place].end = self._n_ends
        heapq.heappush(self._ends, (end_s, self._n_ends, place))

    def _finish_until(self, now_s: float) -> None:
        """End every run that ends by now, and let its replica go on."""
        while self._ends and self._ends[0][0] <= now_s:
            end_s, number, place = heapq.heappop(self._ends)
            replica = self._replicas[place]
            if number != replica.end:
                continue
            batch, column, is_preempted = replica.batch, replica.column, replica.is_preempted
            replica.batch, replica.is_preempted = (), False
            if not is_preempted:
                replica.profile.observe(column, len(batch), end_s - replica.started_s)
            for request in batch:
                if request.columns_run and end_s > request.ready_by_s:
                    self._settle(request, request.ready_by_s)
                    continue
                if is_preempted:
                    replica.queue.add(request)
                    continue
                request.columns_run += (column,)
                request.confidence = self._confidence[request.columns_run][request.image]
                if end_s > request.ready_by_s:
                    self._settle(request, end_s)
                else:
                    replica.queue.add(request)
            self._advance(place, end_s)
            self._n_inside[place] = len(replica.queue) + len(replica.batch)

    def _settle(self, request: _Request, now_s: float) -> None:
        self._outcome[request.index] = "answered"
        self._columns[request.index] = request.columns_run
        self._done_s[request.index] = now_s + self._machine.reserve_s

    def _run_s(self, latency: Latency) -> float:
        if not self._noise:
            self._noise = self._rng.standard_normal(4096).tolist()
        sigma = math.log(latency.high_s / latency.median_s) / SPREAD_AT_HIGH
        run_s = latency.median_s * math.exp(sigma * self._noise.pop())
        if self._machine.stall_share and self._rng.random() < self._machine.stall_share:
            run_s *= self._machine.stall_factor
        return run_s

    def _balancer(self, balance: str) -> Callable[[], int]:
        n, rng, inside = len(self._replicas), self._rng, self._n_inside
        if n == 1:
            return lambda: 0
        if balance == "random":
            return lambda: int(rng.integers(n))
        if balance == "round-robin":
            turn = iter(range(sys.maxsize))
            return lambda: next(turn) % n
        if balance == "least-loaded":
            return lambda: int(inside.argmin())

        def better_of_two() -> int:
            one, other = int(rng.integers(n)), int(rng.integers(n))
            return one if inside[one] <= inside[other] else other

        return better_of_two

    def _record(self, arrivals: Arrivals) -> Record:
        n = len(arrivals)
        is_correct = [
            bool(columns) and bool(self._is_correct[columns][image])
            for columns, image in zip(self._columns, arrivals.image.tolist(), strict=True)
        ]
        latency_s = np.array(self._done_s) - arrivals.at_s - ROUNDING_S
        return Record(
            due_s=arrivals.at_s,
            budget_s=arrivals.budget_s,
            latency_s=latency_s,
            outcome=np.array(self._outcome),
            columns_run=np.array(["+".join(columns) for columns in self._columns]),
            is_correct=np.array(is_correct),
            claims_met=latency_s <= arrivals.budget_s,
            lag_s=np.zeros(n),
        )


def _drop_expired(replica: _Replica, now_s: float) -> None:
    queue = replica.queue
    while queue.unanswered and queue.unanswered[0].ready_by_s < now_s:
        queue.remove(queue.unanswered[0])


def ladder_of(manifest: Mapping[str, Any]) -> Ladder:
    """What a server that loads this artifact would tell its policy."""
    return Ladder(
        [rung["column"] for rung in manifest["rungs"]],
        {tuple(c["columns"]): c["accuracy"] for c in manifest["combinations"]},
        [
            ConfidenceTable(
                columns=tuple(table["columns"]),
                edges=tuple(table["edges"]),
                n=tuple(table["n"]),
                accuracy={tuple(key.split("+")): tuple(rows) for key, rows in table["accuracy"].items()},
            )
            for table in manifest["confidence"]
        ],
    )


def read_profile(name: str) -> LatencyProfile:
    """The profile of a made-up GPU (`gpu`), or the one that a server told at /model, saved in a file.

    Raises:
        ValueError: the file holds no latencies; save what a running server says at /model.
    """
    if name == "gpu":
        return LatencyProfile(
            {
                column: {
                    size: Latency(ms / 1e3 * growth, ms / 1e3 * growth * 1.05)
                    for size in MADE_UP_GPU_SIZES
                    for growth in [1 + (size - 1) / 31]
                }
                for column, ms in MADE_UP_GPU_MS.items()
            }
        )
    try:
        latency_ms = json.loads(Path(name).read_bytes())["latency_ms"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} holds no latencies: curl SERVER/model > {name}") from error
    return LatencyProfile(
        {
            column: {int(n): Latency(of["median"] / 1e3, of["high"] / 1e3) for n, of in by_size.items()}
            for column, by_size in latency_ms.items()
        }
    )


def compare(
    policies: Sequence[PolicyName],
    machine: Machine,
    ladder: Ladder,
    outcomes: Outcomes,
    arrivals: Sequence[Arrivals],
    *,
    n_replicas: int,
    balance: str,
    slowed: float = 1.0,
) -> tuple[dict[PolicyName, list[records.Summary]], list[Bound]]:
    """Play each of these series of requests with each policy; and what the oracle says of each."""
    summaries = {
        policy: [
            records.summary(
                Simulation(
                    named(policy),
                    machine,
                    ladder,
                    outcomes,
                    n_replicas=n_replicas,
                    balance=balance,
                    slowed=slowed,
                    seed=seed,
                ).run(series)
            )
            for seed, series in enumerate(arrivals)
        ]
        for policy in policies
    }
    sizes = machine.profile.batch_sizes
    cost_s = {
        column: min(machine.profile.latency(column, size).median_s / size for size in sizes)
        for column in ladder.columns
    }
    overhead_s = machine.before_s + machine.reserve_s
    bounds = [
        bound(series, outcomes, cost_s=cost_s, overhead_s=overhead_s, n_replicas=n_replicas)
        for series in arrivals
    ]
    return summaries, bounds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    manifest = json.loads((chosen.artifact / "manifest.json").read_text())
    if chosen.data:
        height, width = manifest["input"]["height"], manifest["input"]["width"]
        images_NHWC, labels = read_test_images(chosen.data, 10_000, height, width)
        outcomes = Offline(chosen.artifact, images_NHWC).outcomes(labels)
    else:
        outcomes = Outcomes.made_up(manifest, N_MADE_UP, chosen.seed)
    preemption_s = math.inf if chosen.profile == "gpu" else chosen.preemption_ms / 1e3
    machine = Machine(read_profile(chosen.profile), preemption_s=preemption_s, stall_share=chosen.stalls)
    ladder = ladder_of(manifest)
    rate_hz = machine.capacity_hz(ladder.shallowest) * chosen.replicas
    print(f"Load 1 is {rate_hz:.0f} requests/s: column 1 alone, in the batches that are cheapest per image.")
    points: list[records.Point] = []
    asked = chosen.policies.split(",")
    policies = [policy for policy in POLICY_NAMES if policy in asked]
    if len(policies) < len(asked):
        raise SystemExit(f"--policies takes {', '.join(POLICY_NAMES)}, not {chosen.policies}")
    for name in chosen.arrivals.split(","):
        for load in map(float, chosen.loads.split(",")):
            panel = f"load {load:g}, {name}"
            series = [
                _series(name, load * rate_hz, chosen, len(outcomes), repeat)
                for repeat in range(chosen.repeats)
            ]
            started_s = time.perf_counter()
            summaries, bounds = compare(
                policies,
                machine,
                ladder,
                outcomes,
                series,
                n_replicas=chosen.replicas,
                balance=chosen.balance,
                slowed=chosen.slowed,
            )
            took_s = time.perf_counter() - started_s
            for policy, runs in summaries.items():
                points.append(records.point(policy, panel, runs))
                print(_line(panel, policy, runs, bounds))
            limit = f"in time {_mean(b.attainment for b in bounds):.4f}"
            limit += f"                 of all {_mean(b.accuracy_of_all for b in bounds):.4f}"
            print(f"{panel:20} {'oracle':14} {limit}", flush=True)
            n_played = len(summaries) * sum(map(len, series))
            print(f"{'':20} {n_played} requests in {took_s:.1f} s", file=sys.stderr)
    print(report.table(points))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        head = f"`python -m loadtests.simulate {' '.join(arguments or sys.argv[1:])}`, {processor_name()}\n\n"
        chosen.out.with_suffix(".md").write_text(head + report.table(points) + "\n")
        report.draw_plane(points, chosen.out.with_suffix(".svg"), "Simulated")
    return 0


def _series(name: str, rate_hz: float, chosen: argparse.Namespace, n_images: int, repeat: int) -> Arrivals:
    if Path(name).suffix == ".csv":
        return schedules.read(Path(name))
    rng = np.random.default_rng([chosen.seed, repeat])
    at_s = schedules.named(name, rate_hz=rate_hz, duration_s=chosen.n / rate_hz, rng=rng)
    budgets_s = [float(budget) / 1e3 for budget in chosen.budgets.split(",")]
    return schedules.schedule(at_s, budgets_s=budgets_s, n_images=n_images, rng=rng)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is simulated")
    parser.add_argument("--profile", required=True, help="what a server says at /model, in a file; or gpu")
    parser.add_argument("--data", type=Path, help="CIFAR-10, for real answers; without it they are made up")
    parser.add_argument("--policies", default=",".join(POLICY_NAMES), help="with commas")
    parser.add_argument("--loads", default="0.5,0.8,1.0,1.5", help="shares of the capacity, with commas")
    parser.add_argument(
        "--arrivals", default="poisson,gamma-4", help=f"of {', '.join(schedules.NAMES)}, or a recorded .csv"
    )
    parser.add_argument("--budgets", default="2,5,10,50", help="mix of budgets [ms], with commas")
    parser.add_argument("--n", type=int, default=20_000, help="requests per run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, every time with other requests")
    parser.add_argument("--replicas", type=int, default=1, help="servers behind a load balancer")
    parser.add_argument("--balance", choices=BALANCES, default="power-of-two", help="how it chooses one")
    parser.add_argument("--slowed", type=float, default=1.0, help="runs on the first replica take so long")
    parser.add_argument("--stalls", type=float, default=0.0, help="share of runs that take 50 times as long")
    parser.add_argument(
        "--preemption-ms",
        type=float,
        default=0.3,
        help="how long a run goes on that is told to end, on a CPU",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.svg")
    return parser


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _line(panel: str, policy: str, runs: Sequence[records.Summary], bounds: Sequence[Bound]) -> str:
    all_right = _mean(run.accuracy_of_all for run in runs)
    regret = _mean(b.accuracy_of_all for b in bounds) - all_right
    return (
        f"{panel:20} {policy:14} in time {_mean(run.attainment for run in runs):.4f} "
        f"accuracy {_mean(run.accuracy for run in runs):.4f} of all {all_right:.4f} "
        f"goodput {_mean(run.goodput_hz for run in runs):7.0f}/s  regret {regret * 100:5.2f} points"
    )


if __name__ == "__main__":
    sys.exit(main())
