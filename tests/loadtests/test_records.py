"""From what came back to the figures: worked out by hand, and honest where nothing came."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests import records
from loadtests.records import Record, Summary

NAN = math.nan

# due_s, budget_s, latency_s, outcome, columns_run, is_correct, claims_met, lag_s
BY_HAND: list[tuple[float, float, float, str, str, bool, bool, float]] = [
    (0.0, 0.005, 0.004, "answered", "1+2", True, True, 0.0001),  # in time, right
    (1.0, 0.005, 0.005, "answered", "1", False, True, 0.0002),  # exactly in time, wrong
    (2.0, 0.005, 0.0055, "answered", "1", True, True, 0.0003),  # 0.5 ms late: the wire may be to blame
    (3.0, 0.005, 0.009, "answered", "1+2", True, True, 0.0001),  # 4 ms late and said to be in time
    (4.0, 0.005, 0.020, "answered", "1", True, False, 0.0001),  # late and said so
    (5.0, 0.050, 0.030, "answered", "1+2", True, True, 0.0001),  # in time, right
    (6.0, 0.050, 0.001, "rejected", "", False, False, 0.0001),  # quickly refused is not answered
    (7.0, 0.050, 0.050, "expired", "", False, False, 0.0001),
    (8.0, 0.050, 0.002, "failed", "", False, False, 0.0001),
    (10.0, 0.050, NAN, "lost", "", False, False, 0.0001),
]


def record_of(rows: list[tuple[float, float, float, str, str, bool, bool, float]]) -> Record:
    due, budget, latency, outcome, columns, correct, claims, lag = zip(*rows, strict=True)
    return Record(
        due_s=np.array(due),
        budget_s=np.array(budget),
        latency_s=np.array(latency),
        outcome=np.array(outcome),
        columns_run=np.array(columns),
        is_correct=np.array(correct),
        claims_met=np.array(claims),
        lag_s=np.array(lag),
    )


def record(n: int = 1, **changed: Any) -> Record:
    """Requests a second apart, all answered rightly in time, but for what is changed."""
    values: dict[str, Any] = {
        "due_s": np.arange(n, dtype=np.float64),
        "budget_s": np.full(n, 0.005),
        "latency_s": np.full(n, 0.002),
        "outcome": np.full(n, "answered"),
        "columns_run": np.full(n, "1"),
        "is_correct": np.full(n, fill_value=True),
        "claims_met": np.full(n, fill_value=True),
        "lag_s": np.zeros(n),
    }
    return Record(**(values | changed))


def silence(n: int = 4) -> Record:
    return record(
        n,
        latency_s=np.full(n, NAN),
        outcome=np.full(n, "lost"),
        columns_run=np.full(n, ""),
        is_correct=np.full(n, fill_value=False),
        claims_met=np.full(n, fill_value=False),
    )


def test_the_figures_are_those_worked_out_by_hand() -> None:
    s = records.summary(record_of(BY_HAND))

    assert s.n == 10
    assert s.span_s == 10.0
    assert s.attainment == 0.3
    assert s.accuracy == pytest.approx(2 / 3)
    assert s.accuracy_of_all == 0.2
    assert s.goodput_hz == pytest.approx(0.3)
    assert s.outcomes == {"answered": 0.6, "rejected": 0.1, "expired": 0.1, "failed": 0.1, "lost": 0.1}
    assert s.columns == pytest.approx({"1": 3 / 6, "1+2": 3 / 6})
    assert s.attainment_by_budget == {5.0: 0.4, 50.0: 0.2}
    assert s.worst_false_claim_s == pytest.approx(0.004)
    assert s.n_false_claims == 1
    assert s.latency_s["p50"] == pytest.approx((0.0055 + 0.009) / 2)  # of 4, 5, 5.5, 9, 20 and 30 ms
    assert s.latency_s["p95"] == pytest.approx(0.020 + 0.75 * 0.010)  # place 4.75 of 0 to 5
    assert s.latency_s["p99.9"] == pytest.approx(0.020 + 0.995 * 0.010)
    assert s.lag_max_s == 0.0003
    assert s.lag_p99_s == pytest.approx(0.0002 + 0.91 * 0.0001)  # place 8.91 of 0 to 9
    assert s.is_valid


def test_the_span_ends_with_an_answer_that_came_in_time_after_the_last_request() -> None:
    late = record(3, budget_s=np.full(3, 2.0), latency_s=np.array([0.1, 0.1, 1.0]))
    assert records.summary(late).span_s == 3.0
    assert records.summary(late).goodput_hz == 1.0
    straggler = record(3, budget_s=np.full(3, 0.2), latency_s=np.array([0.1, 0.1, 60.0]))
    assert records.summary(straggler).span_s == 2.0
    assert records.summary(straggler).goodput_hz == 1.0


def test_the_order_of_the_requests_does_not_matter() -> None:
    forward, backward = (records.summary(record_of(rows)) for rows in (BY_HAND, BY_HAND[::-1]))
    assert forward == backward


def test_where_nobody_was_answered_nothing_is_claimed() -> None:
    s = records.summary(silence())

    assert (s.attainment, s.accuracy_of_all, s.goodput_hz) == (0.0, 0.0, 0.0)
    assert math.isnan(s.accuracy)
    assert math.isnan(s.worst_false_claim_s)
    assert s.n_false_claims == 0
    assert s.columns == {}
    assert s.outcomes["lost"] == 1.0
    assert set(s.latency_s) == {"p50", "p95", "p99", "p99.9"}
    assert all(math.isnan(latency_s) for latency_s in s.latency_s.values())
    assert s.attainment_by_budget == {5.0: 0.0}


def test_one_request_is_enough_and_its_answer_makes_the_span() -> None:
    s = records.summary(record(1))
    assert s.goodput_hz == pytest.approx(1 / 0.002)
    assert math.isnan(records.summary(silence(1)).goodput_hz)


def test_a_correct_flag_on_a_late_answer_counts_for_nothing() -> None:
    s = records.summary(record(2, latency_s=np.array([0.004, 0.006])))
    assert (s.accuracy, s.accuracy_of_all) == (1.0, 0.5)


def test_a_claim_that_holds_has_room_left() -> None:
    assert records.summary(record(2)).worst_false_claim_s == pytest.approx(-0.003)


def test_budgets_that_differ_only_by_rounding_are_one() -> None:
    s = records.summary(record(2, budget_s=np.array([0.0077, 7.7 / 1e3 * (1 + 1e-15)])))
    assert s.attainment_by_budget == {7.7: 1.0}


def test_a_generator_that_fell_behind_makes_the_run_invalid() -> None:
    lag_s = np.zeros(1000)
    lag_s[:5] = 1.0  # half a percent: bad luck
    assert records.summary(record(1000, lag_s=lag_s)).is_valid
    lag_s[:20] = 1.1 * records.MAX_LAG_S
    assert not records.summary(record(1000, lag_s=lag_s)).is_valid
    assert records.summary(record(1000, lag_s=np.full(1000, records.MAX_LAG_S))).is_valid


def test_a_summary_can_be_kept_as_json() -> None:
    kept = json.loads(json.dumps(dataclasses.asdict(records.summary(record_of(BY_HAND)))))
    assert kept["attainment_by_budget"] == {"5.0": 0.4, "50.0": 0.2}


def test_an_empty_record_is_refused() -> None:
    with pytest.raises(ValueError, match="the record is empty: offer at least one request"):
        records.summary(record(0))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lag_s": np.zeros(3)}, "one length"),
        ({"due_s": np.zeros((2, 1))}, "one-dimensional"),
        ({"outcome": np.array(["answered", "late"])}, r"unknown outcomes \['late'\]: use answered"),
        ({"latency_s": np.array([0.1, NAN])}, "call a request without response lost"),
        ({"due_s": np.array([0.0, NAN])}, "finite"),
        ({"lag_s": np.array([0.0, NAN])}, "finite"),
        ({"budget_s": np.array([0.1, 0.0])}, "above 0"),
        ({"budget_s": np.array([0.1, NAN])}, "above 0"),
    ],
)
def test_an_inconsistent_record_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        record(2, **changed)


@given(st.lists(st.sampled_from(BY_HAND), min_size=1, max_size=40))
def test_shares_are_consistent(rows: list[tuple[float, float, float, str, str, bool, bool, float]]) -> None:
    s = records.summary(record_of(rows))
    assert 0 <= s.accuracy_of_all <= s.attainment <= s.outcomes["answered"] <= 1
    assert sum(s.outcomes.values()) == pytest.approx(1)
    assert not s.columns or sum(s.columns.values()) == pytest.approx(1)
    if s.attainment:
        assert s.accuracy * s.attainment == pytest.approx(s.accuracy_of_all)
    shares = {b * 1e3: sum(row[1] == b for row in rows) / s.n for b in (0.005, 0.05)}
    parts = [share * shares[budget_ms] for budget_ms, share in s.attainment_by_budget.items()]
    assert sum(parts) == pytest.approx(s.attainment)


@pytest.mark.parametrize(
    ("n", "confidence", "t"),
    [
        # From the tables of Student's t, two-sided.
        *((2, 0.95, 12.7062), (3, 0.95, 4.30265), (4, 0.95, 3.18245), (5, 0.95, 2.77645), (6, 0.95, 2.57058)),
        *(
            (10, 0.95, 2.26216),
            (31, 0.95, 2.04227),
            (121, 0.95, 1.97993),
            (5, 0.99, 4.60409),
            (4, 0.9, 2.35336),
        ),
    ],
)
def test_the_interval_is_students(n: int, confidence: float, t: float) -> None:
    values = [float(v) for v in range(n)]
    mean, half = records.interval(values, confidence)
    assert mean == (n - 1) / 2
    assert half == pytest.approx(t * np.std(values, ddof=1) / np.sqrt(n), rel=1e-5)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    runs = np.random.default_rng(0).normal(size=(2000, 4))
    intervals = [records.interval(values) for values in runs.tolist()]
    assert np.mean([abs(mean) <= half for mean, half in intervals]) == pytest.approx(0.95, abs=0.015)


def test_one_run_says_nothing_about_spread() -> None:
    mean, half = records.interval([0.7])
    assert mean == 0.7
    assert math.isnan(half)
    assert records.interval([0.7, 0.7]) == (0.7, 0.0)


def test_a_figure_that_one_run_lacks_has_no_interval() -> None:
    assert all(math.isnan(value) for value in records.interval([0.7, NAN]))


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0, 2.0], 1.0), ([1.0, 2.0], 0.0)])
def test_an_interval_of_nothing_is_refused(values: list[float], confidence: float) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        records.interval(values, confidence)


def test_a_point_puts_runs_together() -> None:
    one = records.summary(record(2))
    other: Summary = records.summary(record(2, latency_s=np.array([0.002, 0.009])))
    p = records.point("anytime", "spike", [one, other])
    assert (p.policy, p.panel) == ("anytime", "spike")
    assert p.attainment == pytest.approx((0.75, 12.7062 * 0.25))  # t of two runs x half their distance
    assert p.accuracy == (1.0, 0.0)
    assert p.accuracy_of_all == pytest.approx((0.75, 12.7062 * 0.25))


# ---- intervals of one run ----


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_interval_of_a_share_holds_the_share(hits: int, misses: int) -> None:
    low, high = records.share_interval(hits, hits + misses)

    assert 0 <= low <= (hits / (hits + misses) if hits + misses else 0.5) <= high <= 1


def test_the_interval_of_a_share_is_wilsons() -> None:
    # R: binom::binom.confint(9, 10, methods = "wilson")
    assert records.share_interval(9, 10) == pytest.approx((0.5958500, 0.9821238), abs=1e-6)


def test_the_interval_of_a_quantile_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = -math.log(0.1)  # the 90th percentile of an exponential distribution
    intervals = [records.quantile_interval(rng.exponential(size=400), 0.9) for _ in range(500)]

    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_a_quantile_of_nothing_is_none() -> None:
    assert all(math.isnan(bound) for bound in records.quantile_interval(np.array([]), 0.5))
    assert records.quantile_interval(np.array([2.0]), 0.99) == (2.0, 2.0)


def test_a_record_that_is_kept_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    record_of(BY_HAND).save(path, {"scenario": "by hand"})
    back, about = Record.load(path)

    assert about == {"scenario": "by hand"}
    for name, values in vars(record_of(BY_HAND)).items():
        assert np.array_equal(getattr(back, name), values, equal_nan=values.dtype.kind == "f"), name
