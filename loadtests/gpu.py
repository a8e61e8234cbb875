"""Measures what a GPU is worth to callers with a deadline; one command, end to end.

    python -m loadtests.gpu --provider cuda --data data --out loadtests/results/gpu

Three questions, each to servers that this starts on this machine and stops again:

1. How long does each column take at each batch size, with CUDA graphs and without?
2. How many requests per second, each granting `--budget-ms`, can there be for a share of `--share` to be
   answered in time? The load rises by a factor from step to step, or falls by it, and the last step is halved
   some times. How busy is the GPU, and where does the time of the answers go, of all and of the late ones?
3. What does a caller wait who comes after `--idle-s` of silence, with the run that keeps the GPU warm and
   without? Both in turn, some silences each, so that what disturbs this machine hits both.

What is found is written after every step and every silence; a part that fails is noted, and the others still
run. `--provider cpu` runs all of it where there is no GPU, to see that it works; its figures say nothing of
one.
Knows the service only over HTTP and its command line.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import arrivals as schedules
from loadtests import gpu_page, plane, records
from loadtests.offline import commit, processor_name
from loadtests.openloop import Reply, read_reply
from loadtests.targets import Pictures, Target

N_HALVINGS = 3
"""How often the last rise is halved. More: the rate is known better, by half each time; a step each."""
LEAST_HZ = 20.0
"""No smaller load is tried [requests/s]: with fewer requests in a step, two late ones decide about 99 %."""
PROFILE_QUANTILE = 0.99
BURST_EVERY_S = 0.02
"""Between the requests after a silence [s]: longer than any answer in time takes, so that each is alone."""
ARMS = ("kept warm", "left alone")
START_S = 10.0
"""What a start of a server is taken for, to tell how long all will take [s]: a guess, and only for that."""
QUICK = {"profile_seconds": 10.0, "seconds": 5.0, "steps": 14, "idle_rounds": 6, "block": 2}
"""Other defaults, with which all of it takes 5 to 6 minutes."""
SMI_EVERY_MS = 200
SMI_FIGURES = {
    "utilization.gpu": "busy_percent",
    "clocks.sm": "clock_mhz",
    "power.draw": "power_w",
    "memory.used": "memory_mib",
}
"""What nvidia-smi, which asks NVML, calls them, and what they are called here."""
LOG_LINES = 20
"""Of a server's log, beside what went wrong with it."""


@dataclass(frozen=True)
class Split:
    """Where the time of some answers went.

    Attributes:
        n: How many they are.
        part_ms: p50 and p99 of each part; empty without answers. `lag`: from the due time until it was sent;
            `outside`: from then to the last byte read, less what the server's clock saw; `decode`, `queue`,
            `inference`: as the answer says; `other`: what else the server's clock saw; `added`: all that it
            saw but inference.
        deepest: Share of each column that was the deepest one.
    """

    n: int
    part_ms: Mapping[str, Mapping[str, float]]
    deepest: Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """One load.

    Attributes:
        rate_hz: Requests offered per second.
        attainment: Share of them that were answered within their budget, by the client's clock.
        accuracy: Share of right ones among those; NaN if the pictures have no labels.
        latency_ms: p50, p95, p99, p99.9 of the answers.
        outcomes: Share of each of `records.OUTCOMES`.
        columns: Share of each set of columns among the answers.
        splits: Of `all` answers, and of the `late` ones.
        gpu: Means of what nvidia-smi said meanwhile; empty without it.
        is_valid: The generator kept up.
    """

    rate_hz: float
    attainment: float
    accuracy: float
    latency_ms: Mapping[str, float]
    outcomes: Mapping[str, float]
    columns: Mapping[str, float]
    splits: Mapping[str, Split]
    gpu: Mapping[str, float]
    is_valid: bool


@dataclass(frozen=True)
class Round:
    """One silence, and what was asked after it.

    Attributes:
        arm: One of `ARMS`.
        latency_ms: Of each request in the order sent; NaN without an answer.
        is_valid: The generator kept up; else the round is void.
    """

    arm: str
    latency_ms: Sequence[float]
    is_valid: bool


