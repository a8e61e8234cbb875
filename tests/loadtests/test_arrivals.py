"""Schedules: the rate and burstiness that they promise, the same from the same seed, and exact on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadtests import arrivals
from loadtests.arrivals import Arrivals

Floats = NDArray[np.float64]

MEAN_OF = {"spike": 1.4, "ramp": 0.75}
"""Mean rate of a named shape over the rate that it is given, where it is not 1."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cv(at_s: Floats) -> float:
    gaps_s = np.diff(at_s)
    return float(gaps_s.std() / gaps_s.mean())


def dispersion(at_s: Floats, bin_s: float) -> float:
    """Variance over mean of the counts per bin: 1 for a Poisson process."""
    counts = np.bincount((at_s / bin_s).astype(int))
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize("name", arrivals.NAMES)
def test_a_named_shape_keeps_its_mean_rate_and_its_order(name: str) -> None:
    at_s = [arrivals.named(name, rate_hz=500, duration_s=40, rng=rng(seed)) for seed in range(20)]

    for one in at_s:
        assert one[0] >= 0
        assert one[-1] < 40
        assert (np.diff(one) >= 0).all()
    n_mean = np.mean([len(one) for one in at_s])
    assert n_mean == pytest.approx(MEAN_OF.get(name, 1.0) * 500 * 40, rel=0.03)


@pytest.mark.parametrize("name", arrivals.NAMES)
def test_the_seed_decides_the_schedule(name: str) -> None:
    one, same, other = (arrivals.named(name, rate_hz=100, duration_s=5, rng=rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gamma-3.*choose one of poisson, gamma-2"):
        arrivals.named("gamma-3", rate_hz=1, duration_s=1, rng=rng())


@pytest.mark.parametrize(
    ("name", "expected"), [("poisson", 1), ("gamma-2", 2), ("gamma-4", 4), ("gamma-8", 8)]
)
def test_gaps_vary_as_the_name_says(name: str, expected: float) -> None:
    at_s = arrivals.named(name, rate_hz=1000, duration_s=300, rng=rng(3))
    assert cv(at_s) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("coefficient", [0.2, 1.0, 4.0])
def test_a_gamma_process_has_its_rate_from_the_first_moment(coefficient: float) -> None:
    """A process that began with a request would have too many at first when bursty, too few when regular."""
    n_early = [len(arrivals.gamma(100, 0.01, coefficient, rng=rng(seed))) for seed in range(4000)]
    assert np.mean(n_early) == pytest.approx(1.0, abs=0.2)


def test_gaps_below_a_poisson_process_are_regular() -> None:
    assert cv(arrivals.gamma(100, 300, 0.2, rng=rng())) == pytest.approx(0.2, rel=0.03)


def test_a_day_is_quiet_at_its_ends_and_busy_in_its_middle() -> None:
    at_s = arrivals.diurnal(1000, 200, period_s=100, swing=0.8, rng=rng())
    counts = np.bincount((at_s % 100 / 10).astype(int)) / 2 / 10  # per second of a tenth of a day
    middles = (np.arange(10) + 0.5) / 10
    assert counts == pytest.approx(1000 * (1 - 0.8 * np.cos(2 * np.pi * middles)), rel=0.1)


def test_a_spike_multiplies_the_rate_inside_its_window_only() -> None:
    at_s = arrivals.spike(2000, 10, 3, 4, 6, rng=rng())
    is_inside = (at_s >= 4) & (at_s < 6)
    assert is_inside.sum() / 2 == pytest.approx(6000, rel=0.05)
    assert (~is_inside).sum() / 8 == pytest.approx(2000, rel=0.05)


def test_a_lull_is_a_spike_below_one() -> None:
    at_s = arrivals.spike(2000, 10, 0.5, 0, 5, rng=rng())
    assert (at_s < 5).sum() / 5 == pytest.approx(1000, rel=0.05)
    assert (at_s >= 5).sum() / 5 == pytest.approx(2000, rel=0.05)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(0, 2000), (2000, 0), (500, 1500)])
def test_a_ramp_goes_evenly_from_one_rate_to_the_other(from_hz: float, to_hz: float) -> None:
    at_s = arrivals.ramp(from_hz, to_hz, 20, rng=rng())
    quarters_hz = np.bincount((at_s / 5).astype(int), minlength=4) / 5
    assert quarters_hz == pytest.approx(from_hz + (to_hz - from_hz) * np.array([1, 3, 5, 7]) / 8, rel=0.1)


def test_many_small_functions_come_in_bursts_and_yet_keep_the_rate_of_each_run() -> None:
    for seed in range(5):
        at_s = arrivals.azure(1000, 60, rng=rng(seed))
        assert len(at_s) == pytest.approx(60_000, rel=0.02)
        assert dispersion(at_s, 0.1) > 4
        assert dispersion(arrivals.poisson(1000, 60, rng=rng(seed)), 0.1) < 1.3


