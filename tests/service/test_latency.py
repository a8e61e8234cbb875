"""Latencies by example; what is learned from runs, by simulation with fixed seeds and by law."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.latency import Latency, LatencyProfile, LiveProfile, Quantile, Reserve
from tests.service.strategies import COLUMNS, GAIN, MS, NO_GAIN, profile_of, profiles

# ---- what was measured ----


def test_a_batch_counts_as_the_next_measured_size() -> None:
    assert NO_GAIN.latency("1", 3) == NO_GAIN.latency("1", 4)
    assert [NO_GAIN.measured_size(n) for n in (1, 2, 3, 4)] == [1, 2, 4, 4]


def test_a_batch_larger_than_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        NO_GAIN.latency("1", 5)


@pytest.mark.parametrize(
    "latencies",
    [
        pytest.param(
            {"1": {1: Latency(1, 1)}, "2": {1: Latency(1, 1), 2: Latency(1, 1)}}, id="a size is lacking"
        ),
        pytest.param({"1": {2: Latency(1, 1)}}, id="no single image"),
        pytest.param({"1": {}}, id="no size"),
        pytest.param({}, id="no column"),
    ],
)
def test_columns_must_be_measured_alike(latencies: dict[str, dict[int, Latency]]) -> None:
    with pytest.raises(ValueError, match="same batch sizes"):
        LatencyProfile(latencies)


def test_likely_is_a_little_more_than_the_median_but_never_more_than_high() -> None:
    assert Latency(1.0, 5.0).likely_s == pytest.approx(1.1)
    assert Latency(1.0, 1.01).likely_s == pytest.approx(1.01)


# ---- a quantile ----


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("start", [0.01, 1.0, 50.0])
def test_a_quantile_comes_to_lie_where_it_was_asked_to(quantile: float, start: float) -> None:
    random = np.random.default_rng(1)
    follows = Quantile(start, quantile=quantile, step=0.05, least=1e-3, most=1e3)
    for value in random.lognormal(0.0, 0.3, 2000):
        follows.observe(value)
    above = 0
    for value in random.lognormal(0.0, 0.3, 5000):
        above += value > follows.value
        follows.observe(value)
    assert above / 5000 == pytest.approx(1 - quantile, abs=0.02)


def test_a_single_value_however_large_moves_a_quantile_by_one_step() -> None:
    follows = Quantile(1.0, quantile=0.95, step=0.1, least=0.1, most=10.0)
    follows.observe(1e9)
    assert 1.0 < follows.value < 1.11


def test_a_quantile_that_fades_comes_back_to_where_it_began() -> None:
    follows = Quantile(1.0, quantile=0.95, step=1.0, least=0.1, most=10.0)
    follows.observe(9.0)
    learnt = follows.value
    follows.fade(0.0)
    assert follows.value == learnt
    follows.fade(0.5)
    assert follows.value == pytest.approx(learnt**0.5)
    follows.fade(1.0)
    assert follows.value == 1.0


def test_a_quantile_that_begins_at_nothing_can_fade() -> None:
    nothing = Quantile(0.0, quantile=0.95, step=0.1, least=0.0, most=1.0)
    nothing.fade(0.5)
    assert nothing.value == 0


@given(
    st.floats(1e-6, 1e6),
    st.lists(st.floats(1e-9, 1e9), max_size=60),
    st.floats(0.01, 0.99),
    st.floats(0.001, 5.0),
)
def test_law_a_quantile_stays_in_its_bounds_and_moves_towards_what_it_sees(
    start: float, values: list[float], quantile: float, step: float
) -> None:
    follows = Quantile(start, quantile=quantile, step=step, least=0.5, most=2.0)
    assert 0.5 <= follows.value <= 2.0
    for value in values:
        before = follows.value
        follows.observe(value)
        assert 0.5 <= follows.value <= 2.0
        assert follows.value >= before if value > before else follows.value <= before


# ---- a reserve ----


def test_a_reserve_is_a_tenth_of_the_budget_between_what_most_and_what_nearly_all_answers_take() -> None:
    random = np.random.default_rng(5)
    reserve = Reserve(0.0004, least_s=0.0001, most_s=0.005)
    assert [reserve.of(budget_s) for budget_s in (0.001, 0.05)] == [0.0004, 0.0004]
    for _ in range(3000):
        reserve.observe(0.003 if random.random() < 0.05 else 0.0005)  # one in twenty takes long
    assert reserve.of(0.001) == pytest.approx(0.0005, rel=0.1)
    assert reserve.of(0.015) == pytest.approx(0.0015)
    assert reserve.of(1.0) == reserve.sure_s == pytest.approx(0.003, rel=0.1)


def test_a_reserve_stays_in_its_bounds_and_fades() -> None:
    reserve = Reserve(0.0004, least_s=0.0001, most_s=0.005)
    for way_out_s in [9.0] * 500:
        reserve.observe(way_out_s)
    assert reserve.of(0.0) == reserve.sure_s == 0.005
    reserve.fade(1.0)
    assert reserve.of(0.0) == pytest.approx(0.0004)
    for way_out_s in [0.0] * 5000:
        reserve.observe(way_out_s)
    assert reserve.of(1.0) == reserve.sure_s == 0.0001


# ---- a profile that learns ----

HIGH = 1.2
SPREAD = float(np.log(HIGH) / 1.6449)
"""Of lognormal runs whose 95th percentile is HIGH medians."""


def live(high: float = HIGH) -> LiveProfile:
    return LiveProfile(profile_of(MS, per_image=0.5, high=high), quantile=0.95)


def feed(
    profile: LiveProfile,
    n_runs: int,
    *,
    slowdown: float = 1.0,
    columns: tuple[str, ...] = ("1", "2", "3"),
    sees: Callable[[str, int, float], None] = lambda column, n, run_s: None,
    seed: int = 3,
) -> None:
    """Let it see runs of random columns and sizes, lognormal around the measured median times a slowdown."""
    random = np.random.default_rng(seed)
    for _ in range(n_runs):
        column, n = str(random.choice(columns)), int(random.integers(1, 5))
        median_s = MS[column] / 1e3 * (1 + 0.5 * ((1, 2, 4, 4)[n - 1] - 1))
        run_s = median_s * slowdown * random.lognormal(0.0, SPREAD)
        sees(column, n, run_s)
        profile.observe(column, n, run_s)


def test_it_starts_with_what_was_measured() -> None:
    profile = live()
    assert profile.slowdown == 1
    assert profile.latency("2", 4) == profile_of(MS, per_image=0.5, high=HIGH).latency("2", 4)


def test_the_best_batch_is_the_cheapest_per_image_now() -> None:
    profile = live()
    assert profile.best_batch("1") == pytest.approx((0.001 * 2.5 / 4, 4))
    profile.observe("1", 4, 0.01)
    now = profile.latency("1", 4).median_s
    assert profile.best_batch("1") == min((profile.latency("1", n).median_s / n, n) for n in (1, 2, 4))
    assert now > 0.0025


def test_it_learns_nothing_into_the_profile_that_it_was_given() -> None:
    measured = profile_of(MS)
    LiveProfile(measured, 0.95).observe("1", 1, 0.5)
    assert measured.latency("1", 1) == Latency(0.001, 0.001)


@pytest.mark.parametrize("slowdown", [3.0, 1 / 3])
def test_it_follows_a_machine_that_has_changed_within_some_tens_of_runs(slowdown: float) -> None:
    profile = live()
    feed(profile, 60, slowdown=slowdown)
    for column, ms in MS.items():
        assert profile.latency(column, 1).median_s == pytest.approx(ms / 1e3 * slowdown, rel=0.25)


def test_it_follows_for_columns_that_have_not_run_since() -> None:
    profile = live()
    feed(profile, 60, slowdown=3.0, columns=("1",))
    assert profile.latency("3", 4).median_s == pytest.approx(0.008 * 2.5 * 3, rel=0.35)
    assert profile.slowdown > 2


def test_it_recovers_when_runs_become_fast_again() -> None:
    profile = live()
    feed(profile, 100, slowdown=3.0)
    feed(profile, 100, slowdown=1.0, seed=4)
    for column, ms in MS.items():
        assert profile.latency(column, 1).median_s == pytest.approx(ms / 1e3, rel=0.25)
        assert profile.latency(column, 1).high_s < 1.6 * ms / 1e3


def test_what_was_learnt_fades_while_nothing_is_run() -> None:
    measured, profile = live(), live()
    feed(profile, 100, slowdown=3.0)
    learnt = {column: profile.latency(column, 1) for column in MS}
    profile.fade(0.0)
    for column, before in learnt.items():
        assert profile.latency(column, 1).median_s == pytest.approx(before.median_s)
    profile.fade(profile.MEMORY_S)
    for column, before in learnt.items():
        assert before.median_s / 2.5 < profile.latency(column, 1).median_s < before.median_s / 1.5
    profile.fade(20 * profile.MEMORY_S)
    for column in MS:
        assert profile.latency(column, 1).median_s == pytest.approx(measured.latency(column, 1).median_s)
        assert profile.latency(column, 1).high_s == pytest.approx(measured.latency(column, 1).high_s)


def test_what_the_machine_as_a_whole_cannot_explain_is_learned_by_column() -> None:
    profile = live()
    for _ in range(600):
        profile.observe("1", 1, 0.001)
        profile.observe("2", 1, 0.003)
        profile.observe("3", 1, 0.016)
    medians_ms = {column: profile.latency(column, 1).median_s * 1e3 for column in MS}
    assert medians_ms == pytest.approx({"1": 1.0, "2": 3.0, "3": 16.0}, rel=0.2)


def test_one_run_of_fifty_times_its_length_hardly_moves_it() -> None:
    profile = live()
    feed(profile, 50)
    before = {column: profile.latency(column, 1) for column in MS}
    ratio = profile.observe("2", 1, 50 * before["2"].median_s)
    assert ratio == pytest.approx(50)
    for column, latency in before.items():
        after = profile.latency(column, 1)
        assert latency.median_s <= after.median_s < 1.2 * latency.median_s
        assert latency.high_s <= after.high_s < 1.25 * latency.high_s


@pytest.mark.parametrize("measured_high", [1.0, HIGH, 2.0])
@pytest.mark.parametrize("slowdown", [1.0, 2.0])
def test_the_high_quantile_is_exceeded_by_as_many_as_it_says(slowdown: float, measured_high: float) -> None:
    """However wrong the measured spread was."""
    profile, exceeded = live(measured_high), 0

    def sees(column: str, n: int, run_s: float) -> None:
        nonlocal exceeded
        exceeded += run_s > profile.latency(column, n).high_s

    feed(profile, 500, slowdown=slowdown)
    feed(profile, 2000, slowdown=slowdown, seed=4, sees=sees)
    assert exceeded / 2000 == pytest.approx(0.05, abs=0.02)


def test_where_nothing_varies_the_median_is_never_above_high() -> None:
    profile = live(high=1.0)
    for _ in range(100):
        profile.observe("2", 1, 0.0029)
        assert profile.latency("2", 1).median_s <= profile.latency("2", 1).high_s


def test_half_of_all_runs_exceed_the_median() -> None:
    profile, exceeded = live(), 0

    def sees(column: str, n: int, run_s: float) -> None:
        nonlocal exceeded
        exceeded += run_s > profile.latency(column, n).median_s

    feed(profile, 500)
    feed(profile, 2000, seed=4, sees=sees)
    assert exceeded / 2000 == pytest.approx(0.5, abs=0.06)


runs = st.lists(
    st.tuples(
        st.sampled_from(COLUMNS),
        st.just(1),
        st.sampled_from([0.0, 1e-6, 1e-3, 0.01, 1.0, 3600.0]) | st.floats(0, 100),
    ),
    max_size=50,
)


@given(profiles(), runs)
def test_law_predictions_stay_positive_and_finite_and_the_median_is_never_above_high(
    measured: LatencyProfile, runs: list[tuple[str, int, float]]
) -> None:
    profile = LiveProfile(measured, 0.95)
    for run in runs:
        assert profile.observe(*run) > 0
        for _, by_size in profile.items():  # noqa: PERF102 - no dictionary
            for latency in by_size.values():
                assert 0 < latency.median_s <= latency.high_s < float("inf")
        assert 0 < profile.slowdown < float("inf")


@given(st.floats(1.0, 30.0))
def test_law_a_slower_run_is_never_learned_as_a_faster_one(factor: float) -> None:
    slow, as_ever = LiveProfile(GAIN, 0.95), LiveProfile(GAIN, 0.95)
    as_ever.observe("1", 1, 0.001)
    slow.observe("1", 1, 0.001 * factor)
    for column in MS:
        assert slow.latency(column, 2).median_s >= as_ever.latency(column, 2).median_s
        assert slow.latency(column, 2).high_s >= as_ever.latency(column, 2).high_s


def test_what_a_preemption_takes_is_learnt_and_where_there_is_none_it_never_ends() -> None:
    assert LiveProfile(GAIN, 0.95).preemption_s == math.inf
    profile = LiveProfile(GAIN, 0.8, preemption_s=0.0003)
    assert profile.preemption_s == 0.0003
    for _ in range(300):
        profile.observe_preemption(0.0008)
    assert profile.preemption_s == pytest.approx(0.0008, rel=0.1)
    profile.observe_preemption(50.0)
    assert profile.preemption_s < 0.001  # one that took for ever is one