def climb(
    offered: Callable[[float], Step], *, start_hz: float, factor: float, share: float, n_steps: int
) -> Iterator[tuple[list[Step], str]]:
    """Raise the load until too few are answered in time, or lower it until enough are; then halve the gap.

    Args:
        offered: Offers a load of this rate and says what came of it.
        start_hz: First rate.
        factor: From each rate to the next, above 1.
        share: What has to be answered in time.
        n_steps: At most.

    Yields:
        After each step all steps in the order made, and what would have ended them: `attainment`, `generator`
        (it could not send any faster) or `steps`.
    """
    steps: list[Step] = []
    held_hz, too_much_hz = 0.0, math.inf
    rate_hz, why = start_hz, "steps"
    least_hz = min(LEAST_HZ, start_hz)
    n_halvings = 0
    while len(steps) < n_steps and n_halvings <= N_HALVINGS and too_much_hz > least_hz:
        step = offered(rate_hz)
        was_late = bool(steps) and steps[-1].rate_hz == step.rate_hz
        steps.append(step)
        if step.is_valid and step.attainment >= share:
            held_hz = rate_hz
        elif step.is_valid or was_late:  # late once may be an accident: the same again
            too_much_hz, why = rate_hz, "attainment" if step.is_valid else "generator"
        yield list(steps), why
        if not step.is_valid and not was_late:
            continue
        if held_hz and too_much_hz < math.inf:
            n_halvings += 1
            rate_hz = math.sqrt(held_hz * too_much_hz)
        else:
            rate_hz = rate_hz * factor if held_hz else max(least_hz, rate_hz / factor)


def best(steps: Sequence[Step], share: float) -> Step | None:
    """The largest load that was answered in time, if any was."""
    held = [step for step in steps if step.is_valid and step.attainment >= share]
    return max(held, key=lambda step: step.rate_hz, default=None)


def split(replies: Sequence[Reply]) -> Split:
    """Where the time of those went that have an answer."""
    answered = [reply for reply in replies if reply.status == 200]
    answers = [read_reply(reply) for reply in answered]
    own_ms = {
        "lag": [reply.lag_s * 1e3 for reply in answered],
        "inference": [answer.timing_ms["inference"] for answer in answers],
    }
    deepest = Counter(answer.columns_run[-1] for answer in answers)
    return Split(
        n=len(answers),
        part_ms=plane.added_ms(answered)
        | {name: _quantiles(of, 50, 99) for name, of in own_ms.items() if of},
        deepest={column: n / len(answers) for column, n in deepest.items()},
    )


def blocks(n_rounds: int, size: int) -> list[tuple[str, int]]:
    """Which arm is next, and for how many silences: in turn, until each has had all of its own."""
    sizes = [min(size, n_rounds - done) for done in range(0, n_rounds, size)]
    return [(arm, n) for n in sizes for arm in ARMS]


def judged(rounds: Sequence[Round], budget_ms: float) -> dict[str, Any]:
    """What each arm showed in the rounds that are not void: every first answer, and all of them [ms]."""
    arms = {}
    for arm in ARMS:
        own = [one for one in rounds if one.arm == arm]
        counted = [one for one in own if one.is_valid]
        asked_ms = np.array([ms for one in counted for ms in one.latency_ms])
        first_ms = [one.latency_ms[0] for one in counted if not math.isnan(one.latency_ms[0])]
        arms[arm] = {
            "n_rounds": len(counted),
            "n_void": len(own) - len(counted),
            "first_ms": first_ms,
            "first": _quantiles(first_ms, 50, 100),
            "n": len(asked_ms),
            "attainment": float(np.mean(asked_ms <= budget_ms)) if counted else math.nan,
            "n_unanswered": int(np.isnan(asked_ms).sum()),
            "all": _quantiles(asked_ms[~np.isnan(asked_ms)].tolist(), 50, 99, 99.9),
        }
    return arms


def _quantiles(values: Sequence[float], *percents: float) -> dict[str, float]:
    return {f"p{each:g}": float(np.percentile(values, each)) if values else math.nan for each in percents}