def test_few_calls_a_minute_are_still_the_right_number() -> None:
    """Most functions then call less than once in a run; none may be rounded away or up."""
    n_calls = [len(arrivals.azure(0.5, 20, rng=rng(seed))) for seed in range(300)]
    assert np.mean(n_calls) == pytest.approx(10, rel=0.08)


def test_a_timer_ticks_in_its_period() -> None:
    at_s = np.sort(arrivals._timer(2.0, 100.0, rng()))
    gaps_s = np.diff(at_s)
    assert gaps_s.mean() == pytest.approx(0.5, rel=0.02)
    assert gaps_s.std() < 0.05


def test_bursts_leave_silence_between_them() -> None:
    at_s = arrivals._bursting(100.0, 200.0, rng())
    busy = np.unique(at_s.astype(int))
    assert len(at_s) == pytest.approx(20_000, rel=0.03)
    assert len(busy) < 100


@given(
    rate_hz=st.floats(0.1, 300),
    duration_s=st.floats(0.1, 10),
    name=st.sampled_from(arrivals.NAMES),
    seed=st.integers(0, 2**32),
)
def test_every_schedule_lies_within_its_duration_and_ascends(
    rate_hz: float, duration_s: float, name: str, seed: int
) -> None:
    at_s = arrivals.named(name, rate_hz=rate_hz, duration_s=duration_s, rng=rng(seed))
    assert at_s.dtype == np.float64
    assert ((at_s >= 0) & (at_s < duration_s)).all()
    assert (np.diff(at_s) >= 0).all()


