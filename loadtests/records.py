"""From what came back to the figures: who got a prediction in time, and how accurate those were.

One row per request offered, whatever became of it; a policy is judged by attainment and accuracy together.
Must not know how requests were sent, nor a server's own figures, except to hold its claims against the
client's clock.
"""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
"""Mean and half-width; the half-width is NaN where there was one run only."""

OUTCOMES = ("answered", "rejected", "expired", "failed", "lost")
OUTCOME_BY_STATUS: Mapping[int, str] = {200: "answered", 429: "rejected", 504: "expired", 0: "lost"}
"""Any other is "failed"; 0 stands for no response."""
Z_95 = 1.959964
"""The standard normal distribution lies within +- this with 95 %."""
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}

MAX_LAG_S = 0.002
"""Beyond this lag of the latest 1 % of requests, the load was not the one that the figures are for. Larger
lets a slow generator pass for a slow server (latency counts from the due time); smaller discards runs for
nothing."""
FALSE_CLAIM_S = 0.001
"""How much after its deadline the client may see an answer that was said to be in time: the server vouches
for its own wall time, not for the wire. Larger excuses lies, smaller blames the network."""


@dataclass(frozen=True, eq=False)
class Record:
    """Struct of arrays: row i of each is request i, in any order.

    Attributes:
        due_s: When it was to be sent [s, any one clock].
        budget_s: What it granted [s].
        latency_s: From `due_s` to the last byte read, by the client's clock [s]; NaN where no response came.
        outcome: One of `OUTCOMES`: answered (a prediction came, in time or not), rejected, expired, failed
            (any other response), lost (no response at all).
        columns_run: "1+3"; "" where no prediction came.
        is_correct: The prediction was the label.
        claims_met: The server said `deadline_met`.
        lag_s: How late the generator itself sent it [s].

    Raises:
        ValueError: the arrays do not fit together, an outcome is unknown, or an answer lacks its latency.
    """

    due_s: Floats
    budget_s: Floats
    latency_s: Floats
    outcome: NDArray[np.str_]
    columns_run: NDArray[np.str_]
    is_correct: NDArray[np.bool_]
    claims_met: NDArray[np.bool_]
    lag_s: Floats

    def __post_init__(self) -> None:
        if any(values.shape != (len(self.due_s),) for values in vars(self).values()):
            raise ValueError("every array of a record must be one-dimensional and of one length")
        unknown = set(self.outcome.tolist()) - set(OUTCOMES)
        if unknown:
            raise ValueError(f"unknown outcomes {sorted(unknown)}: use {', '.join(OUTCOMES)}")
        if not np.isfinite(self.due_s).all() or not np.isfinite(self.lag_s).all():
            raise ValueError("due_s and lag_s must be finite: they are known of every request")
        if not (self.budget_s > 0).all():
            raise ValueError("budget_s must be above 0")
        if not np.isfinite(self.latency_s[self.outcome == "answered"]).all():
            raise ValueError("an answered request has a latency: call a request without response lost")

    def __len__(self) -> int:
        return len(self.due_s)

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Keep it as one compressed .npz, with what is to be known about the run.

        Args:
            path: Ends in .npz.
            about: Must be fit for JSON.
        """
        columns: dict[str, NDArray[Any]] = dict(vars(self))
        np.savez_compressed(path, allow_pickle=False, about=np.array(json.dumps(about)), **columns)

    @classmethod
    def load(cls, path: Path) -> tuple[Self, dict[str, Any]]:
        """Read what `save` wrote: the record, and what is to be known about the run.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
                about = json.loads(str(columns.pop("about")))
                return cls(**columns), about
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is no record of a load test ({error}): make it with --record"
            ) from error


@dataclass(frozen=True)
class Summary:
    """What one run showed. Shares are 0 to 1; NaN stands where nothing was there to be measured.

    Attributes:
        n: Requests offered.
        span_s: From the first due time to the last, or to the last answer in time if that came later [s].
        attainment: Predictions within their budget by the client's clock / n.
        accuracy: Correct among those.
        accuracy_of_all: Correct and within budget / n.
        goodput_hz: Predictions within budget per second of the span.
        outcomes: Share of each of `OUTCOMES` among all.
        columns: Share of each set of columns among the answered, late ones too.
        latency_s: p50, p95, p99, p99.9 of the answered, late ones too [s].
        attainment_by_budget: Budget [ms] to attainment among the requests that granted it.
        worst_false_claim_s: Largest latency - budget among answers said to be in time [s]; not above 0 when
            each of these claims holds.
        n_false_claims: Answers said to be in time that came more than `FALSE_CLAIM_S` late.
        lag_p99_s: How late the generator sent: 99 % of requests at most this [s].
        lag_max_s: The same of all requests [s].
        is_valid: The generator kept up: `lag_p99_s` is at most `MAX_LAG_S`.
    """

    n: int
    span_s: float
    attainment: float
    accuracy: float
    accuracy_of_all: float
    goodput_hz: float
    outcomes: dict[str, float]
    columns: dict[str, float]
    latency_s: dict[str, float]
    attainment_by_budget: dict[float, float]
    worst_false_claim_s: float
    n_false_claims: int
    lag_p99_s: float
    lag_max_s: float
    is_valid: bool


