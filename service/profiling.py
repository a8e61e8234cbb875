"""How long each column takes at each batch size on this machine, measured once and remembered.

Must not know of requests. Measures through the processor that serves, so that handing a run to its thread and
waking up for its result count: for a small network they cost more than the run.
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from service.engine import Processor
from service.inference import Inference
from service.scheduling import Latency, LatencyProfile

logger = logging.getLogger(__name__)

MIN_RUNS = 5
MAX_RUNS = 400
"""Enough for a steady 0.95 quantile (20 runs above it); more only costs start-up time."""


async def measure(
    inference: Inference, processor: Processor, *, batch_sizes: Sequence[int], quantile: float, seconds: float
) -> LatencyProfile:
    """Measure the median and a high quantile for every column and batch size.

    Args:
        inference: Warmed up; says what to measure.
        processor: What will run it when serving.
        batch_sizes: Sizes to measure, 1 among them.
        quantile: Which quantile to call high.
        seconds: Time for all of it, shared equally; exceeded only by what the least number of runs takes.
    """
    spec = inference.manifest.input
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (spec.height, spec.width, spec.channels), np.uint8)
    pairs = [(rung.column, size) for rung in inference.manifest.rungs for size in batch_sizes]
    latencies: dict[str, dict[int, Latency]] = {}
    for column, size in pairs:
        runs_s: list[float] = []
        until_s = time.perf_counter() + seconds / len(pairs)
        while len(runs_s) < MIN_RUNS or (len(runs_s) < MAX_RUNS and time.perf_counter() < until_s):
            started_s = time.perf_counter()
            await processor.start(column, [image_HWC] * size)
            runs_s.append(time.perf_counter() - started_s)
        median_s, high_s = np.quantile(runs_s, [0.5, quantile]).tolist()
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
) -> LatencyProfile:
    """The remembered profile of this artifact on this machine, or a new one. Arguments as for `measure`.

    A cache that cannot be read counts as none; one that cannot be written is reported and does no other harm.
    """
    key = {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "provider": inference.provider,
        "intra_op_threads": intra_op_threads,
        "artifact": inference.sha256,
        "batch_sizes": list(batch_sizes),
        "quantile": quantile,
    }
    path = cache and cache / f"profile-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if path and (profile := _recall(path, key)):
        logger.info("Latencies recalled from %s (delete it to measure again).", path)
        return profile
    logger.info("Measuring latencies on this machine for about %.0f s.", seconds)
    profile = await measure(inference, processor, batch_sizes=batch_sizes, quantile=quantile, seconds=seconds)
    if path:
        _remember(path, key, profile)
    return profile


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


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