Shape = Callable[[], Floats]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (lambda: arrivals.poisson(0, 1, rng=rng()), "rate_hz is 0: give a finite number above 0"),
        (lambda: arrivals.poisson(1, float("inf"), rng=rng()), "duration_s is inf"),
        (lambda: arrivals.gamma(1, 1, -1, rng=rng()), "cv is -1"),
        (lambda: arrivals.diurnal(1, 1, 0, 0.5, rng=rng()), "period_s is 0"),
        (lambda: arrivals.diurnal(1, 1, 1, 1.5, rng=rng()), "give 0 to 1"),
        (lambda: arrivals.spike(1, 1, 3, 0.5, 2, rng=rng()), "must lie within"),
        (lambda: arrivals.spike(1, 1, 3, 0.5, 0.5, rng=rng()), "must lie within"),
        (lambda: arrivals.spike(1, 1, float("nan"), 0, 1, rng=rng()), "factor is nan"),
        (lambda: arrivals.ramp(0, 0, 1, rng=rng()), "the_higher_rate_hz is 0"),
        (lambda: arrivals.ramp(-1, 1, 1, rng=rng()), "0 or more"),
        (lambda: arrivals.azure(-5, 1, rng=rng()), "rate_hz is -5"),
    ],
)
def test_a_shape_refuses_what_it_cannot_be(shape: Shape, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shape()


def test_budgets_come_in_their_mix_and_pictures_evenly() -> None:
    mixed = arrivals.schedule(
        np.arange(40_000) / 1e3, budgets_s=[0.002, 0.005, 0.05], weights=[1, 2, 1], n_images=10, rng=rng()
    )
    assert len(mixed) == 40_000
    share = [float((mixed.budget_s == budget_s).mean()) for budget_s in (0.002, 0.005, 0.05)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert np.bincount(mixed.image) / 40_000 == pytest.approx([0.1] * 10, abs=0.01)
    is_short = mixed.budget_s == 0.002
    assert abs(np.corrcoef(is_short[1:], is_short[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(mixed.budget_s, mixed.image)[0, 1]) < 0.02


def test_without_weights_each_budget_comes_equally_often() -> None:
    mixed = arrivals.schedule(np.arange(20_000.0), budgets_s=[0.002, 0.005], n_images=1, rng=rng())
    assert (mixed.budget_s == 0.002).mean() == pytest.approx(0.5, abs=0.02)
    assert not mixed.image.any()


def test_a_budget_of_no_weight_never_comes() -> None:
    mixed = arrivals.schedule(
        np.arange(500.0), budgets_s=[0.002, 0.005], weights=[0, 1], n_images=1, rng=rng()
    )
    assert (mixed.budget_s == 0.005).all()


@pytest.mark.parametrize(
    ("budgets_s", "weights", "n_images", "reason"),
    [
        ([], None, 1, "at least one budget"),
        ([0.1], [1, 2], 1, "one weight per budget"),
        ([0.1, 0.2], [2, -1], 1, "no weight below 0"),
        ([0.1, 0.2], [0, 0], 1, "and one above"),
        ([0.1], None, 0, "n_images of 1 or more"),
        ([0.0], None, 1, "budget_s must be finite and above 0"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(
    budgets_s: list[float], weights: list[float] | None, n_images: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        arrivals.schedule(np.array([0.0]), budgets_s=budgets_s, weights=weights, n_images=n_images, rng=rng())


@pytest.mark.parametrize(
    ("at_s", "budget_s", "image", "reason"),
    [
        ([], [], [], "raise the rate or the duration"),
        ([0.0, 1.0], [0.1], [0], "equally long"),
        ([0.0, 1.0], [0.1, 0.1], [0], "equally long"),
        ([1.0, 0.5], [0.1, 0.1], [0, 0], "ascending"),
        ([-1.0, 0.5], [0.1, 0.1], [0, 0], "begin at 0"),
        ([0.0, np.nan], [0.1, 0.1], [0, 0], "finite"),
        ([0.0, 1.0], [0.1, 0.0], [0, 0], "budget_s"),
        ([0.0, 1.0], [0.1, np.inf], [0, 0], "budget_s"),
        ([0.0, 1.0], [0.1, 0.1], [0, -1], "index into the pictures"),
    ],
)
def test_inconsistent_arrivals_are_refused(
    at_s: list[float], budget_s: list[float], image: list[int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Arrivals(np.array(at_s), np.array(budget_s), np.array(image, np.int64))


def test_a_recorded_schedule_is_text_that_others_can_write(tmp_path: Path) -> None:
    Arrivals(np.array([0.0, 0.25]), np.array([0.05, 0.0077]), np.array([3, 0])).write(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "at_s,budget_ms,image\n0.0,50,3\n0.25,7.7,0\n"

    (tmp_path / "b.csv").write_bytes(b"at_s,budget_ms,image\r\n 0, 5.0 ,3\r\n1e-1,5e1,0")
    theirs = arrivals.read(tmp_path / "b.csv")
    assert theirs.at_s.tolist() == [0.0, 0.1]
    assert theirs.budget_s.tolist() == [0.005, 0.05]
    assert theirs.image.tolist() == [3, 0]


some_rows = st.lists(st.tuples(st.floats(0, 1e9), st.floats(1e-9, 1e9), st.integers(0, 2**62)), min_size=1)


@given(some=some_rows)
def test_what_is_written_is_read_back_exactly(
    some: list[tuple[float, float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    at_s, budget_s, image = zip(*some, strict=True)
    written = Arrivals(np.sort(np.array(at_s)), np.array(budget_s), np.array(image, np.int64))
    path = tmp_path_factory.mktemp("arrivals") / "a.csv"
    written.write(path)
    back = arrivals.read(path)
    for name in ("at_s", "budget_s", "image"):
        assert np.array_equal(getattr(back, name), getattr(written, name))
        assert getattr(back, name).dtype == getattr(written, name).dtype


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 is not the header: let the file begin with at_s,budget_ms,image"),
        ("0,5,1\n", "line 1 is not the header"),
        ("at_s,budget_ms,image\n", "line 1 is the last: let at least one request follow"),
        ("at_s,budget_ms,image\n0,5,1\n0.1,5\n", "line 3 is not three numbers"),
        ("at_s,budget_ms,image\n0,5,1,7\n", "line 2 is not three numbers"),
        ("at_s,budget_ms,image\n0,5,1\n\n1,5,1\n", "line 3 is not three numbers"),
        ("at_s,budget_ms,image\n0,five,1\n", "line 2 is not three numbers.*mend or remove it"),
        ("at_s,budget_ms,image\n0,5,1.5\n", "line 2 is not three numbers"),
        ("at_s,budget_ms,image\n0,5,\xff\n", "line 2 is not three numbers"),
        ("at_s,budget_ms,image\n1,5,1\n0.9,5,1\n", "line 3 goes back in time.*sort the lines"),
        ("at_s,budget_ms,image\n-1,5,1\n", "line 2 goes back in time"),
        ("at_s,budget_ms,image\nnan,5,1\n", "line 2 goes back in time or has no finite time"),
        ("at_s,budget_ms,image\ninf,5,1\n", "line 2 goes back in time or has no finite time"),
        ("at_s,budget_ms,image\n0,0,1\n", "line 2 grants no budget: give a budget_ms above 0"),
        ("at_s,budget_ms,image\n0,nan,1\n", "line 2 grants no budget"),
        ("at_s,budget_ms,image\n0,1e999,1\n", "line 2 grants no budget"),
        ("at_s,budget_ms,image\n0,5,-1\n", "line 2 names no picture: give an index of 0 or more"),
        ("at_s,budget_ms,image\n0,5,9999999999999999999\n", "line 2 names no picture"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"bad.csv, {reason}"):
        arrivals.read(path)
