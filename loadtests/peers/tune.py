"""Chooses each peer's settings by measuring them, one after the other, on arrivals that no comparison sees.

    python -m loadtests.peers.tune --data data

For each knob of `Peer.tried`, then for the column, servers with every value are started and take turns; the
value with most answers right and in time, averaged over all runs, stays. Writes loadtests/peers/choices.json,
which loadtests.compare reads, and loadtests/results/tuning.md, which shows every figure.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests import arrivals as schedules
from loadtests.arrivals import Arrivals
from loadtests.offline import processor_name, read_test_images
from loadtests.peers import launch
from loadtests.peers.adaptors import FOLDER, PEERS, Peer
from loadtests.peers.contest import own_contestant, peer_contestant

CHOICES = FOLDER / "choices.json"
COLUMN = "COLUMN"
"""The knob that every peer has: which column it serves."""
HELD_OUT_SEED = 7_000
"""Of all schedules here; `loadtests.compare` counts up from 0."""

Setting = Mapping[str, str]


def chosen_knobs(peer: Peer) -> dict[str, str]:
    """What it was tuned to, the column among it; its defaults where it was not."""
    choices = json.loads(CHOICES.read_text()) if CHOICES.exists() else {}
    return {COLUMN: "1", **peer.knobs, **choices.get(peer.name, {})}


def candidates(setting: Setting, knob: str, values: Sequence[str]) -> dict[str, Setting]:
    """The setting with every value of one knob, by that value."""
    return {value: {**setting, knob: value} for value in values}


def measured(
    peer: Peer,
    artifact: Path,
    settings: Mapping[str, Setting],
    offered: Sequence[tuple[str, Arrivals]],
    pixels: Sequence[bytes],
    labels: NDArray[np.int64],
    shuffled: random.Random,
) -> dict[str, dict[str, float]]:
    """Right and in time of all, by setting and by load; a setting that does not start has none."""
    seen: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, setting in settings.items():
            log = Path(os.environ.get("TMPDIR", "/tmp")) / f"tune-{peer.name}-{name}.log"  # noqa: S108 - to read
            contestant = peer_contestant(peer, artifact, setting[COLUMN], pixels, log, setting, name)
            try:
                running[name] = stack.enter_context(contestant)
            except (RuntimeError, OSError) as error:  # OSError: it was there, and ended when it was asked
                print(f"{peer.name} {name}: {error}", flush=True)
        for load, arrivals in offered:
            for name in shuffled.sample(list(running), len(running)):
                summary = running[name].measure(arrivals, labels)
                seen.setdefault(name, {}).setdefault(load, []).append(summary.accuracy_of_all)
    return {
        name: {load: float(np.mean(values)) for load, values in by_load.items()}
        for name, by_load in seen.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--peers", default=",".join(PEERS), help="with commas")
    parser.add_argument("--loads", default="0.5,1.0", help="shares of the capacity, with commas")
    parser.add_argument("--budgets", default="2,5,10,50", help="mix of budgets [ms], with commas")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, every time with other requests")
    parser.add_argument("--capacity", type=float, help="requests/s of load 1, instead of measuring it")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/tuning.md"))
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out

    spec = json.loads((chosen.artifact / "manifest.json").read_text())
    images_NHWC, labels = read_test_images(
        chosen.data, 10_000, spec["input"]["height"], spec["input"]["width"]
    )
    pixels = [image.tobytes() for image in images_NHWC]
    capacity = chosen.capacity or _capacity_hz(chosen.artifact, pixels)
    offered = []
    for repeat in range(chosen.repeats):
        for load in map(float, chosen.loads.split(",")):
            rng = np.random.default_rng([HELD_OUT_SEED, repeat, round(load * 1000)])
            at_s = schedules.poisson(load * capacity, chosen.seconds, rng=rng)
            budgets_s = [float(budget) / 1e3 for budget in chosen.budgets.split(",")]
            arrivals = schedules.schedule(at_s, budgets_s=budgets_s, n_images=len(pixels), rng=rng)
            offered.append((f"{load:g}", arrivals))
    shuffled = random.Random(HELD_OUT_SEED)  # noqa: S311 - an order, not a secret
    choices: dict[str, Setting] = json.loads(CHOICES.read_text()) if CHOICES.exists() else {}
    rows: list[dict[str, Any]] = []
    for peer in (PEERS[name] for name in chosen.peers.split(",")):
        launch.make(peer)
        setting: Setting = {COLUMN: "1", **peer.knobs}
        columns = [rung["column"] for rung in spec["rungs"]]
        for knob, values in {**peer.tried, COLUMN: columns}.items():
            tried = candidates(setting, knob, values)
            seen = measured(peer, chosen.artifact, tried, offered, pixels, labels, shuffled)
            if not seen:
                raise RuntimeError(f"{peer.title} did not start with any {knob}: its logs say why")
            best = max(seen, key=lambda value: float(np.mean(list(seen[value].values()))))
            setting = tried[best]
            for value, by_load in seen.items():
                row = {"peer": peer.title, "knob": knob, "value": value, "is_chosen": value == best}
                rows.append(row | {"by_load": by_load})
                print(f"{peer.name:9} {_row(rows[-1])}", flush=True)
        choices[peer.name] = setting
        CHOICES.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(_page(rows, capacity, arguments or sys.argv[1:]))
    return 0


def _capacity_hz(artifact: Path, pixels: Sequence[bytes]) -> float:
    log = Path(os.environ.get("TMPDIR", "/tmp")) / "tune-own.log"  # noqa: S108 - to read
    with own_contestant("fixed-shallow", artifact, pixels, log, "own") as own:
        return own.capacity_hz()


def _row(row: Mapping[str, Any]) -> str:
    by_load = " | ".join(f"{100 * share:.1f}" for share in row["by_load"].values())
    chosen = " (chosen)" if row["is_chosen"] else ""
    return f"| {row['peer']} | {row['knob']} | {row['value']}{chosen} | {by_load} |"


def _page(rows: Sequence[Mapping[str, Any]], capacity: float, arguments: Sequence[str]) -> str:
    loads = list(rows[0]["by_load"])
    command = " ".join(["python -m loadtests.peers.tune", *arguments])
    head = [
        "What was tried of each peer's settings, one knob after the other, the others as chosen so far:",
        f"right and in time, % of all requests; Poisson arrivals, load 1 is {capacity:.0f} requests/s.",
        "",
        f"`{command}`, {os.cpu_count()} cores of {processor_name()}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"| server | knob | value | {' | '.join(f'load {load}' for load in loads)} |",
        f"|---|---|---|{'---:|' * len(loads)}",
    ]
    return "\n".join([*head, *map(_row, rows), ""])


if __name__ == "__main__":
    sys.exit(main())
