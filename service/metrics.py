"""What Prometheus may ask: every request by outcome, where its time went, and how the machine beneath is.

Must not know of HTTP or of the policy. Labels come from closed sets and exist from the start, so that a rate
over a series is right from its first event. docs/metrics.md explains each metric. All but `watching`'s own
belongs to the event loop's thread.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest

import service
from service.errors import OUTCOMES, REASONS, Outcome, Reason
from service.gpu import Gpu, Gpus
from service.scheduling import STOPPED_BY, StoppedBy
from service.series import Asked, Counter, Family, Histogram, Values

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

LATENCY_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 10.0),
)
STAGE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0)
PAUSE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
RUN_RATIO_BUCKETS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 50.0)
BUDGET_SHARE_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0, 5.0)

Stage = Literal["read", "decode", "queue", "inference", "way_out"]
STAGES: tuple[Stage, ...] = get_args(Stage)
ANSWERED: tuple[Outcome, ...] = ("answered", "late")

LAG_INTERVAL_S = 0.1
"""Between two looks at how late the event loop is. Larger: short stalls are seen less often."""


@dataclass(frozen=True, slots=True)
class RunTime:
    """Median time of a run of one loaded model [s]: as measured before it served, and as predicted now."""

    model: str
    version: str
    column: str
    n_images: int
    profiled_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class _Loaded:
    sha256: str
    provider: str
    accuracy: Mapping[str, float]


class Metrics:
    """All metrics of one server.

    Args:
        n_waiting: Asked at each scrape.
        slowdown: As `n_waiting`: how many times longer runs take than when they were measured.
        reserve_s: As `n_waiting`: what is kept free of every budget [s].
        run_times: As `n_waiting`: of every loaded model.
        gpus: Asked at each scrape; None: nothing runs on one.
        clock: Monotonic time [s].
    """

    def __init__(
        self,
        *,
        n_waiting: Callable[[], int],
        slowdown: Callable[[], float],
        reserve_s: Callable[[], float],
        run_times: Callable[[], Iterable[RunTime]],
        gpus: Gpus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch_sizes: list[int] = []
        self._run_times = run_times
        self._gpus = gpus
        self._clock = clock
        self._seen_gpus: tuple[Gpu, ...] = ()
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._gc_started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._families: list[Family[Counter] | Family[Histogram] | Asked] = []
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._have_requests()
        self._have_runs()
        self._have_machine()
        for name, text, value in (
            ("anytime_queue_length", "Requests in the engine that are not running", n_waiting),
            (
                "anytime_slowdown_ratio",
                "Time of runs now, divided by what was measured at start-up",
                slowdown,
            ),
            ("anytime_reserve_seconds", "Kept free of every budget for the answer's way out", reserve_s),
        ):
            self._gauge(name, text, (), partial(_one, value))
        self._have_models()

    # ---- what there is ----

    def _have_requests(self) -> None:
        self._requests = self._counter(
            "anytime_requests_total", "Requests for an answer by how they ended", "outcome"
        )
        for outcome in OUTCOMES:
            self._requests.add(outcome)
        self._rejections = self._counter(
            "anytime_rejections_total", "Requests with the outcome rejected by what took their time", "reason"
        )
        for reason in REASONS:
            self._rejections.add(reason)
        self._latency_s = self._histogram(
            "anytime_latency_seconds",
            "From a request's arrival to the last byte of its answer, answered or late",
            LATENCY_BUCKETS_S,
        ).add()
        self._budget_share = self._histogram(
            "anytime_latency_over_budget_ratio",
            "Latency divided by the caller's budget, answered or late",
            BUDGET_SHARE_BUCKETS,
        ).add()
        stages = self._histogram(
            "anytime_stage_seconds",
            "Parts of the latency: they add up to it, answered or late",
            STAGE_BUCKETS_S,
            "stage",
        )
        self._stages = {stage: stages.add(stage) for stage in STAGES}
        self._answers = self._counter(
            "anytime_answers_total",
            "Answers by deepest column and by what ended the refinement",
            *("column", "stopped_by"),
        )
        expected = self._counter(
            "anytime_expected_correct_answers_total",
            "Sum over answers of the held-out accuracy of what gave them: expected, not observed",
            "outcome",
        )
        self._expected = {outcome: expected.add(outcome) for outcome in ANSWERED}

    def _have_runs(self) -> None:
        self._inference_s = self._histogram(
            "anytime_inference_seconds",
            "Time of one run by column and batch size, hand-over to the inference thread included",
            LATENCY_BUCKETS_S,
            *("column", "batch"),
        )
        self._images = self._counter(
            "anytime_inference_images_total", "Images in the runs of a column", "column"
        )
        self._run_ratio = self._histogram(
            "anytime_run_over_predicted_ratio",
            "Time of one run divided by the median predicted for it, by column",
            RUN_RATIO_BUCKETS,
            "column",
        )
        self._failed_runs = self._counter("anytime_failed_runs_total", "Runs that gave no result", "column")
        self._preempted_runs = self._counter(
            "anytime_preempted_runs_total", "Runs that were told to end before they had a result", "column"
        )
        self._saved_s = self._counter(
            "anytime_inference_saved_seconds_total",
            "Predicted time of the columns that were not run because the caller had gone",
        ).add()
        for name, text, median_s in (
            (
                "anytime_profiled_run_seconds",
                "Median time of a run when the model was loaded",
                lambda one: one.profiled_s,
            ),
            (
                "anytime_predicted_run_seconds",
                "Median time of a run that is predicted now",
                lambda one: one.predicted_s,
            ),
        ):
            self._gauge(name, text, ("model", "version", "column", "batch"), partial(self._medians, median_s))

    def _have_machine(self) -> None:
        pauses = self._histogram(
            "anytime_gc_pause_seconds",
            "Collections of Python's garbage, during which nothing else runs",
            PAUSE_BUCKETS_S,
            "generation",
        )
        self._pauses = [pauses.add(str(generation)) for generation in range(len(gc.get_stats()))]
        self._lag_s = self._histogram(
            "anytime_event_loop_lag_seconds",
            "How late the event loop was for a timer, ten times a second; exact to a millisecond",
            LAG_BUCKETS_S,
        ).add()
        self._families.append(
            Asked(
                "anytime_event_loop_cpu_seconds_total",
                "Processor time of the event loop's thread",
                "counter",
                (),
                partial(_one, time.thread_time),
            )
        )
        for name, text, figure in (
            ("anytime_gpu_memory_used_bytes", "By all processes", lambda gpu: gpu.memory_used_bytes),
            ("anytime_gpu_memory_size_bytes", "Of the GPU's memory", lambda gpu: gpu.memory_size_bytes),
            (
                "anytime_gpu_busy_ratio",
                "Part of the last moments in which anything ran on the GPU",
                lambda gpu: gpu.busy_ratio,
            ),
        ):
            self._gauge(name, text, ("gpu",), partial(self._gpu_figures, figure))

    def _have_models(self) -> None:
        self._gauge("anytime_build_info", "What serves", ("version",), lambda: [((service.__version__,), 1)])
        self._gauge(
            "anytime_model_info",
            "1 for each version of a model that is loaded",
            ("model", "version", "sha256", "provider"),
            lambda: [((*key, one.sha256, one.provider), 1) for key, one in self._loaded.items()],
        )
        self._gauge(
            "anytime_model_accuracy_ratio",
            "Held-out accuracy of an answer from these columns",
            ("model", "version", "columns"),
            lambda: [
                ((*key, columns), accuracy)
                for key, one in self._loaded.items()
                for columns, accuracy in one.accuracy.items()
            ],
        )

    def _counter(self, name: str, text: str, *labels: str) -> Family[Counter]:
        family = Family(name, text, "counter", labels, partial(Counter, name))
        self._families.append(family)
        return family

    def _histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> Family[Histogram]:
        family = Family(name, text, "histogram", labels, partial(Histogram, name, bounds=bounds))
        self._families.append(family)
        return family

    def _gauge(
        self, name: str, text: str, labels: Sequence[str], ask: Callable[[], Iterable[tuple[Values, float]]]
    ) -> None:
        self._families.append(Asked(name, text, "gauge", labels, ask))

    def _medians(self, median_s: Callable[[RunTime], float]) -> Iterator[tuple[Values, float]]:
        for one in self._run_times():
            yield (one.model, one.version, one.column, str(one.n_images)), median_s(one)

    def _gpu_figures(self, figure: Callable[[Gpu], float | None]) -> Iterator[tuple[Values, float]]:
        for gpu in self._seen_gpus:
            if (value := figure(gpu)) is not None:
                yield (str(gpu.index),), value

    # ---- models come and go ----

    def add_model(
        self,
        name: str,
        version: str,
        *,
        sha256: str,
        provider: str,
        columns: Sequence[str],
        batch_sizes: Sequence[int],
        accuracy: Mapping[tuple[str, ...], float],
    ) -> None:
        """Have all series of a model, from its first moment.

        Args:
            name: From its manifest.
            version: From its manifest.
            sha256: Of its manifest.
            provider: What it runs on.
            columns: Shallow first. Models share the series of columns of the same name.
            batch_sizes: Profiled ones; a batch counts under the next one up. Some models may have larger ones
                than others, but none has any between those of others.
            accuracy: On held-out images, by the columns that have run.
        """
        by_columns = {"+".join(columns_run): value for columns_run, value in accuracy.items()}
        self._loaded[name, version] = _Loaded(sha256, provider, by_columns)
        self._batch_sizes = sorted({*self._batch_sizes, *batch_sizes})
        for column in columns:
            for stopped_by in STOPPED_BY:
                self._answers.add(column, stopped_by)
            self._images.add(column)
            self._run_ratio.add(column)
            self._failed_runs.add(column)
            self._preempted_runs.add(column)
            for size in batch_sizes:
                self._inference_s.add(column, str(size))

    def remove_model(self, name: str, version: str) -> None:
        """Say no more that this version is loaded; what it has done stays counted."""
        del self._loaded[name, version]

    # ---- what happens ----

    def count_request(self, outcome: Outcome, reason: Reason | None = None) -> None:
        """Count one request that got no prediction; one that was rejected has a reason."""
        self._requests[outcome,].inc()
        if reason:
            self._rejections[reason,].inc()

    def count_answer(
        self,
        *,
        outcome: Outcome,
        column: str,
        stopped_by: StoppedBy,
        accuracy: float,
        latency_s: float,
        budget_s: float,
        decode_s: float,
        queue_s: float,
        inference_s: float,
        way_out_s: float,
    ) -> None:
        """Count one request that got a prediction, in time or late. Cost: some 3 us."""
        self._requests[outcome,].inc()
        self._answers[column, stopped_by].inc()
        self._expected[outcome].inc(accuracy)
        self._latency_s.observe(latency_s)
        self._budget_share.observe(latency_s / budget_s)
        stages = self._stages
        stages["read"].observe(max(0.0, latency_s - decode_s - queue_s - inference_s - way_out_s))
        stages["decode"].observe(decode_s)
        stages["queue"].observe(queue_s)
        stages["inference"].observe(inference_s)
        stages["way_out"].observe(way_out_s)

    def observe_saved(self, saved_s: float) -> None:
        """Record the predicted time of columns that were not run because the caller had gone."""
        self._saved_s.inc(saved_s)

    def observe_run(self, column: str, n_images: int, run_s: float, ratio: float) -> None:
        """Record one run of a column, and its time divided by the predicted median."""
        self._run_ratio[column,].observe(ratio)
        self._images[column,].inc(n_images)
        size = next(size for size in self._batch_sizes if size >= n_images)
        self._inference_s[column, str(size)].observe(run_s)

    def observe_failed_run(self, column: str) -> None:
        """Record one run of a column that gave no result."""
        self._failed_runs[column,].inc()

    def observe_preempted_run(self, column: str) -> None:
        """Record one run of a column that was preempted before it had a result."""
        self._preempted_runs[column,].inc()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the garbage collector and the running event loop are looked at.

        Cost: 1 us a collection, and a timer.
        """
        gc.callbacks.append(self._on_gc)
        self._look_again()
        try:
            yield
        finally:
            gc.callbacks.remove(self._on_gc)
            if self._timer:
                self._timer.cancel()

    def _on_gc(self, phase: Literal["start", "stop"], info: Mapping[str, int]) -> None:
        """Called in whichever thread makes the garbage; collections never overlap."""
        if phase == "start":
            self._gc_started_s = self._clock()
        else:
            self._pauses[info["generation"]].observe(self._clock() - self._gc_started_s)

    def _look_again(self) -> None:
        due_s = self._clock() + LAG_INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(LAG_INTERVAL_S, self._look, due_s)

    def _look(self, due_s: float) -> None:
        self._lag_s.observe(max(0.0, self._clock() - due_s))
        self._look_again()

    # ---- what is told ----

    async def exposition(self) -> bytes:
        """Everything in the text format that Prometheus scrapes; in the event loop that serves."""
        if self._gpus:
            self._seen_gpus = await self._gpus.sample()
        ours = "".join(line for family in self._families for line in family.lines())
        return ours.encode() + generate_latest(self._process)


def _one(value: Callable[[], float]) -> list[tuple[Values, float]]:
    """The one series of a metric without labels."""
    return [((), value())]
