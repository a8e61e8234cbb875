"""Shows what logs and spans cost a request: the server's processor time per answer, and latencies beside it.

    python -m loadtests.telemetry --out loadtests/results/telemetry

One server for each way to tell of requests, all else alike, in turns (A B C, A B C, and so on), frozen while
another has its turn. Each turn is a Poisson stream by an open loop from this process; every request is
satisfied by column 1 and bears a trace, which is not to be recorded unless all are. Spans go to a collector
that throws them away, in a process of its own. Told: what the server's process took, and the client's p50 and
p99. Knows the service only over HTTP.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from loadtests import arrivals as schedules
from loadtests import hosting, openloop, plane, records
from loadtests.capacity import first_column_head
from loadtests.offline import processor_name
from loadtests.targets import Target

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
CONTEXT = b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-%b\r\n"
WITHOUT_BOUND = "1000000"
START_LIMIT_S = 20.0


@dataclass(frozen=True)
class Way:
    """One way to tell of requests.

    Attributes:
        name: As it is printed.
        settings: Of the server; of an endpoint the place is held by `{collector}`.
        is_sampled: Whether the requests' own traces are to be recorded.
    """

    name: str
    settings: Mapping[str, str]
    is_sampled: bool = False


TRACED = {"ANYTIME_TRACES_ENDPOINT": "{collector}", "ANYTIME_MAX_TRACES_PER_SECOND": WITHOUT_BOUND}
WAYS = (
    Way("nothing", {}),
    Way("spans, none sampled", TRACED),
    Way("spans, at most 10 a second", {**TRACED, "ANYTIME_MAX_TRACES_PER_SECOND": "10"}, is_sampled=True),
    Way("spans of every request", TRACED, is_sampled=True),
    Way("a line for 1 in 100, text", {"ANYTIME_LOG_REQUESTS": "0.01"}),
    Way("a line for each, text", {"ANYTIME_LOG_REQUESTS": "1"}),
    Way("a line for each, JSON", {"ANYTIME_LOG_REQUESTS": "1", "ANYTIME_LOG_FORMAT": "json"}),
)


@dataclass(frozen=True)
class Turn:
    """What one turn of one server showed: processor time per answer [us], and latencies [ms]."""

    cpu_us: float
    p50_ms: float
    p99_ms: float


def turn(server: hosting.Server, way: Way, *, rate_hz: float, seconds: float, seed: int) -> Turn:
    """Send one stream.

    Raises:
        RuntimeError: not all were answered: the rate is more than this machine can do.
    """
    bodies = Target(server.url).pictures(None).bodies
    at_s = schedules.poisson(rate_hz, seconds, rng=np.random.default_rng(seed))

    def head(address: urllib.parse.SplitResult, budget_s: float, content_type: str, n_bytes: int) -> bytes:
        plain = first_column_head(address, budget_s, content_type, n_bytes)
        return plain.replace(b"\r\n\r\n", b"\r\n" + CONTEXT % (b"01" if way.is_sampled else b"00") + b"\r\n")

    before_s = server.cpu_s()
    replies = openloop.run(
        openloop.send(
            server.url,
            at_s,
            np.full(len(at_s), 9.0),
            np.arange(len(at_s)) % len(bodies),
            bodies,
            content_type=plane.RAW_PIXELS,
            head=head,
        )
    )
    spent_s = server.cpu_s() - before_s
    if any(reply.status != 200 for reply in replies):
        raise RuntimeError(f"{way.name}: not every request was answered: lower --rate")
    latencies_ms = [(reply.done_s - due_s) * 1e3 for reply, due_s in zip(replies, at_s, strict=True)]
    p50_ms, p99_ms = np.percentile(latencies_ms, (50, 99)).tolist()
    return Turn(spent_s / len(replies) * 1e6, p50_ms, p99_ms)


def collect(port: int) -> None:
    """Take spans and throw them away, until the process is told to end."""

    async def take() -> None:
        server = grpc.aio.server()

        async def export(_: bytes, __: object) -> bytes:
            return b""  # the message that says that all were taken

        name, _, method = EXPORT[1:].partition("/")
        handler: Any = grpc.unary_unary_rpc_method_handler(export)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {method: handler})])
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(take())


@contextlib.contextmanager
def collecting(folder: Path) -> Iterator[str]:
    """Start the collector; gives its address."""
    port = hosting.free_port()
    command = [sys.executable, "-m", "loadtests.telemetry", "--collect", str(port)]
    log = folder / "collector.log"
    with hosting.hosting(
        command, port, environment={}, log=log, is_ready=_is_listened_to, limit_s=START_LIMIT_S
    ) as server:
        yield server.url


def _is_listened_to(url: str) -> bool:
    address = urllib.parse.urlsplit(url)
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address.hostname, address.port or 0), timeout=1),
    ):
        return True
    return False


def measure(
    artifact: Path, ways: Sequence[Way], *, rate_hz: float, seconds: float, rounds: int
) -> dict[str, list[Turn]]:
    """The turns of each way, in the order of the ways.

    Raises:
        RuntimeError: a server did not start, or not every request was answered.
    """
    turns: dict[str, list[Turn]] = {way.name: [] for way in ways}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        collector = stack.enter_context(collecting(folder))
        servers = []
        for number, way in enumerate(ways):
            settings = {name: value.format(collector=collector) for name, value in way.settings.items()}
            log = folder / f"{number}.log"
            servers.append(stack.enter_context(plane.serving("anytime", artifact, log, settings)))
            servers[-1].freeze()
        for round_ in range(rounds):
            for way, server in zip(ways, servers, strict=True):
                server.thaw()
                turns[way.name].append(turn(server, way, rate_hz=rate_hz, seconds=seconds, seed=round_))
                server.freeze()
    return turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--out", type=Path, help="write PATH.json")
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.collect:
        collect(chosen.collect)
        return 0
    turns = measure(chosen.artifact, WAYS, rate_hz=chosen.rate, seconds=chosen.seconds, rounds=chosen.rounds)
    base = turns[WAYS[0].name]
    print(f"{'':28}{'us of processor time':>24}{'more than nothing':>22}{'p50, ms':>16}{'p99, ms':>16}")
    for name, seen in turns.items():
        more = [one.cpu_us - other.cpu_us for one, other in zip(seen, base, strict=True)]
        columns = [
            records.interval([one.cpu_us for one in seen]),
            records.interval(more),
            records.interval([one.p50_ms for one in seen]),
            records.interval([one.p99_ms for one in seen]),
        ]
        cells = [
            f"{mean:.{digits}f} ± {half:.{digits}f}"
            for (mean, half), digits in zip(columns, (0, 0, 2, 2), strict=True)
        ]
        print(f"{name:28}{cells[0]:>24}{cells[1]:>22}{cells[2]:>16}{cells[3]:>16}", flush=True)
    if chosen.out:
        document = {
            "command": "python -m loadtests.telemetry " + " ".join(arguments or sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "rate_hz": chosen.rate,
            "seconds": chosen.seconds,
            "turns": {name: [asdict(one) for one in seen] for name, seen in turns.items()},
        }
        chosen.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
