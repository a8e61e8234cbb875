"""Shows what loading a new version beside serving costs those who are served: no request, some latency.

    python -m loadtests.swap --rate 200 --repeats 5 --out loadtests/results/swap

Starts a server with a repository of two versions of one artifact and sends it a Poisson stream of random
pictures, by an open loop from this process. In the middle of each run the version that does not answer is
loaded, measured anew (nothing is remembered), and takes the other's place. Told: how many requests failed,
and the latency of those that were due before and during the loading, by the client's clock. Knows the
service only over HTTP.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from loadtests import arrivals as schedules
from loadtests import openloop, plane, records
from loadtests.offline import processor_name
from loadtests.openloop import Reply

VERSIONS = ("1", "2")
BEFORE_S = 4.0
"""Served undisturbed before each swap; the comparison is with these."""
LOAD_LIMIT_S = 60.0
REFUSALS = (429, 504)
ADMIN_KEY = "for this run only"


@dataclass(frozen=True)
class Swap:
    """One swap under load.

    Latencies in milliseconds, from the due time to the last byte read. A request is refused if the server
    said that there can be no answer in time, and has failed if anything else but an answer came. In time: the
    share of all requests that had an answer within the budget.
    """

    n_before: int
    n_during: int
    n_refused: int
    n_failed: int
    versions: tuple[str, ...]
    loading_s: float
    before_p50_ms: float
    before_p99_ms: float
    during_p50_ms: float
    during_p99_ms: float
    before_in_time: float
    during_in_time: float

    @property
    def ratio(self) -> float:
        """The p99 during the loading, over that before it."""
        return self.during_p99_ms / self.before_p99_ms


@contextlib.contextmanager
def versions_of(artifact: Path) -> Iterator[Path]:
    """A repository with the artifact in two versions; removed at the end."""
    name = json.loads((artifact / "manifest.json").read_text())["name"]
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            copy = Path(folder) / name / version
            shutil.copytree(artifact, copy)
            manifest = json.loads((copy / "manifest.json").read_text())
            (copy / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
        yield Path(folder) / name


def load(url: str, name: str, version: str) -> None:
    """Have a version take the place of the other.

    Raises:
        OSError: the server refuses.
    """
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{url}/v2/repository/models/{name}/load",
        json.dumps({"parameters": {"version": version}}).encode(),
        {"x-api-key": ADMIN_KEY},
    )
    with urllib.request.urlopen(request, timeout=LOAD_LIMIT_S):  # noqa: S310 - our own server
        pass


def swapped(
    url: str, name: str, version: str, *, rate_hz: float, budget_s: float, seconds: float, seed: int
) -> Swap:
    """Swap once under load.

    Raises:
        RuntimeError: the load ended before the swap did.
    """
    rng = np.random.default_rng(seed)
    with urllib.request.urlopen(f"{url}/model", timeout=10) as response:  # noqa: S310 - our own server
        spec = json.load(response)["input"]
    shape = (64, spec["height"] * spec["width"] * spec["channels"])
    bodies = [row.tobytes() for row in rng.integers(0, 256, shape, np.uint8)]
    at_s = schedules.poisson(rate_hz, BEFORE_S + seconds, rng=rng)
    during_s: list[float] = []

    def change() -> None:
        time.sleep(BEFORE_S)
        during_s.append(time.monotonic())
        load(url, name, version)
        during_s.append(time.monotonic())

    changing = threading.Thread(target=change)
    changing.start()
    start_s = time.monotonic()
    replies = openloop.run(
        openloop.send(
            url,
            at_s,
            np.full(len(at_s), budget_s),
            rng.integers(0, len(bodies), len(at_s)),
            bodies,
            content_type="application/octet-stream",
            timeout_s=5,
        )
    )
    changing.join()
    if len(during_s) < 2 or during_s[1] - start_s > at_s[-1]:
        raise RuntimeError("the load ended before the swap: make the run longer with --seconds")
    return judged(replies, budget_s, during_s[0] - start_s, during_s[1] - start_s)


def judged(replies: Sequence[Reply], budget_s: float, from_s: float, until_s: float) -> Swap:
    """What the replies say of a swap that took from one time to the other [s, from the start of the load]."""

    def in_time(due: Sequence[Reply]) -> float:
        return float(np.mean([one.status == 200 and one.done_s - one.due_s <= budget_s for one in due]))

    answered = [reply for reply in replies if reply.status == 200]
    n_refused = sum(reply.status in REFUSALS for reply in replies)
    versions = Counter(json.loads(reply.body)["version"] for reply in answered)
    before = [(one.done_s - one.due_s) * 1e3 for one in answered if one.due_s < from_s]
    during = [(one.done_s - one.due_s) * 1e3 for one in answered if from_s <= one.due_s <= until_s]
    return Swap(
        n_before=len(before),
        n_during=len(during),
        n_refused=n_refused,
        n_failed=len(replies) - len(answered) - n_refused,
        versions=tuple(sorted(versions)),
        loading_s=until_s - from_s,
        before_p50_ms=float(np.quantile(before, 0.5)),
        before_p99_ms=float(np.quantile(before, 0.99)),
        during_p50_ms=float(np.quantile(during, 0.5)),
        during_p99_ms=float(np.quantile(during, 0.99)),
        before_in_time=in_time([one for one in replies if one.due_s < from_s]),
        during_in_time=in_time([one for one in replies if from_s <= one.due_s <= until_s]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 1 if a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--budget-ms", type=float, default=50.0, help="of every request")
    parser.add_argument("--seconds", type=float, default=30.0, help="from the swap's begin to the run's end")
    parser.add_argument("--repeats", type=int, default=5, help="swaps")
    parser.add_argument("--out", type=Path, help="write PATH.json")
    chosen = parser.parse_args(arguments)
    swaps: list[Swap] = []
    with versions_of(chosen.artifact) as folder:
        settings = {
            "ANYTIME_MODEL_REPOSITORY": str(folder.parent),
            "ANYTIME_ADMIN_KEYS": "sha256:" + hashlib.sha256(ADMIN_KEY.encode()).hexdigest(),
            "ANYTIME_PROFILE_CACHE": "",
        }
        with (
            tempfile.TemporaryDirectory() as logs,
            plane.serving("anytime", folder / VERSIONS[0], Path(logs) / "log", settings) as server,
        ):
            for repeat in range(chosen.repeats):
                swap = swapped(
                    server.url,
                    folder.name,
                    VERSIONS[(repeat + 1) % 2],
                    rate_hz=chosen.rate,
                    budget_s=chosen.budget_ms / 1e3,
                    seconds=chosen.seconds,
                    seed=repeat,
                )
                swaps.append(swap)
                print(
                    f"{swap.n_failed} failed, {swap.n_refused} refused; before and during "
                    f"{swap.loading_s:.1f} s of loading: "
                    f"p50 {swap.before_p50_ms:.2f} and {swap.during_p50_ms:.2f} ms, "
                    f"p99 {swap.before_p99_ms:.2f} and {swap.during_p99_ms:.2f} ms (x {swap.ratio:.2f}), "
                    f"in time {swap.before_in_time:.2%} and {swap.during_in_time:.2%}",
                    flush=True,
                )
    mean, half = records.interval([swap.ratio for swap in swaps])
    print(f"p99 during over p99 before: {mean:.2f} +- {half:.2f} (95 %, n = {len(swaps)})")
    if chosen.out:
        head = {
            "command": "python -m loadtests.swap " + " ".join(arguments or sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        }
        rows = [asdict(swap) | {"ratio": swap.ratio} for swap in swaps]
        chosen.out.with_suffix(".json").write_text(json.dumps(head | {"swaps": rows}, indent=1) + "\n")
    return int(any(swap.n_failed for swap in swaps))


if __name__ == "__main__":
    sys.exit(main())