@contextlib.contextmanager
def watching() -> Iterator[Callable[[], dict[str, float]]]:
    """Ask nvidia-smi again and again, in a process of its own.

    Yields:
        To be called afterwards: the mean of each of `SMI_FIGURES`, of the GPU that was busiest. Empty without
        nvidia-smi.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        yield dict
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.csv")
        with rows.open("w") as file:  # read by another handle: one that both share has one place for both
            watcher = subprocess.Popen(  # noqa: S603 - NVIDIA's own program
                [
                    program,
                    f"--query-gpu=index,{','.join(SMI_FIGURES)}",
                    "--format=csv,noheader,nounits",
                    f"--loop-ms={SMI_EVERY_MS}",
                ],
                stdout=file,
                stderr=subprocess.DEVNULL,
            )
        try:
            yield lambda: _means(rows)
        finally:
            watcher.terminate()
            watcher.wait()


def _means(rows: Path) -> dict[str, float]:
    by_gpu: dict[str, list[list[float]]] = defaultdict(list)
    for row in csv.reader(rows.read_text().splitlines()):
        if len(row) == 1 + len(SMI_FIGURES):  # the last line may be cut short
            by_gpu[row[0]].append([_number(value) for value in row[1:]])
    means = [np.mean(told, axis=0).tolist() for told in by_gpu.values()]
    busiest: list[float] = max(means, default=[])
    return dict(zip(SMI_FIGURES.values(), busiest, strict=False))


def _number(text: str) -> float:
    """What a GPU does not tell, such as `[N/A]`, is NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class Bench:
    """What all measurements have in common.

    Args:
        chosen: As on the command line.
        folder: For the logs of servers, and the profile that they share.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self._chosen = chosen
        self._folder = folder
        self._rng = np.random.default_rng(chosen.seed)

    def latencies_ms(self, **settings: str) -> dict[str, Any]:
        """By column and batch size, as `python -m service profile` measures them [ms].

        Raises:
            RuntimeError: it failed; its own words are in the message.
        """
        measuring = {
            "profile_seconds": f"{self._chosen.profile_seconds:g}",
            "profile_quantile": f"{PROFILE_QUANTILE:g}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "service", "profile", "--json"],
            env={**os.environ, **self._environment(measuring | settings)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        measured: dict[str, Any] = json.loads(done.stdout)
        return measured

    @contextlib.contextmanager
    def serving(self, name: str, **settings: str) -> Iterator[tuple[str, Pictures]]:
        """A server with these settings: its address, and what can be sent to it.

        Raises:
            RuntimeError: it did not start, runs elsewhere than it was to, or went; with the end of its log.
        """
        chosen = self._chosen
        log = self._folder / f"{name}.log"
        environment = self._environment(settings)
        try:
            with plane.serving("anytime", chosen.artifact, log, environment, chosen.start_limit_s) as server:
                target = Target(server.url)
                _demand(chosen.provider, target)
                yield server.url, target.pictures(chosen.data)
        except (OSError, RuntimeError) as error:
            said = log.read_text().splitlines()[-LOG_LINES:]
            raise RuntimeError("\n".join([str(error), *said])) from error

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """All servers share a profile: it is measured once, and all plan with the same latencies."""
        own = {
            "artifact": str(self._chosen.artifact),
            "provider": self._chosen.provider,
            "batch_sizes": self._chosen.batch_sizes,
            "profile_cache": str(self._folder / "profiles"),
        }
        return {f"ANYTIME_{name.upper()}": value for name, value in (own | dict(settings)).items()}

    def offer(
        self, url: str, pictures: Pictures, at_s: Sequence[float] | Any
    ) -> tuple[list[Reply], records.Summary]:
        """Send requests when they are due, all with the one budget; what became of them."""
        budgets_s = [self._chosen.budget_ms / 1e3]
        arrivals = schedules.schedule(
            np.asarray(at_s, np.float64), budgets_s=budgets_s, n_images=len(pictures), rng=self._rng
        )
        replies = plane.offer(url, arrivals, pictures.bodies)
        labels = np.array(pictures.labels or np.zeros(len(pictures)), np.int64)
        return replies, records.summary(plane.record(replies, arrivals, labels))

    def after_silence(self, url: str, pictures: Pictures, arm: str) -> Round:
        """Be silent, then send some requests one by one."""
        time.sleep(self._chosen.idle_s)
        replies, seen = self.offer(url, pictures, np.arange(self._chosen.burst) * BURST_EVERY_S)
        latency_ms = [latency_ms_of(reply) if reply.status == 200 else math.nan for reply in replies]
        print(
            f"{arm:>10}: first {latency_ms[0]:.2f} ms, worst {np.nanmax([0, *latency_ms]):.2f} ms"
            f"{_remark(seen.is_valid)}",
            flush=True,
        )
        return Round(arm, latency_ms, seen.is_valid)

    def step(self, url: str, pictures: Pictures, rate_hz: float) -> Step:
        """Offer a load in which requests come independently of each other."""
        time.sleep(plane.SETTLE_S)
        at_s = schedules.poisson(rate_hz, self._chosen.seconds, rng=self._rng)
        with watching() as gpu:
            replies, seen = self.offer(url, pictures, at_s)
            figures = gpu()
        late = [reply for reply in replies if latency_ms_of(reply) > self._chosen.budget_ms]
        step = Step(
            rate_hz=round(rate_hz, 1),
            attainment=seen.attainment,
            accuracy=seen.accuracy if pictures.is_labelled else math.nan,
            latency_ms={name: value * 1e3 for name, value in seen.latency_s.items()},
            outcomes=seen.outcomes,
            columns=seen.columns,
            splits={"all": split(replies), "late": split(late)},
            gpu=figures,
            is_valid=seen.is_valid,
        )
        busy = f"GPU busy {figures.get('busy_percent', math.nan):.0f} %"
        print(
            f"{rate_hz:8.0f} requests/s: {step.attainment:7.2%} in time, "
            f"p99 {step.latency_ms['p99']:.2f} ms, {busy}{_remark(step.is_valid)}",
            flush=True,
        )
        return step


def _demand(provider: str, target: Target) -> None:
    if target.model["provider"] != provider:
        raise RuntimeError(f"the server runs on {target.model['provider']}, not on {provider}")


def latency_ms_of(reply: Reply) -> float:
    """From the due time to the last byte read; NaN without a response."""
    return (reply.done_s - reply.due_s) * 1e3


def _remark(is_valid: bool) -> str:
    return "" if is_valid else ", INVALID: the generator was late"


# ---- the parts ----


def latencies(bench: Bench, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The first question; yields what there is of the answer so far, as the others do."""
    print("Latencies by column and batch size.", flush=True)
    found = {}
    for name, settings in ways(chosen.provider).items():
        found[name] = bench.latencies_ms(**settings)
        yield {"latency_ms": found}


