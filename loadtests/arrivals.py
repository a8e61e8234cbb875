"""When requests are sent, with which budget and which picture: schedules drawn from a seed, or recorded ones.

A schedule is made before the first request is sent and never waits for an answer: the load is open-loop.
Every random number comes from the generator that is handed in: the same seed gives the same schedule. Must
not know a clock, HTTP, or what becomes of a request.

Each shape returns ascending times of sending [s, from the start, below `duration_s`], possibly none; two may
coincide. It raises ValueError for a rate or a duration that is not above 0. A million take under a second.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NAMES = ("poisson", "gamma-2", "gamma-4", "gamma-8", "diurnal", "spike", "ramp", "azure")
"""The shapes that `named` knows."""

HEADER = "at_s,budget_ms,image"

# For `azure`. They make timers a sixth of the functions and 2 % of the calls (in the paper 16 % and 2 %), and
# let a run of ten seconds or more see many bursts.
N_FUNCTIONS = 400
ZIPF_EXPONENT = 1.2
BURST_S = 1.0
BETWEEN_BURSTS_S = 10.0
TIMER_JITTER = 0.05


@dataclass(frozen=True, eq=False)
class Arrivals:
    """One row per request, in the order of sending.

    Attributes:
        at_s: When to send [s, from the start]; ascending, the first at 0 or later.
        budget_s: What the request grants [s]; above 0.
        image: Index of the picture to send; 0 or more.

    Raises:
        ValueError: the arrays do not fit together, are empty, or hold a value outside these bounds.
    """

    at_s: Floats
    budget_s: Floats
    image: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not self.at_s.shape == self.budget_s.shape == self.image.shape == (len(self.at_s),):
            raise ValueError("at_s, budget_s and image must be one-dimensional and equally long")
        if not len(self.at_s):
            raise ValueError("a schedule without requests shows nothing: raise the rate or the duration")
        if not np.isfinite(self.at_s).all() or self.at_s[0] < 0 or (np.diff(self.at_s) < 0).any():
            raise ValueError("at_s must be finite, ascending, and begin at 0 or later: sort it")
        if not (np.isfinite(self.budget_s) & (self.budget_s > 0)).all():
            raise ValueError("budget_s must be finite and above 0: else there is no deadline")
        if (self.image < 0).any():
            raise ValueError("image must be 0 or more: it is an index into the pictures")

    def __len__(self) -> int:
        return len(self.at_s)

    def write(self, path: Path) -> None:
        """Record the schedule as CSV; `read` gives back exactly this one."""
        budget_ms = {b: f"{Decimal(repr(b)).scaleb(3):f}" for b in np.unique(self.budget_s).tolist()}
        columns = zip(self.at_s.tolist(), self.budget_s.tolist(), self.image.tolist(), strict=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{HEADER}\n")
            file.writelines(f"{at_s!r},{budget_ms[budget_s]},{image}\n" for at_s, budget_s, image in columns)


def read(path: Path) -> Arrivals:
    """A schedule that was recorded by `Arrivals.write` or by others in the same form.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is wrong; the message names it and says what to do.
    """
    rows: list[tuple[float, float, int]] = []
    with path.open(encoding="utf-8", errors="replace") as file:  # a broken byte then fails with its line
        if file.readline().strip() != HEADER:
            raise ValueError(f"{path}, line 1 is not the header: let the file begin with {HEADER}")
        for number, line in enumerate(file, start=2):
            try:
                rows.append(_row(line, rows[-1][0] if rows else 0.0))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} {error}") from error
    if not rows:
        raise ValueError(f"{path}, line 1 is the last: let at least one request follow")
    at_s, budget_s, image = zip(*rows, strict=True)
    return Arrivals(np.array(at_s), np.array(budget_s), np.array(image, np.int64))


def _row(line: str, earliest_s: float) -> tuple[float, float, int]:
    try:
        at_text, budget_text, image_text = line.split(",")
        at_s, image = float(at_text), int(image_text)
        budget_s = float(Decimal(budget_text.strip()).scaleb(-3))
    except (ValueError, InvalidOperation) as error:
        raise ValueError(f"is not three numbers ({HEADER}): mend or remove it") from error
    if not earliest_s <= at_s < math.inf:
        raise ValueError("goes back in time or has no finite time: sort the lines by at_s, from 0 up")
    if not 0 < budget_s < math.inf:
        raise ValueError("grants no budget: give a budget_ms above 0")
    if not 0 <= image < 2**63:
        raise ValueError("names no picture: give an index of 0 or more")
    return at_s, budget_s, image


def schedule(
    at_s: Floats,
    *,
    budgets_s: Sequence[float],
    weights: Sequence[float] | None = None,
    n_images: int,
    rng: np.random.Generator,
) -> Arrivals:
    """Give each request a budget and a picture, independently of all others.

    Args:
        at_s: When to send [s], ascending.
        budgets_s: The mix of budgets [s].
        weights: How often each budget comes, relative to the others; None for equally often.
        n_images: Pictures to choose from, each equally likely.
        rng: Source of every random number.

    Raises:
        ValueError: the mix is empty, its weights do not fit it, or there is no picture or no request.
    """
    shares = np.ones(len(budgets_s)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(budgets_s),) or not (shares >= 0).all() or not 0 < shares.sum() < math.inf:
        raise ValueError("give one weight per budget, at least one budget, no weight below 0, and one above")
    if n_images < 1:
        raise ValueError("there is no picture to send: give n_images of 1 or more")
    budget_s = rng.choice(np.asarray(budgets_s, np.float64), size=len(at_s), p=shares / shares.sum())
    return Arrivals(at_s, budget_s, rng.integers(n_images, size=len(at_s), dtype=np.int64))


def poisson(rate_hz: float, duration_s: float, *, rng: np.random.Generator) -> Floats:
    """Independent callers: a Poisson process."""
    _require_positive(rate_hz=rate_hz, duration_s=duration_s)
    return np.sort(rng.random(rng.poisson(rate_hz * duration_s)) * duration_s)


def gamma(rate_hz: float, duration_s: float, cv: float, *, rng: np.random.Generator) -> Floats:
    """Bursts without memory: gaps between requests are gamma distributed, one independent of the next.

    Args:
        rate_hz: Mean rate, from the first moment on: the process is entered in its steady state.
        duration_s: Length of the schedule [s].
        cv: Standard deviation of a gap over its mean; 1 is a Poisson process, more is burstier.
        rng: Source of every random number.

    Source: a stationary renewal process begins with a uniform part of a gap drawn in proportion to its length
    (Cox, "Renewal Theory", 1962); for gamma gaps of shape k, such a gap is gamma of shape k + 1.
    """
    _require_positive(rate_hz=rate_hz, duration_s=duration_s, cv=cv)
    shape, scale_s = cv**-2, cv**2 / rate_hz
    n_mean = rate_hz * duration_s
    n_drawn = math.ceil(n_mean + 4 * cv * math.sqrt(n_mean)) + 1
    blocks = [np.array([rng.random() * rng.gamma(shape + 1, scale_s)])]
    while blocks[-1][-1] < duration_s:
        blocks.append(blocks[-1][-1] + np.cumsum(rng.gamma(shape, scale_s, n_drawn)))
    at_s = np.concatenate(blocks)
    return at_s[at_s < duration_s]


def diurnal(
    rate_hz: float, duration_s: float, period_s: float, swing: float, *, rng: np.random.Generator
) -> Floats:
    """Day and night: the rate swings as a cosine from (1 - swing) to (1 + swing) x `rate_hz`, lowest at 0.

    Args:
        rate_hz: Mean rate over whole periods.
        duration_s: Length of the schedule [s].
        period_s: Length of one day [s].
        swing: 0 (none) to 1 (nights without a request).
        rng: Source of every random number.
    """
    _require_positive(rate_hz=rate_hz, duration_s=duration_s, period_s=period_s)
    if not 0 <= swing <= 1:
        raise ValueError(f"a swing of {swing} makes rates below 0: give 0 to 1")
    return _thinned(
        lambda at_s: rate_hz * (1 - swing * np.cos(2 * np.pi * at_s / period_s)),
        rate_hz * (1 + swing),
        duration_s,
        rng,
    )


def spike(
    rate_hz: float, duration_s: float, factor: float, from_s: float, to_s: float, *, rng: np.random.Generator
) -> Floats:
    """A crowd comes and goes: `rate_hz`, but `factor` times as much from `from_s` up to `to_s`."""
    _require_positive(rate_hz=rate_hz, duration_s=duration_s, factor=factor)
    if not 0 <= from_s < to_s <= duration_s:
        raise ValueError(f"the spike from {from_s} s to {to_s} s must lie within 0 to {duration_s} s")
    return _thinned(
        lambda at_s: rate_hz * np.where((from_s <= at_s) & (at_s < to_s), factor, 1.0),
        rate_hz * max(factor, 1.0),
        duration_s,
        rng,
    )


def ramp(from_hz: float, to_hz: float, duration_s: float, *, rng: np.random.Generator) -> Floats:
    """The rate goes evenly from `from_hz` to `to_hz`; one of them may be 0."""
    _require_positive(duration_s=duration_s, the_higher_rate_hz=max(from_hz, to_hz))
    if min(from_hz, to_hz) < 0:
        raise ValueError("a ramp begins and ends at a rate of 0 or more")
    return _thinned(
        lambda at_s: from_hz + (to_hz - from_hz) * at_s / duration_s, max(from_hz, to_hz), duration_s, rng
    )


def azure(rate_hz: float, duration_s: float, *, rng: np.random.Generator) -> Floats:
    """Calls as a cloud of small functions makes them. Made to resemble Azure Functions; not the trace itself.

    `N_FUNCTIONS` independent functions share the calls by Zipf's law, so that a few make most of them. Every
    third of the less called half is a timer: periodic, with jitter. The others alternate, by rank, between
    steady (Poisson) and bursting: silent but for bursts of `BURST_S`, one in about `BETWEEN_BURSTS_S`, both
    on average. In every run the expected calls of each function are its share of `rate_hz`: bursts only move
    calls together.

    Source: it resembles what Shahrad et al., "Serverless in the Wild", USENIX ATC 2020, report: call rates
    apart by orders of magnitude, timers that are many but call little, and bursts. Shapes and constants are a
    choice, no fit.
    """
    _require_positive(rate_hz=rate_hz, duration_s=duration_s)
    share = np.arange(1, N_FUNCTIONS + 1) ** -ZIPF_EXPONENT
    rates_hz = rate_hz * share / share.sum()
    rank = np.arange(N_FUNCTIONS)
    is_timer = (rank >= N_FUNCTIONS // 2) & (rank % 3 == 0)
    is_bursting = ~is_timer & (rank % 2 == 1)
    steady_hz = float(rates_hz[~is_timer & ~is_bursting].sum())  # together they are one Poisson process
    functions = [poisson(steady_hz, duration_s, rng=rng)]
    functions += [_timer(function_hz, duration_s, rng) for function_hz in rates_hz[is_timer].tolist()]
    functions += [_bursting(function_hz, duration_s, rng) for function_hz in rates_hz[is_bursting].tolist()]
    return np.sort(np.concatenate(functions))


def named(name: str, *, rate_hz: float, duration_s: float, rng: np.random.Generator) -> Floats:
    """A shape by the name that command lines use, with what the name does not say filled in.

    Args:
        name: One of `NAMES`. poisson and azure; gamma-2, -4 and -8: gaps of that coefficient of variation;
            diurnal: one period, from 0.2 x up to 1.8 x and back. All these have `rate_hz` as their mean rate.
            spike: 3 x in the middle fifth, which makes the mean 1.4 x. ramp: from 0 to 1.5 x, mean 0.75 x.
        rate_hz: The rate that the name multiplies.
        duration_s: Length of the schedule [s].
        rng: Source of every random number.

    Raises:
        ValueError: no such name.
    """
    match name:
        case "poisson":
            return poisson(rate_hz, duration_s, rng=rng)
        case "gamma-2" | "gamma-4" | "gamma-8":
            return gamma(rate_hz, duration_s, float(name.removeprefix("gamma-")), rng=rng)
        case "diurnal":
            return diurnal(rate_hz, duration_s, period_s=duration_s, swing=0.8, rng=rng)
        case "spike":
            return spike(rate_hz, duration_s, 3.0, 0.4 * duration_s, 0.6 * duration_s, rng=rng)
        case "ramp":
            return ramp(0.0, 1.5 * rate_hz, duration_s, rng=rng)
        case "azure":
            return azure(rate_hz, duration_s, rng=rng)
    raise ValueError(f"there are no arrivals named {name!r}: choose one of {', '.join(NAMES)}")


def _thinned(
    rate_of: Callable[[Floats], Floats], peak_hz: float, duration_s: float, rng: np.random.Generator
) -> Floats:
    """Poisson process of a changing rate: Lewis and Shedler, Naval Research Logistics 26(3), 1979."""
    at_s = poisson(peak_hz, duration_s, rng=rng)
    return at_s[rng.random(len(at_s)) * peak_hz < rate_of(at_s)]


def _timer(rate_hz: float, duration_s: float, rng: np.random.Generator) -> Floats:
    """Ticks of one period from a random moment on, each late by a random part of `TIMER_JITTER` periods."""
    ticks = np.arange(rng.random(), rate_hz * duration_s)
    return (ticks + TIMER_JITTER * rng.random(len(ticks))) / rate_hz % duration_s


def _bursting(rate_hz: float, duration_s: float, rng: np.random.Generator) -> Floats:
    """A Poisson number of calls, all of them inside a few randomly placed bursts of equal rate."""
    n_bursts = 1 + rng.poisson(duration_s / BETWEEN_BURSTS_S)
    begin_s, length_s = rng.random(n_bursts) * duration_s, rng.exponential(BURST_S, n_bursts)
    burst = rng.choice(n_bursts, size=rng.poisson(rate_hz * duration_s), p=length_s / length_s.sum())
    return (begin_s[burst] + rng.random(len(burst)) * length_s[burst]) % duration_s


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: give a finite number above 0")
