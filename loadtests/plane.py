"""Shows what each policy makes of the same requests on a real server: attainment against accuracy.

    python -m loadtests.plane --data data --loads 0.5,0.8,1.0,1.5 --arrivals poisson,gamma-4 --seconds 6 \
        --out loadtests/results/plane

Starts `python -m service serve` once per policy, on this machine, and keeps all of them up; only one is under
load at a time. For each load and shape every policy gets the very same requests (due times, budgets,
pictures), sent by an open loop from this process, in an order shuffled anew each time. Load 1 is the rate at
which the shallowest column alone saturates the server, measured at the beginning of the run. Also told: how
much time the server added to inference, and whether an answer claimed its deadline falsely. Knows the service
only over HTTP.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests import arrivals as schedules
from loadtests import hosting, openloop, records, report
from loadtests.arrivals import Arrivals
from loadtests.hosting import Server
from loadtests.offline import processor_name, read_test_images
from loadtests.openloop import Head, Prediction, Reply
from loadtests.records import OUTCOME_BY_STATUS, Record, Summary

POLICIES = ("anytime", "fixed-shallow", "fixed-deep", "deepest-fit", "slackfit")
START_LIMIT_S = 120.0
SETTLE_S = 0.5
"""Pause between two runs, so that what the one left behind is not counted against the next [s]."""
RAW_PIXELS = "application/octet-stream"
N_CONNECTIONS = 512
"""At most at a time. Larger lets more requests wait inside a slow server, smaller more before it."""
N_SATURATING = 4000
N_SATURATING_CONNECTIONS = 16


@contextlib.contextmanager
def serving(
    policy: str,
    artifact: Path,
    log: Path,
    settings: Mapping[str, str] = MappingProxyType({}),
    limit_s: float = START_LIMIT_S,
    n_processes: int = 1,
) -> Iterator[Server]:
    """Start the service with this policy and these settings, and stop it at the end.

    Several processes share a port and are handled as one; each starts when those before it are ready, so that
    they do not measure this machine at once.

    Raises:
        RuntimeError: it was not ready in time; its log says why.
    """
    port = hosting.free_port()
    own = {
        "ANYTIME_POLICY": policy,
        "ANYTIME_ARTIFACT": str(artifact),
        "ANYTIME_PORT": str(port),
        "ANYTIME_GRPC_PORT": "",
        **settings,
    }
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for i in range(n_processes):
            asked = port
            if n_processes > 1:
                asked = hosting.free_port()
                own |= {"ANYTIME_SHARES_PORT": "true", "ANYTIME_OWN_PORT": str(asked)}
            one = hosting.hosting(
                [sys.executable, "-m", "service", "serve"],
                port,
                environment=own,
                log=log.with_stem(f"{log.stem}-{i}") if i else log,
                is_ready=partial(_is_ready, asked),
                limit_s=limit_s,
                mark=servers[0].mark if servers else None,
            )
            servers.append(stack.enter_context(one))
        yield servers[0]


def _is_ready(port: int, _: str) -> bool:
    return hosting.answers(f"http://127.0.0.1:{port}/healthz/ready")


def capacity_hz(
    url: str,
    bodies: Sequence[bytes],
    *,
    content_type: str = RAW_PIXELS,
    head: Head | None = None,
    n: int = N_SATURATING,
) -> float:
    """How many of n requests per second the server behind this address answers when it never lacks one.

    Raises:
        RuntimeError: it answered none of them.
    """
    replies = openloop.run(
        openloop.send(
            url,
            np.zeros(n),
            np.full(n, 9.0),
            np.arange(n) % len(bodies),
            bodies,
            content_type=content_type,
            head=head,
            max_connections=N_SATURATING_CONNECTIONS,
            timeout_s=60,
        )
    )
    done_s = [reply.done_s for reply in replies if reply.status == 200]
    if not done_s:
        raise RuntimeError(f"{url} gave no answer: its log says why")
    return len(done_s) / max(done_s)


def offer(
    url: str,
    arrivals: Arrivals,
    bodies: Sequence[bytes],
    *,
    content_type: str = RAW_PIXELS,
    head: Head | None = None,
    timeout_s: float = 2.0,
) -> list[Reply]:
    """Send these requests to this server; what has no response `timeout_s` after the last one is lost."""
    return openloop.run(
        openloop.send(
            url,
            arrivals.at_s,
            arrivals.budget_s,
            arrivals.image,
            bodies,
            content_type=content_type,
            head=head,
            max_connections=N_CONNECTIONS,
            timeout_s=timeout_s,
        )
    )


def record(
    replies: Sequence[Reply],
    arrivals: Arrivals,
    labels: NDArray[np.int64],
    *,
    read: Callable[[Reply], Prediction] = openloop.read_reply,
    outcome_by_status: Mapping[int, str] = OUTCOME_BY_STATUS,
) -> Record:
    """Judge the replies by the labels and by this process's clock.

    Args:
        replies: One for each of the arrivals.
        arrivals: What was to be sent.
        labels: Class of each image.
        read: What an answer of status 200 says.
        outcome_by_status: One of `records.OUTCOMES` for each status that is not a failure.
    """
    answers = [read(reply) if reply.status == 200 else None for reply in replies]
    latency_s = np.array([reply.done_s - reply.due_s for reply in replies])
    return Record(
        due_s=arrivals.at_s,
        budget_s=arrivals.budget_s,
        latency_s=latency_s,
        outcome=np.array([outcome_by_status.get(reply.status, "failed") for reply in replies]),
        columns_run=np.array(["+".join(answer.columns_run) if answer else "" for answer in answers]),
        is_correct=np.array(
            [
                answer is not None and answer.index == labels[reply.image]
                for answer, reply in zip(answers, replies, strict=True)
            ]
        ),
        claims_met=np.array([answer is not None and answer.deadline_met for answer in answers]),
        lag_s=np.nan_to_num(np.array([reply.own_lag_s for reply in replies]), nan=0.0),
    )


def added_ms(replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
    """Where the time of answers went, apart from inference [ms]: p50 and p99 of each part.

    `added` is all that the server's clock saw less inference; `other` what is neither decoding nor waiting;
    `outside` what the client saw beyond the server's clock: two sockets and two event loops.
    """
    parts: dict[str, list[float]] = {"added": [], "decode": [], "queue": [], "other": [], "outside": []}
    for reply in replies:
        if reply.status == 200:
            answer = openloop.read_reply(reply)
            timing = answer.timing_ms
            added = answer.elapsed_ms - timing["inference"]
            parts["added"].append(added)
            parts["decode"].append(timing["decode"])
            parts["queue"].append(timing["queue"])
            parts["other"].append(added - timing["decode"] - timing["queue"])
            parts["outside"].append((reply.done_s - reply.sent_s) * 1e3 - answer.elapsed_ms)
    return {
        name: {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}
        for name, values in parts.items()
        if values
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--policies", default=",".join(POLICIES), help="with commas")
    parser.add_argument("--loads", default="0.5,0.8,1.0,1.5", help="shares of the capacity, with commas")
    parser.add_argument("--arrivals", default="poisson,gamma-4", help=f"of {', '.join(schedules.NAMES)}")
    parser.add_argument("--budgets", default="2,5,10,50", help="mix of budgets [ms], with commas")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, every time with other requests")
    parser.add_argument("--capacity", type=float, help="requests/s of load 1, instead of measuring it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write PATH.json, PATH.md and PATH.svg")
    chosen = parser.parse_args(arguments)

    spec = json.loads((chosen.artifact / "manifest.json").read_text())["input"]
    images_NHWC, labels = read_test_images(chosen.data, 10_000, spec["height"], spec["width"])
    bodies = [image.tobytes() for image in images_NHWC]
    policies = chosen.policies.split(",")
    shuffled = random.Random(chosen.seed)  # noqa: S311 - an order, not a secret
    runs: dict[tuple[str, str], list[Summary]] = {}
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        logs = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - a log to read, gone with the machine
        servers = {
            policy: stack.enter_context(serving(policy, chosen.artifact, logs / f"plane-{policy}.log"))
            for policy in dict.fromkeys([*policies, "fixed-shallow"])
        }
        capacity = chosen.capacity or capacity_hz(servers["fixed-shallow"].url, bodies)
        print(f"Load 1 is {capacity:.0f} requests/s.", flush=True)
        for repeat in range(chosen.repeats):
            for name in chosen.arrivals.split(","):
                for load in map(float, chosen.loads.split(",")):
                    rng = np.random.default_rng([chosen.seed, repeat, round(load * 1000)])
                    at_s = schedules.named(name, rate_hz=load * capacity, duration_s=chosen.seconds, rng=rng)
                    budgets_s = [float(budget) / 1e3 for budget in chosen.budgets.split(",")]
                    arrivals = schedules.schedule(at_s, budgets_s=budgets_s, n_images=len(bodies), rng=rng)
                    for policy in shuffled.sample(policies, len(policies)):
                        time.sleep(SETTLE_S)
                        replies = offer(servers[policy].url, arrivals, bodies)
                        seen = records.summary(record(replies, arrivals, labels))
                        panel = f"load {load:g}, {name}"
                        runs.setdefault((panel, policy), []).append(seen)
                        row = {
                            "panel": panel,
                            "policy": policy,
                            "repeat": repeat,
                            "added_ms": added_ms(replies),
                        }
                        rows.append(row | asdict(seen))
                        print(_line(panel, policy, seen, row["added_ms"]), flush=True)
    points = [records.point(policy, panel, of) for (panel, policy), of in runs.items()]
    print(report.table(points))
    if chosen.out:
        _write(chosen.out, capacity, rows, points, arguments or sys.argv[1:])
    return 0


def _line(panel: str, policy: str, seen: Summary, added: Mapping[str, Mapping[str, float]]) -> str:
    by_budget = " ".join(f"{ms:g}:{share:.3f}" for ms, share in seen.attainment_by_budget.items())
    own = f"{added['added']['p50']:.2f}/{added['added']['p99']:.2f} ms added" if added else ""
    return (
        f"{panel:20} {policy:14} in time {seen.attainment:.4f} accuracy {seen.accuracy:.4f} of all "
        f"{seen.accuracy_of_all:.4f} goodput {seen.goodput_hz:5.0f}/s  [{by_budget}] {own} "
        f"false claims {seen.n_false_claims} (worst {seen.worst_false_claim_s * 1e3:.2f} ms) "
        f"lag p99 {seen.lag_p99_s * 1e3:.2f} ms{'' if seen.is_valid else ' INVALID'}"
    )


def _write(
    out: Path,
    capacity: float,
    rows: Sequence[Mapping[str, Any]],
    points: Sequence[records.Point],
    arguments: Sequence[str],
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "command": "python -m loadtests.plane " + " ".join(arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "capacity_hz": round(capacity, 1),
    }
    out.with_suffix(".json").write_text(json.dumps(head | {"runs": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(report.table(points) + "\n")
    report.draw_plane(points, out.with_suffix(".svg"), "On a real server")


if __name__ == "__main__":
    sys.exit(main())
