"""Shows where the server stands against what does not depend on the machine; `make bench-quick`.

    python -m loadtests.bench --out loadtests/results/bench.jsonl

Requests per second by column 1 alone, on 16 connections that never rest, in turns (A B C D A B C D ...): this
server, the plain FastAPI application of `loadtests/peers/fastapi`, a bare ASGI application that answers a
constant under the same uvicorn, and the runtime in a loop without HTTP. All on this machine, so that their
ratios say more than the figures. Also what this server adds to inference for one caller at a time. A line is
added to `--out`: the history that a slow change shows in.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from loadtests import hosting, openloop, plane, records
from loadtests.capacity import first_column_head
from loadtests.offline import commit, processor_name
from loadtests.peers import launch
from loadtests.peers.adaptors import PEERS
from loadtests.targets import Target

N_REQUESTS = 2000
N_ALONE = 300
EVERY_S = 0.01
"""Between the requests of one caller at a time [s]: longer than any of them takes on an idle machine."""
START_LIMIT_S = 60.0


@dataclass(frozen=True)
class Contender:
    """Something that is measured in turns.

    Attributes:
        name: Of its figures.
        rate_hz: Answers per second now.
    """

    name: str
    rate_hz: Callable[[], float]


def raw_loop_hz(artifact: Path, n: int) -> float:
    """Runs of column 1 per second, one image at a time, by the runtime set up as the server does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        artifact / "column-1.onnx", options, providers=["CPUExecutionProvider"]
    )
    [graph_input] = session.get_inputs()
    image_NHWC = np.random.default_rng(0).integers(0, 256, (1, *graph_input.shape[1:]), np.uint8)
    feed = {graph_input.name: image_NHWC}
    for _ in range(n // 10):
        session.run(None, feed)
    begun_s = time.perf_counter()
    for _ in range(n):
        session.run(None, feed)
    return n / (time.perf_counter() - begun_s)


def added_ms(url: str, bodies: Sequence[bytes]) -> dict[str, float]:
    """What the server's clock saw beyond inference, for one caller at a time and column 1 alone [ms]."""
    replies = openloop.run(
        openloop.send(
            url,
            np.linspace(0.0, N_ALONE * EVERY_S, N_ALONE),
            np.full(N_ALONE, 9.0),
            np.arange(N_ALONE) % len(bodies),
            bodies,
            content_type=plane.RAW_PIXELS,
            head=first_column_head,
        )
    )
    return plane.added_ms(replies)["added"]


@contextlib.contextmanager
def contenders(
    artifact: Path, logs: Path, n: int
) -> Iterator[tuple[Sequence[Contender], str, Sequence[bytes]]]:
    """Start all of them; gives them, the address of this server, and pictures for it."""
    port = hosting.free_port()
    bare = [
        sys.executable,
        "-m",
        "uvicorn",
        "loadtests.constant:app",
        "--port",
        str(port),
        "--loop",
        "uvloop",
    ]
    bare += ["--http", "httptools", "--no-access-log", "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(plane.serving("anytime", artifact, logs / "service.log"))
        fastapi = PEERS["fastapi"]
        knobs = {**fastapi.knobs, "MAX_WAITING": "0"}  # all 16 are to be answered
        plain = stack.enter_context(launch.launched(fastapi, artifact, "1", logs / "fastapi.log", knobs))
        constant = stack.enter_context(
            hosting.hosting(
                bare,
                port,
                environment={},
                log=logs / "constant.log",
                is_ready=hosting.answers,
                limit_s=START_LIMIT_S,
            )
        )
        bodies = Target(service.url).pictures(None).bodies
        rate_hz = partial(plane.capacity_hz, bodies=bodies, n=n)
        yield (
            [
                Contender("this server", partial(rate_hz, service.url, head=first_column_head)),
                Contender("plain FastAPI", partial(rate_hz, plain.url, head=fastapi.head)),
                Contender("bare ASGI, a constant", partial(rate_hz, constant.url)),
                Contender("the runtime alone", partial(raw_loop_hz, artifact, n)),
            ],
            service.url,
            bodies,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--requests", type=int, default=N_REQUESTS, help="in one turn")
    parser.add_argument("--out", type=Path, help="add a line of JSON to this file")
    chosen = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as logs,
        contenders(chosen.artifact, Path(logs), chosen.requests) as (all_of_them, url, bodies),
    ):
        rates: dict[str, list[float]] = {contender.name: [] for contender in all_of_them}
        added: list[float] = []
        for _ in range(chosen.rounds):
            for contender in all_of_them:
                rates[contender.name].append(contender.rate_hz())
            added.append(added_ms(url, bodies)["p50"])
    first, *others = rates
    print(f"{'':24}{'answers/s':>16}{'this server, as a ratio':>28}")
    ratios = {}
    for name, seen in rates.items():
        mean_hz, half_hz = records.interval(seen)
        ratios[name] = records.interval([a / b for a, b in zip(rates[first], seen, strict=True)])
        ratio = "" if name == first else f"{ratios[name][0]:.2f} ± {ratios[name][1]:.2f}"
        print(f"{name:24}{mean_hz:9.0f} ± {half_hz:4.0f}{ratio:>28}")
    mean_ms, half_ms = records.interval(added)
    print(f"Added to inference for one caller at a time, median: {mean_ms:.2f} ± {half_ms:.2f} ms.")
    if chosen.out:
        line = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "processor": f"{os.cpu_count()} cores of {processor_name()}",
            "rounds": chosen.rounds,
            "requests": chosen.requests,
            "rates_hz": {name: round(records.interval(seen)[0], 1) for name, seen in rates.items()},
            "ratio_to": {name: [round(x, 4) for x in ratios[name]] for name in others},
            "added_p50_ms": [round(mean_ms, 4), round(half_ms, 4)],
        }
        with chosen.out.open("a", encoding="utf-8") as history:
            history.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
