"""How long runs take: latencies measured by column and batch size, and kept current while serving.

Pure: must not know of clocks, I/O, event loops, arrays or requests. The server and the simulator share it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LIKELY_MARGIN = 1.1
"""A refinement is likely to take at most this many medians. Half of all runs exceed one median; overrunning
costs no deadline (the answer in hand is sent on time) but wastes the run, so a little room is worth it."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured time of one run [s]: the median and a high quantile."""

    median_s: float
    high_s: float

    @property
    def likely_s(self) -> float:
        """What a run rarely exceeds by much: for optional work."""
        return min(self.high_s, LIKELY_MARGIN * self.median_s)


class LatencyProfile:
    """Latency by column and batch size on one machine.

    A batch between two measured sizes counts as the larger: exact where batches are padded, pessimistic
    elsewhere.

    Raises:
        ValueError: a column lacks a batch size that another has, or nothing was measured; measure all of
            them.
    """

    def __init__(self, latencies: Mapping[str, Mapping[int, Latency]]) -> None:
        sizes = {tuple(sorted(by_size)) for by_size in latencies.values()}
        if len(sizes) != 1 or not (batch_sizes := sizes.pop()) or batch_sizes[0] != 1:
            raise ValueError(
                "every column needs a latency for the same batch sizes, 1 among them: measure all of them"
            )
        self.batch_sizes = batch_sizes
        self._latencies = {column: dict(by_size) for column, by_size in latencies.items()}
        self._best_batch: dict[str, tuple[float, int]] = {}

    @property
    def preemption_s(self) -> float:
        """How long a run goes on that is told to end [s]; infinite where it cannot be told."""
        return math.inf

    def best_batch(self, column: str) -> tuple[float, int]:
        """Time per image in the batches that are cheapest per image [s], and their size."""
        if (best := self._best_batch.get(column)) is None:
            best = min((self.latency(column, size).median_s / size, size) for size in self.batch_sizes)
            self._best_batch[column] = best
        return best

    def latency(self, column: str, n_images: int) -> Latency:
        """Latency of a batch, from the next measured size up.

        Raises:
            ValueError: no measured batch is that large; make smaller ones.
        """
        return self._latencies[column][self.measured_size(n_images)]

    def measured_size(self, n_images: int) -> int:
        """The measured batch size that a batch counts as.

        Raises:
            ValueError: no measured batch is that large; make smaller ones.
        """
        i = bisect_left(self.batch_sizes, n_images)
        if i == len(self.batch_sizes):
            raise ValueError(f"no batch of {n_images} was measured: take at most {self.batch_sizes[-1]}")
        return self.batch_sizes[i]

    def items(self) -> Iterable[tuple[str, Mapping[int, Latency]]]:
        """Every column with its latencies by batch size."""
        return self._latencies.items()


class Quantile:
    """Follows one quantile of a stream of positive values; a single value, however large, moves it little.

    Each value moves the estimate by a constant factor, up with weight `quantile` if it lies above and down
    with weight 1 - `quantile` if it does not, so that in the long run this share lies above (Robbins and
    Monro, "A stochastic approximation method", 1951, on a logarithmic scale).

    Args:
        start: First estimate.
        quantile: Which one to follow.
        step: Largest relative step. Larger: follows faster, wavers more.
        least: Lower bound of the estimate.
        most: Upper bound of the estimate.
    """

    __slots__ = ("_down", "_least", "_most", "_start", "_up", "value")

    def __init__(self, start: float, *, quantile: float, step: float, least: float, most: float) -> None:
        self._start = self.value = min(max(start, least), most)
        self._up = math.exp(step * quantile)
        self._down = math.exp(-step * (1 - quantile))
        self._least = least
        self._most = most

    def observe(self, value: float) -> None:
        """Take one value in."""
        moved = self.value * (self._up if value > self.value else self._down)
        self.value = min(max(moved, self._least), self._most)

    def fade(self, share: float) -> None:
        """Forget this share of what was learnt, on the logarithmic scale."""
        self.value = self.value ** (1 - share) * self._start**share


class Reserve:
    """What to keep free of a budget for the answer's way out: from being settled to its last byte written.

    A caller with a small budget would lose much by certainty, one with a large budget next to nothing, and
    under load nearly every answer to the latter goes out in the last moment. So the reserve is a tenth of the
    budget, but no less than every other answer takes, and no more than nearly all of them take.

    Args:
        start_s: Before any answer was seen [s].
        least_s: Lower bound [s].
        most_s: Upper bound [s].
    """

    SHARE = 0.1
    LIKELY, SURE = 0.5, 0.98
    STEP = 0.05
    """Largest relative step from one answer to the next. Larger: follows faster, wavers more."""

    def __init__(self, start_s: float, *, least_s: float, most_s: float) -> None:
        self.start_s = min(max(start_s, least_s), most_s)
        """Of every budget, before any answer was seen [s]."""
        self._likely = Quantile(start_s, quantile=self.LIKELY, step=self.STEP, least=least_s, most=most_s)
        self._sure = Quantile(start_s, quantile=self.SURE, step=self.STEP, least=least_s, most=most_s)

    @property
    def sure_s(self) -> float:
        """What nearly all answers take on their way out now [s]."""
        return max(self._likely.value, self._sure.value)

    def of(self, budget_s: float) -> float:
        """The reserve of a budget [s]."""
        return min(max(self.SHARE * budget_s, self._likely.value), self.sure_s)

    def observe(self, way_out_s: float) -> None:
        """Learn from one answer."""
        self._likely.observe(way_out_s)
        self._sure.observe(way_out_s)

    def fade(self, share: float) -> None:
        """Forget this share of what was learnt."""
        self._likely.fade(share)
        self._sure.fade(share)


