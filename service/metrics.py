"""What Prometheus may ask: every request by outcome, and where its time went.

Must not know of HTTP or of the policy. Labels come from closed sets and exist from the start, so that a rate
over a series is right from its first event.
"""

from collections.abc import Callable, Sequence

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

import service
from service.errors import OUTCOMES, Outcome
from service.scheduling import STOPPED_BY, StoppedBy

LATENCY_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 10.0),
)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
RUN_RATIO_BUCKETS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 50.0)
BUDGET_SHARE_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0, 5.0)


class Metrics:
    """All metrics of one server in a registry of its own.

    Args:
        batch_sizes: Profiled batch sizes; a batch counts under the next one up.
        n_waiting: Asked at each scrape.
        slowdown: As `n_waiting`: how many times longer runs take than when they were measured.
        reserve_s: As `n_waiting`: what is kept free of every budget [s].
    """

    def __init__(
        self,
        *,
        batch_sizes: Sequence[int],
        n_waiting: Callable[[], int],
        slowdown: Callable[[], float],
        reserve_s: Callable[[], float],
    ) -> None:
        # Else each series has a second one, with the time of its creation, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "anytime_requests",
            "Requests for an answer by how they ended",
            ["outcome"],
            registry=self.registry,
        )
        self._latency_s = Histogram(
            "anytime_latency_seconds",
            "From a request's arrival to the last byte of its answer, answered or late",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._budget_share = Histogram(
            "anytime_latency_over_budget_ratio",
            "Latency divided by the caller's budget, answered or late",
            buckets=BUDGET_SHARE_BUCKETS,
            registry=self.registry,
        )
        self._answers = Counter(
            "anytime_answers",
            "Answers by deepest column and by what ended the refinement",
            ["column", "stopped_by"],
            registry=self.registry,
        )
        self._inference_s = Histogram(
            "anytime_inference_seconds",
            "Time of one run by column and batch size, hand-over to the inference thread included",
            ["column", "batch"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._run_ratio = Histogram(
            "anytime_run_over_predicted_ratio",
            "Time of one run divided by the median predicted for it, by column",
            ["column"],
            buckets=RUN_RATIO_BUCKETS,
            registry=self.registry,
        )
        self._saved_s = Counter(
            "anytime_inference_saved_seconds",
            "Predicted time of the columns that were not run because the caller had gone",
            registry=self.registry,
        )
        for name, text, value in (
            (
                "anytime_slowdown_ratio",
                "Time of runs now, divided by what was measured at start-up",
                slowdown,
            ),
            ("anytime_reserve_seconds", "Kept free of every budget for the answer's way out", reserve_s),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)
        waiting = Gauge(
            "anytime_queue_length", "Requests in the engine that are not running", registry=self.registry
        )
        waiting.set_function(n_waiting)
        Info("anytime_build", "What serves", registry=self.registry).info({"version": service.__version__})
        self._models = Gauge(
            "anytime_model_info",
            "1 for each version of a model that is loaded",
            ["model", "version", "sha256", "provider"],
            registry=self.registry,
        )
        self._batch_sizes = tuple(batch_sizes)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)

    def add_model(
        self, name: str, version: str, *, sha256: str, provider: str, columns: Sequence[str]
    ) -> None:
        """Have all series of a model, from its first moment.

        Args:
            name: From its manifest.
            version: From its manifest.
            sha256: Of its manifest.
            provider: What it runs on.
            columns: Shallow first. Models share the series of columns of the same name.
        """
        self._models.labels(name, version, sha256, provider).set(1)
        for column in columns:
            for stopped_by in STOPPED_BY:
                self._answers.labels(column, stopped_by)
            self._run_ratio.labels(column)
            for size in self._batch_sizes:
                self._inference_s.labels(column, str(size))

    def remove_model(self, name: str, version: str) -> None:
        """Say no more that this version is loaded; what it has done stays counted."""
        self._models.remove_by_labels({"model": name, "version": version})

    def count_request(self, outcome: Outcome) -> None:
        """Count one request that got no prediction."""
        self._requests.labels(outcome).inc()

    def count_answer(
        self, *, outcome: Outcome, column: str, stopped_by: StoppedBy, latency_s: float, budget_s: float
    ) -> None:
        """Count one request that got a prediction, in time or late."""
        self._requests.labels(outcome).inc()
        self._answers.labels(column, stopped_by).inc()
        self._latency_s.observe(latency_s)
        self._budget_share.observe(latency_s / budget_s)

    def observe_saved(self, saved_s: float) -> None:
        """Record the predicted time of columns that were not run because the caller had gone."""
        self._saved_s.inc(saved_s)

    def observe_run(self, column: str, n_images: int, run_s: float, ratio: float) -> None:
        """Record one run of a column, and its time divided by the predicted median."""
        self._run_ratio.labels(column).observe(ratio)
        size = next(size for size in self._batch_sizes if size >= n_images)
        self._inference_s.labels(column, str(size)).observe(run_s)

    def exposition(self) -> bytes:
        """Everything in the text format that Prometheus scrapes."""
        return generate_latest(self.registry)