@dataclass(frozen=True)
class Point:
    """A policy under one load: means over repeated runs with their half-widths.

    Attributes:
        policy: Its name.
        panel: The load, as its panel and its rows are headed.
        attainment, accuracy, accuracy_of_all, goodput_hz: As in `Summary`.
    """

    policy: str
    panel: str
    attainment: Interval
    accuracy: Interval
    accuracy_of_all: Interval
    goodput_hz: Interval


def summary(record: Record) -> Summary:
    """Work out every figure of one run.

    Raises:
        ValueError: the record is empty; offer at least one request.
    """
    if not len(record):
        raise ValueError("the record is empty: offer at least one request")
    is_answered = record.outcome == "answered"
    over_s = record.latency_s - record.budget_s
    in_time = is_answered & (over_s <= 0)
    claimed_over_s = over_s[is_answered & record.claims_met]
    n, n_in_time, n_correct = len(record), int(in_time.sum()), int((in_time & record.is_correct).sum())
    ends_s = np.concatenate([record.due_s, (record.due_s + record.latency_s)[in_time]])
    span_s = float(ends_s.max() - record.due_s.min())
    budgets_ms, budget = np.unique(np.round(record.budget_s * 1e3, 6), return_inverse=True)
    by_budget = np.bincount(budget, in_time) / np.bincount(budget)
    lag_p99_s = float(np.quantile(record.lag_s, 0.99))
    return Summary(
        n=n,
        span_s=span_s,
        attainment=n_in_time / n,
        accuracy=n_correct / n_in_time if n_in_time else math.nan,
        accuracy_of_all=n_correct / n,
        goodput_hz=n_in_time / span_s if span_s > 0 else math.nan,
        outcomes={outcome: float((record.outcome == outcome).mean()) for outcome in OUTCOMES},
        columns=_mix(record.columns_run[is_answered]),
        latency_s=_quantiles(record.latency_s[is_answered]),
        attainment_by_budget=dict(zip(budgets_ms.tolist(), by_budget.tolist(), strict=True)),
        worst_false_claim_s=float(claimed_over_s.max()) if len(claimed_over_s) else math.nan,
        n_false_claims=int((claimed_over_s > FALSE_CLAIM_S).sum()),
        lag_p99_s=lag_p99_s,
        lag_max_s=float(record.lag_s.max()),
        is_valid=lag_p99_s <= MAX_LAG_S,
    )


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of repeated runs and the half-width of its confidence interval, by Student's t.

    Args:
        values: One figure per independent run; a NaN among them makes both results NaN.
        confidence: How often such an interval would cover the true mean, above 0 and below 1.

    Returns:
        Mean and half-width; the half-width of one run is NaN, because one run says nothing about spread.

    Raises:
        ValueError: there is no run, or no such confidence.
    """
    if not len(values) or not 0 < confidence < 1:
        raise ValueError("give at least one run, and a confidence between 0 and 1")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, _t_quantile(len(values) - 1, confidence) * error


def share_interval(n_hits: int, n: int) -> tuple[float, float]:
    """Bounds that cover a share with 95 % confidence; (0, 1) where nothing was tried.

    Requests of one run are taken as independent; where they come in bursts the truth is wider.

    Source: E. B. Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if not n:
        return 0.0, 1.0
    share, spread = n_hits / n, Z_95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # Rounding must not put the share itself outside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def quantile_interval(values: Floats, quantile: float) -> tuple[float, float]:
    """Bounds that cover a quantile with 95 % confidence, whatever the distribution; NaN without values.

    Independence is taken as in `share_interval`. Bounds that few values cannot give are the smallest and the
    largest of them.

    Source: order statistics with the normal approximation of the binomial; Conover, "Practical Nonparametric
    Statistics", 1999, section 3.2.
    """
    n = len(values)
    if not n:
        return math.nan, math.nan
    ascending = np.sort(values)
    half = Z_95 * math.sqrt(n * quantile * (1 - quantile))
    low, high = math.floor(n * quantile - half), math.ceil(n * quantile + half)
    return float(ascending[max(0, low)]), float(ascending[min(n - 1, high)])


def point(policy: str, panel: str, runs: Sequence[Summary]) -> Point:
    """Put the repeated runs of a policy under one load together, with 95 % confidence intervals."""
    return Point(
        policy,
        panel,
        attainment=interval([run.attainment for run in runs]),
        accuracy=interval([run.accuracy for run in runs]),
        accuracy_of_all=interval([run.accuracy_of_all for run in runs]),
        goodput_hz=interval([run.goodput_hz for run in runs]),
    )


def _mix(names: NDArray[np.str_]) -> dict[str, float]:
    found, counts = np.unique(names, return_counts=True)
    return dict(zip(found.tolist(), (counts / max(1, len(names))).tolist(), strict=True))


def _quantiles(values: Floats) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) if len(values) else math.nan for name, q in QUANTILES.items()}


def _t_quantile(freedom: int, confidence: float) -> float:
    """The t that |T| stays below with this probability, by bisection of the angle atan(t / sqrt(freedom)).

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 (odd), 26.7.4 (even freedom).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
        for k in range(freedom % 2, freedom - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
        within = math.sin(angle) * total
        within = 2 / math.pi * (angle + within) if freedom % 2 else within
        low, high = (angle, high) if within < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
