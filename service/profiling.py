"""How long each column takes at each batch size on this machine, measured once and remembered.

Must not know of requests. Measures through the processor that serves, so that handing a run to its thread and
waking up for its result count: for a small network they cost more than the run.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from service import providers
from service.engine import Processor
from service.inference import Inference
from service.latency import Latency, LatencyProfile

logger = logging.getLogger(__name__)

MIN_RUNS = 5
MAX_RUNS = 400
"""Enough for a steady 0.95 quantile (20 runs above it); more only costs start-up time."""


CHECK_SECONDS = 0.2
"""Time for checking a remembered profile, all columns together."""

QUIET = (0.1, 0.2)
"""Quantiles that count as median and high where others are served meanwhile: much of what a run takes then
is theirs. The quickest tenth is nearest to what the machine would take alone; how much more it takes beside
others is learnt from the first requests on. Larger: the new version refuses whom it could answer, until it
has learnt better."""

TOLERANCE = 1.5
"""A remembered median that is off by more than this factor, either way, is of another machine in effect:
other neighbours, another power mode, fewer cores. Not yet tuned."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


async def measure(
    inference: Inference,
    processor: Processor,
    *,
    batch_sizes: Sequence[int],
    quantile: float,
    seconds: float,
    rest: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """Measure the median and a high quantile for every column and batch size.

    Args:
        inference: Warmed up; says what to measure.
        processor: What will run it when serving.
        batch_sizes: Sizes to measure, 1 among them.
        quantile: Which quantile to call high.
        seconds: Time for all of it, shared equally; exceeded only by what the least number of runs takes.
        rest: How long to pause after each run, in durations of the run; counts as time. Above 0 where others
            are served meanwhile.
        clock: Monotonic time [s].
    """
    spec = inference.manifest.input
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (spec.height, spec.width, spec.channels), np.uint8)
    pairs = [(rung.column, size) for rung in inference.manifest.rungs for size in batch_sizes]
    latencies: dict[str, dict[int, Latency]] = {}
    for column, size in pairs:
        runs_s: list[float] = []
        until_s = clock() + seconds / len(pairs)
        while len(runs_s) < MIN_RUNS or (len(runs_s) < MAX_RUNS and clock() < until_s):
            started_s = clock()
            await processor.start(column, [image_HWC] * size)
            runs_s.append(clock() - started_s)
            if rest:
                await asyncio.sleep(rest * runs_s[-1])
        wanted = QUIET if rest else [0.5, quantile]
        median_s, high_s = np.quantile(runs_s, wanted).tolist()
        latencies.setdefault(column, {})[size] = Latency(median_s, high_s)
    return LatencyProfile(latencies)


async def recall_or_measure(
    inference: Inference,
    processor: Processor,
    *,
    batch_sizes: Sequence[int],
    quantile: float,
    seconds: float,
    intra_op_threads: int,
    cache: Path | None,
    rest: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """The remembered profile of this artifact on this machine, or a new one. Arguments as for `measure`.

    What is remembered is checked by a few runs first: a machine may have become faster or slower since.
    A cache that cannot be read counts as none; one that cannot be written is reported and does no other harm.
    What was measured beside serving is not remembered.
    """
    key = {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": _cpu_quota(),
        "onnxruntime": onnxruntime.__version__,
        "provider": inference.provider,
        "gpu": _gpu(inference),
        "intra_op_threads": intra_op_threads,
        "artifact": inference.sha256,
        "batch_sizes": list(batch_sizes),
        "quantile": quantile,
    }
    path = cache and cache / f"profile-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    measure_here = partial(measure, inference, processor, quantile=quantile, rest=rest, clock=clock)
    if path and (profile := _recall(path, key)):
        now = await measure_here(batch_sizes=(1,), seconds=CHECK_SECONDS)
        if _agree(profile, now):
            logger.info("Latencies recalled from %s (delete it to measure again).", path)
            return profile
        logger.info("The latencies remembered in %s no longer hold.", path)
    logger.info("Measuring latencies on this machine for about %.0f s.", seconds)
    profile = await measure_here(batch_sizes=batch_sizes, seconds=seconds)
    if path and not rest:
        _remember(path, key, profile)
    return profile


def _agree(remembered: LatencyProfile, now: LatencyProfile) -> bool:
    """Whether the median of one image is about the same for every column."""
    ratios = (by_size[1].median_s / remembered.latency(column, 1).median_s for column, by_size in now.items())
    return all(1 / TOLERANCE <= ratio <= TOLERANCE for ratio in ratios)


def _recall(path: Path, key: dict[str, object]) -> LatencyProfile | None:
    try:
        stored = json.loads(path.read_bytes())
        if stored["key"] != key:
            return None
        latencies = {
            column: {
                int(size): Latency(float(median_s), float(high_s))
                for size, (median_s, high_s) in sizes.items()
            }
            for column, sizes in stored["latencies_s"].items()
        }
        if not all(
            0 < latency.median_s <= latency.high_s < math.inf
            for by_size in latencies.values()
            for latency in by_size.values()
        ):
            return None
        return LatencyProfile(latencies)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The remembered latencies in %s are unreadable (%s): measuring again.", path, error)
        return None


def _remember(path: Path, key: dict[str, object], profile: LatencyProfile) -> None:
    latencies_s = {
        column: {str(size): (latency.median_s, latency.high_s) for size, latency in by_size.items()}
        for column, by_size in profile.items()
    }
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"key": key, "latencies_s": latencies_s}, indent=1))
        beside.replace(path)  # another server on this machine never reads half a file
    except OSError as error:
        logger.warning(
            "Latencies cannot be remembered in %s (%s): every start will measure them.", path, error
        )


def _cpu_quota() -> str | None:
    """What a container may use of its cores; None where nothing says so."""
    try:
        return CPU_QUOTA.read_text().strip()
    except OSError:
        return None


def _gpu(inference: Inference) -> dict[str, object] | None:
    """What the latencies on a GPU depend on; None where none is used."""
    if inference.gpu is None:
        return None
    options = asdict(inference.gpu)
    del options["tensorrt_cache"]
    return {"names": providers.gpus(), "chosen": os.environ.get("CUDA_VISIBLE_DEVICES"), **options}


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
