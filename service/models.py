"""One loaded artifact that answers requests: its decoder, its queue, and the record that a caller gets.

Must not know of HTTP, gRPC or other models.
"""

import asyncio
import contextlib
import contextvars
import heapq
import logging
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service import inference, profiling, providers
from service.decoding import Decoder
from service.engine import Cancellable, Engine, InferenceThread, Request, Served
from service.errors import STOPPING, CallerGone, Expired, Failed, OutOfRange, Stopped
from service.health import Health
from service.inference import Inference, Manifest, ProviderUnavailable
from service.latency import LatencyProfile, LiveProfile, Reserve
from service.metrics import Metrics, RunTime
from service.policies import named
from service.providers import DeviceLost, GpuOptions, Provider
from service.record import Answer, Record
from service.settings import Settings

logger = logging.getLogger(__name__)

Gone = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Within the context that it gives, it calls back when the caller has gone."""

KEEP_WARM_S = 0.1
"""The setting `keep_warm_ms` where it is empty and a GPU is used. Small convolutional networks were seen to
take many times longer after pauses of 0.2 s (onnxruntime #16135, #13366). Not yet tuned."""

CPU_BATCH_SIZES = (1, 2, 4, 8)
GPU_BATCH_SIZES = (*CPU_BATCH_SIZES, 16, 32, 64)
"""The setting `batch_sizes` where it is empty. On a GPU, 64 images take 1.5 to 1.6 times as long as one.
Source: docs/gpu.md, on an H100."""

MAX_NUMBER_LENGTH = 400
"""Of a number as text; the longest that make sense have some 330. To read one takes 3 ns a character."""

START_PREEMPTION_S = 0.3e-3
"""How long a run goes on that is told to end, until that was seen: a node's time, and waking up."""

NICENESS = 10
"""Of what loads an artifact beside serving: it must not take a core from those who serve."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller may choose."""

    budget_s: float
    top_k: int = 1
    min_confidence: float | None = None


def number(name: str, value: object, least: float, most: float) -> float:
    """A parameter that a caller gave, as a number or as text.

    Raises:
        OutOfRange: it is neither, or out of its bounds.
    """
    given = math.nan
    is_long = isinstance(value, str) and len(value) > MAX_NUMBER_LENGTH
    if isinstance(value, int | float | str) and not isinstance(value, bool) and not is_long:
        with contextlib.suppress(ValueError, OverflowError):
            given = float(value)
    if not least <= given <= most:
        raise OutOfRange(f"{name} must be a number from {least:g} to {most:g}, not {str(value)[:40]!r}.")
    return given


class Model:
    """One version of an artifact, ready to answer.

    Args:
        settings: All bounds and reserves.
        inference: Loaded and warmed up.
        processor: The one thread that runs it; closed with the model.
        profile: Latencies measured in such a thread; where predictions start.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        settings: Settings,
        inference: Inference,
        processor: InferenceThread,
        profile: LatencyProfile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._inference = inference
        self._processor = processor
        self._live_profile = LiveProfile(
            profile,
            settings.profile_quantile,
            preemption_s=START_PREEMPTION_S if inference.is_preemptible else math.inf,
        )
        self._clock = clock
        self._n_inside = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._decoder: Decoder | None = None
        self._engine: Engine | None = None
        self.manifest: Manifest = inference.manifest
        self.name = self.manifest.name
        self.version = self.manifest.version
        self.provider = inference.provider
        self.sha256 = inference.sha256
        self.profile = profile
        self.card = orjson.dumps(_card(settings, inference, profile))

    def open(self, metrics: Metrics, decode_threads: Executor, observe_broken: Callable[[str], None]) -> None:
        """Take requests from now on; in the event loop that serves them.

        Args:
            metrics: Told of every run.
            decode_threads: Decode large pictures.
            observe_broken: Told why no run of this model will succeed any more.
        """
        loop, clock = asyncio.get_running_loop(), self._clock

        # Not by way of `self`: the engine would hold the model that holds it. Such a circle is left to the
        # garbage collector, which does not look at what lived when it was told to freeze (see `Repository`).
        nobodys = (
            contextvars.Context()
        )  # else all that comes of it would be logged as the caller's who began it

        def call_at(when_s: float, callback: Callable[[], None]) -> Cancellable:
            return loop.call_later(max(0.0, when_s - clock()), callback, context=nobodys)

        spec = self.manifest.input
        self._decoder = Decoder(
            height=spec.height,
            width=spec.width,
            max_pixels=self._settings.max_pixels,
            max_decoded_pixels=self._settings.max_decoded_pixels,
            max_values=self._settings.max_values,
            threads=decode_threads,
        )
        self._engine = Engine(
            self._processor,
            named(
                self._settings.policy,
                self._settings.answer_worth,
                self._settings.hope,
                self._settings.refine_below,
            ),
            self._live_profile,
            self.manifest.ladder(),
            clock=self._clock,
            call_at=call_at,
            call_soon=partial(loop.call_soon, context=nobodys),
            call_now=nobodys.run,
            observe_run=metrics.observe_run,
            observe_failed_run=metrics.observe_failed_run,
            observe_preempted_run=metrics.observe_preempted_run,
            observe_saved=metrics.observe_saved,
            observe_broken=observe_broken,
            health=Health(self._settings.failed_runs_until_restart),
            reserve=Reserve(
                self._settings.overhead_reserve_ms / 1e3,
                least_s=self._settings.write_reserve_ms / 1e3,
                most_s=self._settings.max_overhead_reserve_ms / 1e3,
            ),
            brief_s=self._settings.brief_run_ms / 1e3 if self.provider == "cpu" else 0.0,
            keep_warm_s=_keep_warm_s(self._settings, self._inference),
            run_timeout_s=self._settings.run_timeout_s,
            max_waiting=self._settings.max_waiting,
            jitter=lambda: random.uniform(1.0, 1.5),  # noqa: S311 - spreads callers, guards nothing
        )

    @property
    def engine(self) -> Engine:
        """Its queue.

        Raises:
            Stopped: the model takes no requests yet.
        """
        if self._engine is None:
            raise Stopped("This server is not ready: retry in a second.")
        return self._engine

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self._engine is not None and not self._engine.is_stopping

    @property
    def is_running(self) -> bool:
        """A run is in progress, even if nobody waits for it any more."""
        return self._engine is not None and self._engine.is_running

    @property
    def n_waiting(self) -> int:
        """Requests in the queue that are not running."""
        return self._engine.n_waiting if self._engine else 0

    @property
    def reserve_s(self) -> float:
        """What is kept free of a large budget for the answer's way out [s]."""
        return self._engine.reserve_s if self._engine else 0.0

    @property
    def slowdown(self) -> float:
        """How many times longer runs take than when they were measured."""
        return self._live_profile.slowdown

    def run_times(self) -> Iterator[RunTime]:
        """How long runs were measured to take, and are predicted to take now."""
        for column, by_size in self._live_profile.items():
            for size, latency in by_size.items():
                profiled = self.profile.latency(column, size)
                yield RunTime(self.name, self.version, column, size, profiled.median_s, latency.median_s)

    async def answer(
        self, pictures: Sequence[bytes | NDArray[np.uint8]], asked: Asked, *, record: Record, gone: Gone
    ) -> tuple[Answer, ...]:
        """Answer for several pictures that share one budget; all of them, or none.

        Args:
            pictures: PNG, JPEG or WebP files, or image_HWC of the network's size.
            asked: For each of them.
            record: Of the request.
            gone: Says when the caller has gone.

        Raises:
            Problem: one of them got no answer.
            CallerGone: nobody waits for them.

        Cancellation: leaves the queue.
        """
        record.budget_s = asked.budget_s
        deadline_s = record.arrived_s + asked.budget_s
        entered: list[tuple[Request, float]] = []

        def leave() -> None:
            for request, _ in entered:
                self.engine.leave(request)

        with self.inside(record), gone(leave):
            self.engine.check_admission(record.arrived_s, deadline_s, has_waited=record.has_waited)
            try:
                # All before the first is run: together they may share a batch, and one may be no picture.
                decoded = [await self._decoded(picture, deadline_s, record) for picture in pictures]
                is_followed = len(decoded) > 1
                for image_HWC, decode_s in decoded:  # one by one: when one is refused, those before it leave
                    request = self.enter(image_HWC, asked, record, is_followed=is_followed)
                    entered.append((request, decode_s))
                return tuple([Answer(await settled(request), decode_s) for request, decode_s in entered])
            finally:
                leave()

    async def _decoded(
        self, picture: bytes | NDArray[np.uint8], deadline_s: float, record: Record
    ) -> tuple[NDArray[np.uint8], float]:
        if isinstance(picture, bytes):
            return await self.decode("image/png", picture, deadline_s, record)  # or whatever is really inside
        return picture, 0.0

    async def decode(
        self, content_type: str, body: bytes, deadline_s: float, record: Record
    ) -> tuple[NDArray[np.uint8], float]:
        """The image_HWC of a body, and how long that took [s].

        Raises:
            Problem: it is none, or the deadline has come meanwhile.
        """
        assert self._decoder is not None  # noqa: S101 - for the type checker: admission comes first
        started_s = self._clock()
        try:
            image_HWC = self._decoder.decode_raw(content_type, body)
            if image_HWC is None:
                async with asyncio.timeout(deadline_s - started_s):
                    image_HWC = await self._decoder.decode(content_type, body)
        except TimeoutError as error:
            raise self.engine.refusal(
                "The budget was used up while the picture was decoded: grant more or send a smaller one.",
                "decode",
            ) from error
        finally:
            ended_s = self._clock()
            record.decodings.append((started_s, ended_s))
        return image_HWC, ended_s - started_s

    def enter(
        self,
        image_HWC: NDArray[np.uint8],
        asked: Asked,
        record: Record,
        on_rung: Callable[[Served], None] | None = None,
        *,
        is_followed: bool = False,
    ) -> Request:
        """Put an image of the record's request into the queue; as `Engine.submit`."""
        request = self.engine.submit(
            image_HWC,
            arrived_s=record.arrived_s,
            deadline_s=record.arrived_s + asked.budget_s,
            min_confidence=asked.min_confidence,
            has_waited=record.has_waited,
            on_rung=on_rung,
            is_followed=is_followed,
        )
        record.requests.append(request)
        return request

    def document(self, answer: Answer, asked: Asked) -> tuple[bytes, dict[str, Any]]:
        """What a caller is told, as JSON, and how that is judged."""
        record = orjson.dumps(self.record(answer, asked))
        # Decided last: with a large top_k the line above may cost more than the whole reserve.
        verdict = self.verdict(answer.served)
        return record[:-1] + b"," + orjson.dumps(verdict)[1:], verdict

    def record(self, answer: Answer, asked: Asked) -> dict[str, Any]:
        """What a caller is told, `elapsed_ms` and `deadline_met` excepted: see `verdict`."""
        served = answer.served
        assert served.probabilities_K is not None  # noqa: S101 - for the type checker: an answer has them
        labels = self.manifest.labels
        probabilities: list[float] = served.probabilities_K.tolist()
        order = heapq.nlargest(asked.top_k, range(len(probabilities)), key=probabilities.__getitem__)
        top = [{"label": labels[i], "index": i, "probability": probabilities[i]} for i in order]
        return {
            "model": self.name,
            "version": self.version,
            "label": top[0]["label"],
            "index": top[0]["index"],
            "confidence": top[0]["probability"],
            "top": top,
            "column": served.columns_run[-1],
            "depth": self._inference.depth[served.columns_run[-1]],
            **self.progress(answer, asked),
        }

    @staticmethod
    def progress(answer: Answer, asked: Asked) -> dict[str, Any]:
        """What was done for an answer, and why no more."""
        served = answer.served
        return {
            "columns_run": served.columns_run,
            "stopped_by": served.stopped_by,
            "budget_ms": milliseconds(asked.budget_s),
            "timing_ms": {
                "decode": milliseconds(answer.decode_s),
                "queue": milliseconds(served.queue_s),
                "inference": milliseconds(served.inference_s),
            },
        }

    def verdict(self, served: Served) -> dict[str, Any]:
        """How long it took until now, and whether what is written now is in time. To be asked last."""
        now_s = self._clock()
        return {
            "elapsed_ms": milliseconds(now_s - served.arrived_s),
            "deadline_met": now_s + self._settings.write_reserve_ms / 1e3 <= served.deadline_s,
        }

    @contextlib.contextmanager
    def inside(self, record: Record) -> Iterator[None]:
        """Keep the model from being closed meanwhile; the record says that it was asked."""
        record.model, record.version = self.name, self.version
        self._n_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._n_inside -= 1
            if not self._n_inside:
                self._is_empty.set()

    def give_up(self, why: str) -> None:
        """Take no more requests, and turn away those that wait: no run will succeed."""
        if self._engine:
            self._engine.give_up(why)

    async def drain(self) -> None:
        """Let those who are inside have their answers, within the setting `drain_timeout_s`; then close."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._is_empty.wait()
        await self.stop()
        self.close()

    async def stop(self) -> None:
        """Take no more requests and settle those that are here."""
        if self._engine:
            await self._engine.stop(self._settings.drain_timeout_s)

    def close(self, *, keeps_inference: bool = False) -> None:
        """Let the thread end, and its sessions with it unless they are to be kept."""
        self._processor.close(keeps_inference=keeps_inference)


async def settled(request: Request) -> Served:
    """Wait for an answer.

    Raises:
        Problem: there is none.
        CallerGone: nobody waits for it.
    """
    served = await request.settled
    match served.outcome:
        case "answered":
            return served
        case "expired":
            raise Expired(
                "The deadline passed while the request waited: grant a larger budget or retry later."
            )
        case "stopped":
            raise Stopped(STOPPING)
        case "disconnected":
            raise CallerGone
        case _:
            raise Failed(
                "The network could not be run on this picture: retry, and tell the operator if it persists."
            )


async def load(settings: Settings, folder: Path, *, rest: float = 0.0) -> Model:
    """Load, verify, warm up and measure an artifact.

    Args:
        settings: How. The provider `auto` takes the CPU, loudly, where a GPU is there but does not work.
        folder: The artifact.
        rest: How long to pause after each run that is measured, in durations of the run: while a server is
            in use, above 0.

    Raises:
        ArtifactError: the artifact or the provider cannot be used.
        DeviceLost: while a server is in use, the GPU turned out to be lost, to that server as well.
    """
    *preferred, last = providers.candidates(settings.provider)
    for provider in preferred:
        try:
            return await _load_on(provider, settings, folder, rest)
        except ProviderUnavailable as error:
            logger.warning("A GPU is here, but everything will run on the CPU. %s", error)
    return await _load_on(last, settings, folder, rest)


async def _load_on(provider: Provider, settings: Settings, folder: Path, rest: float) -> Model:
    try:
        loaded = await _opened(provider, settings, folder, stands_back=rest > 0)
        return await _measured(settings, loaded, rest)
    except DeviceLost as error:
        if rest:
            raise
        raise inference.unavailable(provider, str(error)) from error


async def _opened(provider: Provider, settings: Settings, folder: Path, *, stands_back: bool) -> Inference:
    # onnxruntime's own threads would stand back for good: they are as nice as the thread that starts them.
    opens_nicely = stands_back and settings.intra_op_threads == 1 and sys.platform == "linux"
    opening = ThreadPoolExecutor(1, "load", _stand_back if opens_nicely else None)
    try:
        return await asyncio.get_running_loop().run_in_executor(
            opening,
            partial(
                inference.load,
                folder,
                provider=provider,
                intra_op_threads=settings.intra_op_threads,
                batch_sizes=_batch_sizes(settings, provider),
                gpu=GpuOptions(
                    cuda_graphs=settings.cuda_graphs,
                    conv_algorithms=settings.cudnn_conv_algo_search,
                    use_tf32=settings.use_tf32,
                    prefer_nhwc=settings.prefer_nhwc,
                    tensorrt_cache=settings.tensorrt_cache,
                ),
            ),
        )
    finally:
        opening.shutdown(wait=False)


async def _measured(settings: Settings, loaded: Inference, rest: float) -> Model:
    batch_sizes = _batch_sizes(settings, loaded.provider)
    # CUDA has handles for each thread, so that the one that serves must be the one that is warmed up.
    is_own = rest > 0 and loaded.provider == "cpu"
    measuring = InferenceThread(loaded, NICENESS if is_own else 0)
    try:
        await measuring.warm_up(batch_sizes)
        profile = await profiling.recall_or_measure(
            loaded,
            measuring,
            batch_sizes=batch_sizes,
            quantile=settings.profile_quantile,
            seconds=settings.profile_seconds,
            intra_op_threads=settings.intra_op_threads,
            cache=settings.profile_cache,
            rest=rest,
        )
    except DeviceLost:
        raise  # the thread stays, with its sessions: to close those of a lost GPU may abort the process
    except BaseException:
        measuring.close()
        raise
    _log(settings, loaded, profile)
    if not is_own:
        return Model(settings, loaded, measuring, profile)
    measuring.close(keeps_inference=True)
    return Model(settings, loaded, InferenceThread(loaded), profile)


def _log(settings: Settings, loaded: Inference, profile: LatencyProfile) -> None:
    manifest = loaded.manifest
    where = ", ".join((loaded.provider, *(providers.gpus() if loaded.gpu else ())))
    logger.info(
        "%s version %s: %d labels, %d columns, running on %s.",
        *(manifest.name, manifest.version, len(manifest.labels), len(manifest.rungs), where),
    )
    for rung in manifest.rungs:
        latency = profile.latency(rung.column, 1)
        logger.info(
            "  column %s: %4.1f %% right on held-out images, %.2f ms for one image (%g %% of runs within "
            "%.2f ms)",
            *(rung.column, rung.accuracy * 100, latency.median_s * 1e3),
            *(settings.profile_quantile * 100, latency.high_s * 1e3),
        )


def _batch_sizes(settings: Settings, provider: Provider) -> tuple[int, ...]:
    return settings.batch_sizes or (CPU_BATCH_SIZES if provider == "cpu" else GPU_BATCH_SIZES)


def _keep_warm_s(settings: Settings, loaded: Inference) -> float:
    if settings.keep_warm_ms is None:
        return KEEP_WARM_S if loaded.gpu else 0.0
    return settings.keep_warm_ms / 1e3


def _stand_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _card(settings: Settings, inference: Inference, profile: LatencyProfile) -> dict[str, Any]:
    manifest = inference.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "sha256": inference.sha256,
        "source": manifest.source,
        "labels": manifest.labels,
        "input": manifest.input.model_dump(),
        "rungs": [rung.model_dump(exclude={"file", "sha256"}) for rung in manifest.rungs],
        "combinations": [{"columns": c.columns, "accuracy": c.accuracy} for c in manifest.combinations],
        "provider": inference.provider,
        "latency_ms": {
            column: {
                str(size): {"median": milliseconds(latency.median_s), "high": milliseconds(latency.high_s)}
                for size, latency in by_size.items()
            }
            for column, by_size in profile.items()
        },
        "budget_ms": {
            "default": settings.default_budget_ms,
            "min": settings.min_budget_ms,
            "max": settings.max_budget_ms,
            "reserve": settings.overhead_reserve_ms,
        },
    }


def milliseconds(seconds: float) -> float:
    """As a caller reads it."""
    return round(seconds * 1e3, 3)
