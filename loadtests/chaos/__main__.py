"""Shows that nothing of what callers do, or of models that fail, stays behind in a server.

    make chaos

is `python -m loadtests.chaos --requests 100000 --out loadtests/results/chaos`. It starts `python -m service
serve` on this machine, for HTTP and gRPC, with an artifact whose runs fail, last or give NaN for marked
pictures, and sends it rounds of requests: three quarters of them good, the others as bad as can be. Meanwhile
versions are swapped, broken ones refused, and the process is stopped for a moment. Looked at before (after a
round to warm up) and after: memory, handles, threads, connections, queue; how much is let in until something
is refused; what a few calm requests get. Exit status 1 if anything is not as it must be. Knows the service
only from outside; listens and calls on 127.0.0.1 alone. Linux only.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import arrivals as schedules
from loadtests import hosting, openloop, plane
from loadtests.chaos import artifacts, callers, footprint, over_http, storm, verdict
from loadtests.chaos.callers import RAW, Form, Pictures, Place
from loadtests.chaos.footprint import Capacities
from loadtests.chaos.storm import Shelf
from loadtests.chaos.verdict import Bar, Calm, End, Moment, Round
from loadtests.offline import processor_name

HOST = "127.0.0.1"
MODEL, OTHER = "trapped", "small"
VERSIONS = ("1", "2")
KEY, ADMIN_KEY = "for this run only", "for this run's administrator only"
N_PICTURES = 16
STALL_S = 0.4
N_INSIDE = 16
"""Requests that are inside when the server is told to stop; the first of them stalls."""
N_SWAPS = 2
"""In a row, before broken versions have their turn again; so on until a round ends."""
N_LAST = 3
"""Rounds at the end in which no model changes: what requests add to the memory is not hidden by what models
take and give back."""
SETTLE_S = 2.0
"""From the last change until the server is looked at: a second after it, free memory is given back."""

CALM_HZ, CALM_BUDGET_S = 50.0, 0.1
"""Some 5 % of what one core answers by the deepest column, and plenty of time."""
LEAD_SHARE = 0.3
"""Of the time for calm requests. Those in it do not count: what a storm taught is unlearnt from them."""
QUIET_LIMIT_S = 15.0
"""After a round until nobody is connected any more: some times the longest of the time limits below."""

SETTINGS: Mapping[str, Any] = {
    "max_body_bytes": 1 << 20,
    "max_bodies_bytes": 8 << 20,
    "max_pixels": 1_000_000,
    "max_connections": 512,
    "max_open_requests": 160,
    "max_waiting": 64,
    "max_pipelined_requests": 8,
    "max_images_per_request": 16,
    "max_query_bytes": 1024,
    "max_header_bytes": 16384,
    "header_timeout_s": 1.0,
    "body_timeout_s": 1.0,
    "keep_alive_s": 1.0,
    "send_timeout_s": 1.0,
    "drain_timeout_s": 2.0,
}
"""Bounds so near that a storm runs into each of them; connections excepted, or good callers would be turned
away without a word. Every time limit is longer than the process is stopped for."""

BOUNDS = Capacities(
    n_connections=int(SETTINGS["max_connections"]),
    n_open_requests=int(SETTINGS["max_open_requests"]),
    n_open_calls=int(SETTINGS["max_open_requests"]),
    bodies_bytes=int(SETTINGS["max_bodies_bytes"]),
)
"""The same, as `footprint.capacities` finds them."""

FAULT = re.compile(r"(ERROR|CRITICAL) ")
"""Begins a line of the server's log that tells of a fault."""

EXPECTED = re.compile(r"ERROR +(Run \d+, of column|.* outcome=failed )")
"""Of those the ones that traps bring about: for the run that failed, and each request that it failed for."""


@dataclass(frozen=True)
class Subject:
    """A server under test, and what is known of it."""

    server: hosting.Server
    place: Place
    pictures: Pictures
    shelf: Shelf
    repository: Path
    log: Path


