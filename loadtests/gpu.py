"""Measures what a GPU is worth to callers with a deadline; one command, end to end.

    python -m loadtests.gpu --provider cuda --data data --out loadtests/results/gpu

Three questions, each to servers that this starts on this machine and stops again:

1. How long does each column take at each batch size, with CUDA graphs and without?
2. How many requests per second, each granting `--budget-ms`, are answered in time, until fewer than `--share`
   are? The load rises by a factor from step to step, and the last rise is halved some times. How busy is the
   GPU then?
3. What does a caller wait who comes after `--idle-s` of silence, with the run that keeps the GPU warm and
   without?

`--provider cpu` runs all of it where there is no GPU, to see that it works; its figures say nothing of one.
Knows the service only over HTTP and its command line.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import arrivals as schedules
from loadtests import plane, records
from loadtests.arrivals import Arrivals
from loadtests.offline import processor_name
from loadtests.targets import Pictures, Target

N_HALVINGS = 3
"""How often the last rise is halved. More: the rate is known better, by half each time; a step each."""
PARTS = ("latencies", "load", "silence")
PROFILE_QUANTILE = 0.99
BURST_EVERY_S = 0.02
"""Between the requests after a silence [s]: longer than any answer in time takes, so that each is alone."""
SMI_EVERY_MS = 200
SMI_FIGURES = {
    "utilization.gpu": "busy_percent",
    "clocks.sm": "clock_mhz",
    "power.draw": "power_w",
    "memory.used": "memory_mib",
}
"""What nvidia-smi, which asks NVML, calls them, and what they are called here."""


@dataclass(frozen=True)
class Step:
    """One load.

    Attributes:
        rate_hz: Requests offered per second.
        attainment: Share of them that were answered within their budget, by the client's clock.
        accuracy: Share of right ones among those; NaN if the pictures have no labels.
        latency_ms: p50, p95, p99, p99.9 of the answers.
        rejected: Share that was refused.
        columns: Share of each set of columns among the answers.
        gpu: Means of what nvidia-smi said meanwhile; empty without it.
        is_valid: The generator kept up.
    """

    rate_hz: float
    attainment: float
    accuracy: float
    latency_ms: Mapping[str, float]
    rejected: float
    columns: Mapping[str, float]
    gpu: Mapping[str, float]
    is_valid: bool


def climb(
    offered: Callable[[float], Step], *, start_hz: float, factor: float, share: float, n_steps: int
) -> tuple[list[Step], str]:
    """Raise the load until too few are answered in time, then halve the last rise.

    Args:
        offered: Offers a load of this rate and says what came of it.
        start_hz: First rate.
        factor: From each rate to the next, above 1.
        share: What has to be answered in time.
        n_steps: At most.

    Returns:
        Every step in the order made, and why it ended there: `attainment`, `generator` (it could not send any
        faster) or `steps`.
    """
    steps: list[Step] = []
    held_hz, too_much_hz = 0.0, math.inf
    rate_hz, why = start_hz, "steps"
    n_halvings = 0
    while len(steps) < n_steps and n_halvings <= N_HALVINGS:
        step = offered(rate_hz)
        was_late = bool(steps) and steps[-1].rate_hz == step.rate_hz
        steps.append(step)
        if not step.is_valid and not was_late:
            continue  # once may be an accident
        if step.is_valid and step.attainment >= share:
            held_hz = rate_hz
        else:
            too_much_hz, why = rate_hz, "attainment" if step.is_valid else "generator"
        if too_much_hz == math.inf:
            rate_hz *= factor
        else:
            n_halvings += 1
            rate_hz = math.sqrt(held_hz * too_much_hz) if held_hz else too_much_hz / factor
    return steps, why


def best(steps: Sequence[Step], share: float) -> Step | None:
    """The largest load that was answered in time, if any was."""
    held = [step for step in steps if step.is_valid and step.attainment >= share]
    return max(held, key=lambda step: step.rate_hz, default=None)


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
        logs: Where servers write.
    """

    def __init__(self, chosen: argparse.Namespace, logs: Path) -> None:
        self._chosen = chosen
        self._logs = logs
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
            RuntimeError: it did not start, or runs elsewhere than it was to.
        """
        chosen = self._chosen
        log = self._logs / f"{name}.log"
        with plane.serving(
            "anytime", chosen.artifact, log, self._environment(settings), chosen.start_limit_s
        ) as server:
            target = Target(server.url)
            if target.model["provider"] != chosen.provider:
                raise RuntimeError(f"the server runs on {target.model['provider']}, not on {chosen.provider}")
            yield server.url, target.pictures(chosen.data)

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        own = {
            "artifact": str(self._chosen.artifact),
            "provider": self._chosen.provider,
            "batch_sizes": self._chosen.batch_sizes,
            "profile_cache": "",
        }
        return {f"ANYTIME_{name.upper()}": value for name, value in (own | dict(settings)).items()}

    def offer(self, url: str, pictures: Pictures, at_s: Sequence[float] | Any) -> records.Summary:
        """Send requests when they are due, all with the one budget; what became of them."""
        arrivals = self._arrivals(pictures, at_s)
        labels = np.array(pictures.labels or np.zeros(len(pictures)), np.int64)
        return records.summary(plane.record(plane.offer(url, arrivals, pictures.bodies), arrivals, labels))

    def after_silence(self, url: str, pictures: Pictures) -> dict[str, Any]:
        """Be silent, then send some requests one by one; again and again [ms]."""
        chosen = self._chosen
        first_ms: list[float] = []
        all_ms: list[float] = []
        n_in_time = n = 0
        for _ in range(chosen.idle_rounds):
            time.sleep(chosen.idle_s)
            arrivals = self._arrivals(pictures, np.arange(chosen.burst) * BURST_EVERY_S)
            replies = plane.offer(url, arrivals, pictures.bodies)
            took_ms = [(reply.done_s - reply.due_s) * 1e3 for reply in replies if reply.status == 200]
            n += len(replies)
            n_in_time += sum(ms <= chosen.budget_ms for ms in took_ms)
            all_ms += took_ms
            if replies[0].status == 200:
                first_ms.append((replies[0].done_s - replies[0].due_s) * 1e3)
        return {
            "n": n,
            "attainment": n_in_time / n,
            "n_refused": n - len(all_ms),
            "first_ms": _quantiles(first_ms, (0.5, 1.0)),
            "all_ms": _quantiles(all_ms, (0.5, 0.99, 0.999)),
        }

    def _arrivals(self, pictures: Pictures, at_s: Sequence[float] | Any) -> Arrivals:
        budgets_s = [self._chosen.budget_ms / 1e3]
        return schedules.schedule(
            np.asarray(at_s, np.float64), budgets_s=budgets_s, n_images=len(pictures), rng=self._rng
        )

    def step(self, url: str, pictures: Pictures, rate_hz: float) -> Step:
        """Offer a load in which requests come independently of each other."""
        time.sleep(plane.SETTLE_S)
        at_s = schedules.poisson(rate_hz, self._chosen.seconds, rng=self._rng)
        with watching() as gpu:
            seen = self.offer(url, pictures, at_s)
            figures = gpu()
        step = Step(
            rate_hz=round(rate_hz, 1),
            attainment=seen.attainment,
            accuracy=seen.accuracy if pictures.is_labelled else math.nan,
            latency_ms={name: value * 1e3 for name, value in seen.latency_s.items()},
            rejected=seen.outcomes["rejected"],
            columns=seen.columns,
            gpu=figures,
            is_valid=seen.is_valid,
        )
        busy = f"GPU busy {figures.get('busy_percent', math.nan):.0f} %"
        remark = "" if step.is_valid else ", INVALID: the generator was late"
        print(
            f"{rate_hz:8.0f} requests/s: {step.attainment:7.2%} in time, "
            f"p99 {step.latency_ms['p99']:.2f} ms, {busy}{remark}",
            flush=True,
        )
        return step


def _quantiles(values: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    return {f"{q:g}": float(np.quantile(values, q)) if values else math.nan for q in wanted}


def measure(bench: Bench, chosen: argparse.Namespace) -> dict[str, Any]:
    """Answer the questions that were asked."""
    found: dict[str, Any] = {}
    if "latencies" in chosen.parts:
        print("Latencies by column and batch size.", flush=True)
        ways = {"CUDA graphs": {}, "no graphs": {"cuda_graphs": "false"}}
        if chosen.provider != "cuda":
            ways = {chosen.provider: {}}
        found["latency_ms"] = {name: bench.latencies_ms(**settings) for name, settings in ways.items()}
    if "load" in chosen.parts:
        print(f"Rising load, {chosen.budget_ms:g} ms each.", flush=True)
        with bench.serving("load") as (url, pictures):
            steps, why = climb(
                lambda rate_hz: bench.step(url, pictures, rate_hz),
                start_hz=chosen.start_rate,
                factor=chosen.factor,
                share=chosen.share,
                n_steps=chosen.steps,
            )
        found["load"] = {"steps": [asdict(step) for step in steps], "ended_by": why}
        held = best(steps, chosen.share)
        found["load"]["best"] = asdict(held) if held else None
    if "silence" in chosen.parts:
        found["silence"] = {}
        for name, keep_warm_ms in (("kept warm", f"{chosen.keep_warm_ms:g}"), ("left alone", "0")):
            print(f"After {chosen.idle_s:g} s of silence, {name}.", flush=True)
            with bench.serving(f"idle-{keep_warm_ms}", keep_warm_ms=keep_warm_ms) as (url, pictures):
                found["silence"][name] = bench.after_silence(url, pictures)
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
        "artifact": f"{manifest['name']} {manifest['version']}",
        "precision": manifest["source"].get("exported_with", {}).get("precision", "precision unknown"),
    }


def page(head: Mapping[str, Any], found: Mapping[str, Any], chosen: argparse.Namespace) -> str:
    """The figures as Markdown."""
    where = ", ".join(head["gpus"]) or "no GPU"
    lines = [
        f"# {head['artifact']} on {head['provider']}",
        "",
        f"{where}; {head['cores']} cores of {head['processor']}; {head['precision']}; {head['date']}.",
        f"`{head['command']}`",
        "",
    ]
    if "latency_ms" in found:
        lines += ["## One run", "", *_latency_lines(found["latency_ms"]), ""]
    if "load" in found:
        title = f"## Answers within {chosen.budget_ms:g} ms"
        lines += [title, "", *_load_lines(found["load"], chosen.share), ""]
    if "silence" in found:
        lines += [f"## After {chosen.idle_s:g} s of silence", "", *_silence_lines(found["silence"]), ""]
    return "\n".join(lines)


def _latency_lines(measured: Mapping[str, Any]) -> list[str]:
    heads = [f"{name}: {what}" for name in measured for what in ("median, ms", "p99, ms", "images/s")]
    lines = _table_head(["column", "batch", *heads])
    first = next(iter(measured.values()))
    for column, by_size in first.items():
        for size in by_size:
            cells = []
            for one in measured.values():
                latency = one[column][size]
                rate_hz = int(size) / latency["median"] * 1e3
                cells += [f"{latency['median']:.3f}", f"{latency['high']:.3f}", f"{rate_hz:,.0f}"]
            lines.append(_row([column, size, *cells]))
    return lines


def _load_lines(load: Mapping[str, Any], share: float) -> list[str]:
    heads = ["requests/s", "in time, %", "right of those, %", "p50, ms", "p99, ms", "refused, %"]
    lines = _table_head([*heads, "GPU busy, %", "power, W", "columns"])
    for step in sorted(load["steps"], key=lambda step: step["rate_hz"]):
        latency, gpu = step["latency_ms"], step["gpu"]
        columns = sorted(step["columns"].items(), key=lambda item: -item[1])
        cells = [
            f"{step['rate_hz']:,.0f}" + ("" if step["is_valid"] else " (generator too slow)"),
            *(_text(step[name] * 100, 2) for name in ("attainment", "accuracy")),
            *(_text(latency[name], 2) for name in ("p50", "p99")),
            _text(step["rejected"] * 100, 2),
            *(_text(gpu.get(name, math.nan), 0) for name in ("busy_percent", "power_w")),
            ", ".join(f"{name} {part:.0%}" for name, part in columns[:3]),
        ]
        lines.append(_row(cells))
    held = load["best"]
    verdict = f"No load was answered in time for {share:.0%}."
    if held:
        verdict = f"{held['rate_hz']:,.0f} requests/s are answered in time for {share:.0%} of them or more."
    limit = {
        "attainment": "Beyond that they are not.",
        "generator": "Beyond that the generator could not send on time: the server was not at its limit.",
        "steps": "The steps were used up: the server was not at its limit.",
    }
    return [*lines, "", f"{verdict} {limit[load['ended_by']]}"]


def _silence_lines(silence: Mapping[str, Any]) -> list[str]:
    heads = ["n", "in time, %", "refused", "first, median, ms", "first, worst, ms"]
    lines = _table_head(["", *heads, "all, p50, ms", "all, p99, ms", "all, p99.9, ms"])
    for name, one in silence.items():
        figures = [*one["first_ms"].values(), *one["all_ms"].values()]
        in_time = _text(one["attainment"] * 100, 2)
        row = [name, str(one["n"]), in_time, str(one["n_refused"]), *(_text(ms, 2) for ms in figures)]
        lines.append(_row(row))
    return lines


def _text(value: float, n_digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{n_digits}f}"


def _table_head(names: Sequence[str]) -> list[str]:
    return [_row(names), _row(["---:"] * len(names))]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=("cuda", "tensorrt", "cpu"), default="cuda")
    parser.add_argument("--artifact", type=Path, default=Path("model/pretrained"), help="what is served")
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py, to tell accuracy")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"which questions, with commas: {', '.join(PARTS)}",
    )
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64", help="with commas")
    parser.add_argument("--profile-seconds", type=float, default=30.0, help="for latencies of one run")
    parser.add_argument("--budget-ms", type=float, default=5.0)
    parser.add_argument("--share", type=float, default=0.99, help="that has to be answered in time")
    parser.add_argument("--start-rate", type=float, default=200.0, help="requests/s of the first step")
    parser.add_argument("--factor", type=float, default=1.5, help="from each step to the next")
    parser.add_argument("--steps", type=int, default=16, help="at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a step")
    parser.add_argument("--idle-s", type=float, default=10.0, help="length of a silence")
    parser.add_argument("--idle-rounds", type=int, default=20, help="silences")
    parser.add_argument("--burst", type=int, default=50, help="requests after each")
    parser.add_argument("--keep-warm-ms", type=float, default=100.0, help="of the server that is kept warm")
    parser.add_argument("--start-limit-s", type=float, default=600.0, help="TensorRT builds for minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    chosen = parser.parse_args(arguments)
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}: use {', '.join(PARTS)}")
    head = about(chosen, sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(Bench(chosen, Path(folder)), chosen)
        except RuntimeError as error:
            logs = "\n".join(log.read_text() for log in sorted(Path(folder).glob("*.log")))
            print(f"{error}\n{logs}", file=sys.stderr)
            return 1
    text = page(head, found, chosen)
    print(text)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.with_suffix(".json").write_text(json.dumps(head | found, indent=1) + "\n")
        chosen.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