def ways(provider: str) -> dict[str, dict[str, str]]:
    """The settings that the latencies of one run are measured with, by a name for each."""
    if provider == "cuda":
        return {"CUDA graphs": {}, "no graphs": {"cuda_graphs": "false"}}
    return {provider: {}}


def load(bench: Bench, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The second question."""
    print(f"Load after load, {chosen.budget_ms:g} ms each.", flush=True)
    with bench.serving("load") as (url, pictures):
        for steps, why in climb(
            partial(bench.step, url, pictures),
            start_hz=chosen.start_rate,
            factor=chosen.factor,
            share=chosen.share,
            n_steps=chosen.steps,
        ):
            held = best(steps, chosen.share)
            found = {"steps": [asdict(step) for step in steps], "ended_by": why}
            yield {"load": found | {"best": asdict(held) if held else None}}


def silence(bench: Bench, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The third question: a server for each block, since two at a time would share the GPU."""
    print(f"After {chosen.idle_s:g} s of silence.", flush=True)
    keep_warm_ms = {ARMS[0]: f"{chosen.keep_warm_ms:g}", ARMS[1]: "0"}
    rounds: list[Round] = []
    for i, (arm, n_rounds) in enumerate(blocks(chosen.idle_rounds, chosen.block)):
        with bench.serving(f"silence-{i}", keep_warm_ms=keep_warm_ms[arm]) as (url, pictures):
            for _ in range(n_rounds):
                rounds.append(bench.after_silence(url, pictures, arm))
                arms = judged(rounds, chosen.budget_ms)
                yield {"silence": {"arms": arms, "rounds": [asdict(one) for one in rounds]}}


PARTS = {"latencies": latencies, "load": load, "silence": silence}


def expected_s(chosen: argparse.Namespace) -> float:
    """How long all of what was asked for takes at most, if every server starts in `START_S` [s]."""
    n_starts = len(blocks(chosen.idle_rounds, chosen.block))
    round_s = chosen.idle_s + chosen.burst * BURST_EVERY_S
    parts_s: dict[str, float] = {
        "latencies": len(ways(chosen.provider)) * (START_S + chosen.profile_seconds),
        "load": START_S + chosen.steps * (plane.SETTLE_S + chosen.seconds),
        "silence": n_starts * START_S + len(ARMS) * chosen.idle_rounds * round_s,
    }
    return sum(parts_s[part] for part in chosen.parts)


def measure(bench: Bench, chosen: argparse.Namespace, head: Mapping[str, Any]) -> dict[str, Any]:
    """Answer the questions that were asked, and write all that is known after each step."""
    asked = [part for part in PARTS if part in chosen.parts]
    found: dict[str, Any] = {**head, "failed": {}, "unfinished": list(asked), "took_s": {}}

    def write() -> None:
        if chosen.out:
            gpu_page.write(chosen.out, found)

    write()
    for part in asked:
        started_s = time.monotonic()
        try:
            for so_far in PARTS[part](bench, chosen):
                found.update(so_far)
                write()
        except Exception as error:  # noqa: BLE001 - whatever it was, the other parts can still be measured
            traceback.print_exc()
            found["failed"][part] = str(error)
        found["took_s"][part] = round(time.monotonic() - started_s, 1)
        found["unfinished"].remove(part)
        write()
    return found


def about(chosen: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What has to be known beside the figures."""
    manifest = json.loads((chosen.artifact / "manifest.json").read_text())
    program = shutil.which("nvidia-smi")
    gpus = []
    if program:
        query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - NVIDIA's own
        gpus = said.stdout.strip().splitlines()
    return {
        "command": "python -m loadtests.gpu " + " ".join(arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "provider": chosen.provider,
        "gpus": gpus,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "commit": chosen.commit or commit(),
        "artifact": manifest["name"],
        "version": manifest["version"],
        "precision": manifest["source"].get("exported_with", {}).get("precision", "precision unknown"),
        "budget_ms": chosen.budget_ms,
        "share": chosen.share,
        "idle_s": chosen.idle_s,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=("cuda", "tensorrt", "cpu"), default="cuda")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py, to tell accuracy")
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        help=f"which questions, with commas: {', '.join(PARTS)}",
    )
    short = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"as {short}, unless they are given")
    parser.add_argument("--batch-sizes", default="", help="with commas; the server's own if not given")
    parser.add_argument("--profile-seconds", type=float, default=30.0, help="for latencies of one run")
    parser.add_argument("--budget-ms", type=float, default=5.0)
    parser.add_argument("--share", type=float, default=0.99, help="that has to be answered in time")
    parser.add_argument("--start-rate", type=float, default=200.0, help="requests/s of the first step")
    parser.add_argument("--factor", type=float, default=1.5, help="from each step to the next")
    parser.add_argument("--steps", type=int, default=16, help="at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a step")
    parser.add_argument("--idle-s", type=float, default=10.0, help="length of a silence")
    parser.add_argument("--idle-rounds", type=int, default=20, help="silences, kept warm and left alone each")
    parser.add_argument("--block", type=int, default=4, help="silences of one kind in a row, of one server")
    parser.add_argument("--burst", type=int, default=50, help="requests after each")
    parser.add_argument("--keep-warm-ms", type=float, default=100.0, help="of the server that is kept warm")
    parser.add_argument("--start-limit-s", type=float, default=600.0, help="TensorRT builds for minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md, again after each step")
    return parser


def _parts(text: str) -> list[str]:
    asked = text.split(",")
    if unknown := [part for part in asked if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is called {unknown[0]!r}: use {', '.join(PARTS)}")
    return asked


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; what --quick stands for gives way to what is given."""
    parser = _parser()
    usual_s = expected_s(parser.parse_args([]))
    quick_s = expected_s(parser.parse_args([], argparse.Namespace(**QUICK)))
    parser.epilog = f"With a GPU this takes about {usual_s / 60:.0f} minutes, --quick {quick_s / 60:.1f}."
    chosen = parser.parse_args(arguments)
    return parser.parse_args(arguments, argparse.Namespace(**QUICK)) if chosen.quick else chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 1 if a part failed."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = read(given)
    print(f"This takes about {expected_s(chosen) / 60:.1f} minutes.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Bench(chosen, Path(folder)), chosen, about(chosen, given))
    print(gpu_page.page(found))
    if found["failed"]:
        print(f"Failed: {', '.join(found['failed'])}. The figures of the others hold.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Whoever ends this, `timeout` for one, does not leave a server on the GPU.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