class LiveProfile(LatencyProfile):
    """A measured profile that follows what runs really take.

    The predicted median of a run is its measured one times a slowdown that all runs share times a residue of
    its own column and batch size: the first follows a machine that became slower as a whole within some ten
    runs, even for what has not been run since; the second what the first cannot explain. The high quantile is
    measured in units of the predicted median and is shared, too, so that it is right for runs that are rare.

    Args:
        measured: Where to start.
        quantile: Which quantile is called high.
        preemption_s: How long a run goes on that is told to end, before that was ever seen; infinite where it
            cannot be told [s]. Its high quantile is learnt.

    Source: a slowdown shared by all configurations is the idea of Wan et al., "ALERT", USENIX ATC 2020 (there
    with a Kalman filter); steps are clipped here, so that one run of 50 times its time counts as one slow
    run.
    """

    SHARED_STEP = 0.15
    """Part of a surprise that the shared slowdown takes over. Larger: follows faster, wavers more."""
    OWN_STEP = 0.05
    """Part of a surprise that a run's own residue takes over."""
    TAIL_STEP = 0.1
    """Relative step of the high quantile."""
    CLIP = 0.5
    """Largest surprise, as a natural logarithm, that counts in full."""
    MEMORY_S = 0.3
    """How long what was learnt lasts when nothing is run [s]. Larger: wary for longer after a slow moment."""
    BOUND = 100.0
    """No slowdown or residue beyond this factor, either way."""
    LEAST_S, MOST_S = 5e-5, 0.1
    """Bounds of what a preemption takes."""

    def __init__(self, measured: LatencyProfile, quantile: float, *, preemption_s: float = math.inf) -> None:
        super().__init__(dict(measured.items()))
        self._preemption: Quantile | None = None
        if preemption_s < math.inf:
            self._preemption = Quantile(
                preemption_s, quantile=quantile, step=self.TAIL_STEP, least=self.LEAST_S, most=self.MOST_S
            )
        self._measured = {column: dict(by_size) for column, by_size in measured.items()}
        self._own_log = {column: dict.fromkeys(by_size, 0.0) for column, by_size in measured.items()}
        self._shared_log = 0.0
        self._tail = Quantile(1.0, quantile=quantile, step=self.TAIL_STEP, least=0.2, most=5.0)

    @property
    def preemption_s(self) -> float:
        """How long a run likely goes on that is told to end [s]; infinite where it cannot be told."""
        return self._preemption.value if self._preemption else math.inf

    @property
    def slowdown(self) -> float:
        """How many times longer runs take now than when they were measured, all columns together."""
        return math.exp(self._shared_log)

    def measured(self, column: str, n_images: int) -> Latency:
        """Latency of a batch when it was measured, whatever was learnt since.

        Raises:
            ValueError: as `latency`.
        """
        return self._measured[column][self.measured_size(n_images)]

    def latency(self, column: str, n_images: int) -> Latency:
        """Predicted latency of a batch now, from the next measured size up.

        Raises:
            ValueError: as `LatencyProfile.latency`.

        Cost: made when first asked for after each run, and found from then on. A decision asks some fifty
        times.
        """
        now = self._latencies[column]
        if (found := now.get(n_images)) is None:
            size = self.measured_size(n_images)
            measured, tail = self._measured[column][size], self._tail.value
            factor = math.exp(self._shared_log + self._own_log[column][size])
            median_s = measured.median_s * factor
            found = now[n_images] = Latency(median_s, max(median_s, measured.high_s * factor * tail))
        return found

    def items(self) -> Iterable[tuple[str, Mapping[int, Latency]]]:
        """Every column with its predicted latencies by batch size."""
        for column in self._measured:
            yield column, {size: self.latency(column, size) for size in self.batch_sizes}

    def observe(self, column: str, n_images: int, run_s: float) -> float:
        """Learn from one run; returns its time in units of the predicted median."""
        size = self.measured_size(n_images)
        ratio = max(run_s, 1e-9) / self.latency(column, size).median_s
        self._tail.observe(ratio * self._spread(column, size))
        surprise = min(max(math.log(ratio), -self.CLIP), self.CLIP)
        bound = math.log(self.BOUND)
        self._shared_log = min(max(self._shared_log + self.SHARED_STEP * surprise, -bound), bound)
        own = self._own_log[column]
        own[size] = min(max(own[size] + self.OWN_STEP * surprise, -bound), bound)
        self._forget_predictions()
        return ratio

    def observe_preemption(self, took_s: float) -> None:
        """Learn from one run that was told to end."""
        if self._preemption:
            self._preemption.observe(took_s)

    def share_left(self, idle_s: float) -> float:
        """How much of what was learnt still counts, if nothing was learnt for this long [s]."""
        return math.exp(-idle_s / self.MEMORY_S)

    def fade(self, idle_s: float) -> None:
        """Forget part of what was learnt, because nothing was learnt for this long [s].

        Without it, a profile of a machine that was slow for a moment could be the reason that nothing is run
        any more, and so that nothing is learnt any more.
        """
        keep = self.share_left(idle_s)
        self._shared_log *= keep
        self._tail.fade(1 - keep)
        if self._preemption:
            self._preemption.fade(1 - keep)
        for own in self._own_log.values():
            for size in own:
                own[size] *= keep
        self._forget_predictions()

    def _spread(self, column: str, size: int) -> float:
        """Brings a ratio to the median to the scale on which 1 was the high quantile when it was measured."""
        measured = self._measured[column][size]
        return measured.median_s / measured.high_s

    def _forget_predictions(self) -> None:
        self._best_batch.clear()
        for now in self._latencies.values():
            now.clear()