@contextlib.contextmanager
def started(artifact: Path, seed: int) -> Iterator[Subject]:
    """A server with a repository of trapped and broken artifacts; stopped and removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "repository"
        for version in VERSIONS:
            folder = repository / MODEL / version
            artifacts.write(artifact, folder, name=MODEL, version=version, stall_s=STALL_S)
        broken = artifacts.write_broken(artifact, repository / MODEL, name=MODEL)
        artifacts.write_shallow(artifact, repository / OTHER / "1", name=OTHER, version="1")
        pictures = callers.make_up(artifact, N_PICTURES, seed)
        with served(repository, Path(scratch) / "log") as (server, place):
            yield Subject(server, place, pictures, Shelf(VERSIONS, broken), repository, Path(scratch) / "log")


@contextlib.contextmanager
def served(repository: Path, log: Path) -> Iterator[tuple[hosting.Server, Place]]:
    """A server of the first version in this repository; stopped at the end."""
    grpc_port = hosting.free_port()
    settings = {
        **SETTINGS,
        "host": HOST,
        "grpc_port": grpc_port,
        "model_repository": repository,
        "profile_cache": "",
        "profile_seconds": 0.5,
        "log_format": "text",
        "log_level": "info",
        "api_keys": _hash(KEY),
        "admin_keys": _hash(ADMIN_KEY),
    }
    artifact = repository / MODEL / VERSIONS[0]
    environment = {f"ANYTIME_{name.upper()}": str(value) for name, value in settings.items()}
    known: Mapping[str, Any] = Place.__dataclass_fields__
    with plane.serving("anytime", artifact, log, environment) as server:
        yield (
            server,
            Place(
                host=HOST,
                port=int(server.url.rpartition(":")[2]),
                grpc_port=grpc_port,
                model=MODEL,
                labels=json.loads((artifact / "manifest.json").read_text())["labels"],
                other=OTHER,
                key=KEY,
                admin_key=ADMIN_KEY,
                **{name: value for name, value in SETTINGS.items() if name in known},
            ),
        )


def _hash(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


# ---- rounds, and what is looked at between them ----


async def one_round(subject: Subject, n_requests: int, rate_hz: float, n_swaps: int, seed: int) -> Round:
    """Everything at the same time, and what became of it.

    Args:
        subject: The server.
        n_requests: At least.
        rate_hz: Of them, per second.
        n_swaps: In a row, between what else is done to the models; 0: nothing is done to them.
        seed: Of the callers.
    """
    place, pictures = subject.place, subject.pictures
    planned = storm.plan(storm.sorts(place, pictures), n_requests, rate_hz, seed)
    before = await footprint.metrics(place)
    begun_s = time.monotonic()
    calling = asyncio.create_task(storm.callers(place, pictures, planned))
    holding_up = asyncio.create_task(storm.hold_up(subject.server, planned[-1].due_s / 2))
    complaints: list[str] = []
    n_swapped = 0
    while n_swaps and not calling.done():
        complaints += await storm.changes(place, subject.shelf, n_swaps)
        n_swapped += n_swaps
    notes, _ = await asyncio.gather(calling, holding_up)
    seconds = time.monotonic() - begun_s
    is_quiet = await footprint.quiet(place, QUIET_LIMIT_S)
    counted = _counted(before, await footprint.metrics(place))
    complaints += await storm.come_and_go(place)
    await asyncio.sleep(SETTLE_S)
    return verdict.round_of(
        notes,
        [*storm.complaints(notes), *complaints],
        seconds=seconds,
        n_swaps=n_swapped,
        is_quiet=is_quiet,
        counted=counted,
        footprint=await footprint.footprint(subject.server, place),
    )


def _counted(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    """Requests for an answer by outcome; those that were late are answered, too."""
    counted = Counter[str]()
    for series, value in after.items():
        if found := re.fullmatch(r'anytime_requests_total\{outcome="(\w+)"\}', series):
            counted["answered" if found[1] == "late" else found[1]] += round(value - before[series])
    return dict(counted)


async def look(subject: Subject, calm_s: float, seed: int) -> Moment:
    """At everything, while nobody else asks.

    How quick it is, is compared with a server that has just been started and is asked the same at the same
    time: what else runs on the machine holds up both of them.
    """
    place = subject.place
    capacities = await footprint.capacities(place, BOUNDS)
    with contextlib.ExitStack() as stack:
        fresh_log = subject.log.with_name("fresh")
        _, fresh_place = await asyncio.to_thread(
            lambda: stack.enter_context(served(subject.repository, fresh_log))
        )
        both = (place, fresh_place)
        await asyncio.gather(*(calm(subject.pictures, each, LEAD_SHARE * calm_s, seed) for each in both))
        own, fresh = await asyncio.gather(
            *(calm(subject.pictures, each, (1 - LEAD_SHARE) * calm_s, seed) for each in both)
        )
        await asyncio.to_thread(stack.close)
    await footprint.quiet(place, QUIET_LIMIT_S)
    return Moment(await footprint.footprint(subject.server, place), capacities, own, fresh)


async def calm(pictures: Pictures, place: Place, seconds: float, seed: int) -> Calm:
    """A few good requests, by an open loop."""
    rng = np.random.default_rng([seed, place.port])
    at_s = schedules.poisson(CALM_HZ, seconds, rng=rng)
    forms = [form for form in pictures.forms if form.content_type == RAW and not form.encoding]
    image = rng.integers(0, len(forms), len(at_s))
    sending = openloop.send(
        f"http://{HOST}:{place.port}",
        at_s,
        np.full(len(at_s), CALM_BUDGET_S),
        image,
        [form.body for form in forms],
        content_type=RAW,
        head=_head,
        max_connections=64,
    )
    replies = await asyncio.to_thread(openloop.run, sending)  # its timers are finer than this loop's
    answered = [reply for reply in replies if reply.status == 200]
    n_wrong = 0
    for reply in answered:
        record = json.loads(reply.body)
        row, columns_run = forms[reply.image].row, record["columns_run"]
        n_wrong += bool(pictures.complaint(row, columns_run, record["index"], record["confidence"]))
    latency_ms = [(reply.done_s - reply.due_s) * 1e3 for reply in answered] or [float("inf")]
    p50_ms, p99_ms = np.quantile(latency_ms, (0.5, 0.99)).tolist()
    return Calm(len(replies), len(answered), n_wrong, p50_ms, p99_ms)


def _head(*asked: Any) -> bytes:
    """As of any request to /predict, with the key."""
    line, _, others = openloop.predict_head(*asked).partition(b"\r\n")
    return b"%b\r\nX-API-Key: %b\r\n%b" % (line, KEY.encode(), others)


async def stop(subject: Subject) -> End:
    """Tell the server to stop while requests are inside, and look at what it logged in its life."""
    place, process = subject.place, subject.server.process
    image_HWC = subject.pictures.images_NHWC[0]
    right, stalling = (
        over_http.predict(place, Form(RAW, one_HWC.tobytes(), None), f"budget_ms={over_http.LONG_MS}")
        for one_HWC in (image_HWC, artifacts.marked(image_HWC, "stall"))
    )

    async def ask(line: over_http.Line, message: bytes) -> str:
        await line.send(message)
        return (await line.response()).status

    async with contextlib.AsyncExitStack() as stack:
        connecting = [over_http.connected(HOST, place.port) for _ in range(N_INSIDE)]
        lines = [await stack.enter_async_context(one) for one in connecting]
        await asyncio.gather(*(ask(line, right) for line in lines))  # now the server knows every connection
        messages = [stalling, *[right] * (N_INSIDE - 1)]
        asking = [
            asyncio.create_task(ask(line, message)) for line, message in zip(lines, messages, strict=True)
        ]
        await asyncio.sleep(STALL_S / 4)
        begun_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        statuses = await asyncio.gather(*asking)
    try:
        status = await asyncio.to_thread(process.wait, 2 * verdict.MAX_STOP_S)
    except subprocess.TimeoutExpired:
        status = None
    seconds = time.monotonic() - begun_s
    complaints = [f"{one or 'nothing'} came" for one in statuses if one not in callers.ANSWERED | {"503"}]
    told = [line for line in subject.log.read_text(errors="replace").splitlines() if FAULT.match(line)]
    faults = [line for line in told if not EXPECTED.match(line)]
    if len(faults) == len(told):  # traps have been sprung
        faults.append("the log says nothing of runs that failed: is it still written as it is read here?")
    return End(status, seconds, complaints, faults)


@dataclass(frozen=True)
class Trial:
    """All that was seen."""

    before: Moment
    rounds: Sequence[Round]
    after: Moment
    end: End

    @property
    def bars(self) -> list[Bar]:
        """What of it must hold, and does or does not."""
        return verdict.bars(self.before, self.rounds, self.after, BOUNDS, self.end)


async def trial(
    subject: Subject, *, n_requests: int, n_rounds: int, rate_hz: float, calm_s: float, seed: int
) -> Trial:
    """Everything, the stopping of the server included; says how it goes.

    Args:
        subject: A server that has just been started.
        n_requests: In all rounds, the one to warm up excepted, which has as many as any other.
        n_rounds: How many.
        rate_hz: Requests/s in a round.
        calm_s: How long only a few requests come, before and after [s].
        seed: Of all that chance decides.
    """
    n_each = math.ceil(n_requests / n_rounds)

    def say(name: str, one: Round) -> Round:
        print(
            f"{name}: {one.n_requests} requests in {one.seconds:.0f} s, {one.footprint.rss_mib:.0f} MiB, "
            f"{len(one.complaints)} complaints",
            flush=True,
        )
        return one

    say("Warm-up", await one_round(subject, n_each, rate_hz, N_SWAPS, seed))
    before = await look(subject, calm_s, seed)
    rounds: list[Round] = []
    for i in range(1, n_rounds + 1):
        n_swaps = N_SWAPS if i <= n_rounds - N_LAST else 0
        rounds.append(say(f"Round {i}", await one_round(subject, n_each, rate_hz, n_swaps, seed + i)))
    after = await look(subject, calm_s, seed)
    return Trial(before, rounds, after, await stop(subject))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument(
        "--requests", type=int, default=100_000, help="after the warm-up, which has a round's"
    )
    parser.add_argument("--rounds", type=int, default=5, help="memory is judged by the last two")
    parser.add_argument("--rate", type=float, default=500.0, help="requests/s, bursts included")
    parser.add_argument("--calm-seconds", type=float, default=10.0, help="of the calm before, and after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    chosen = parser.parse_args(arguments)
    with started(chosen.artifact, chosen.seed) as subject:
        seen = asyncio.run(
            trial(
                subject,
                n_requests=chosen.requests,
                n_rounds=chosen.rounds,
                rate_hz=chosen.rate,
                calm_s=chosen.calm_seconds,
                seed=chosen.seed,
            )
        )
    print(verdict.tables(seen.before, seen.rounds, seen.after, seen.bars))
    if chosen.out:
        _write(chosen.out, seen, "python -m loadtests.chaos " + " ".join(arguments or sys.argv[1:]))
    n_unmet = sum(not bar.is_met for bar in seen.bars)
    print(f"\n{n_unmet} are not as they must be." if n_unmet else "\nAll is as it must be.", flush=True)
    return int(n_unmet > 0)


def _write(out: Path, seen: Trial, command: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    n_requests = sum(one.n_requests for one in seen.rounds)
    head = {
        "command": command,
        "date": date,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "n_requests": n_requests,
        "settings": SETTINGS,
    }
    record = head | asdict(seen) | {"bars": [asdict(bar) for bar in seen.bars]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    claim = (
        f"{n_requests:,} requests after the warm-up, {os.cpu_count()} cores of an {processor_name()} with "
        f"the generator beside the server, {date[:10]}: `{command}`"
    )
    tables = verdict.tables(seen.before, seen.rounds, seen.after, seen.bars)
    out.with_suffix(".md").write_text(f"{claim}\n\n{tables}\n")


if __name__ == "__main__":
    sys.exit(main())
