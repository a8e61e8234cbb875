"""The policy: which column to run now, for whom, and who is done. Pure functions of what is given.

Must not know of clocks, I/O, asyncio, arrays or HTTP: the server and a simulator call the very same code.

The shallowest column is mandatory and every deeper one optional (imprecise computation: see Liu et al.,
"Algorithms for scheduling imprecise computations", IEEE Computer 1991). A prediction uses the high quantile
of measured latency where a safer choice remains (to admit, to batch, to open with a deep column) and the
likely latency where it does not.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, Literal, TypeVar, get_args

StoppedBy = Literal["budget", "confidence", "deepest", "load"]
STOPPED_BY: tuple[StoppedBy, ...] = get_args(StoppedBy)

LIKELY_MARGIN = 1.1
"""A refinement is likely to take at most this many medians. Half of all runs exceed one median; overrunning
costs no deadline (the answer in hand is sent on time) but wastes the run, so a little room is worth it. Not
yet tuned."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A waiting request, as far as the policy cares. Only the engine changes one; the policy reads.

    Attributes:
        ready_by_s: Latest time for the result to be there: the deadline less the reserve for writing the
            answer.
        min_confidence: The caller is content with an answer at least this confident; None: never.
        columns_run: Columns that have run, shallow first; empty while there is no answer.
        confidence: Probability of the answer in hand.
        lost_s: Time this ticket has stood still, or gone slower, because of others [s].
    """

    ready_by_s: float
    min_confidence: float | None = None
    columns_run: tuple[str, ...] = ()
    confidence: float = 0.0
    lost_s: float = 0.0


TicketT = TypeVar("TicketT", bound=Ticket)


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

    def latency(self, column: str, n_images: int) -> Latency:
        """Latency of a batch, from the next measured size up.

        Raises:
            ValueError: no measured batch is that large; make smaller ones.
        """
        i = bisect_left(self.batch_sizes, n_images)
        if i == len(self.batch_sizes):
            raise ValueError(f"no batch of {n_images} was measured: take at most {self.batch_sizes[-1]}")
        return self._latencies[column][self.batch_sizes[i]]

    def items(self) -> Iterable[tuple[str, Mapping[int, Latency]]]:
        """Every column with its latencies by batch size."""
        return self._latencies.items()


@dataclass(frozen=True, slots=True)
class Improvement:
    """Columns that, run after those already run, give an answer of higher measured accuracy."""

    added: tuple[str, ...]
    accuracy: float


class Ladder:
    """What each combination of columns is worth, by accuracy on held-out images.

    A combination without a measured accuracy is worth its deepest column alone, which is then also its
    answer.

    Raises:
        ValueError: a column has no accuracy of its own; give one.
    """

    def __init__(self, columns: Sequence[str], accuracy: Mapping[tuple[str, ...], float]) -> None:
        if missing := [column for column in columns if (column,) not in accuracy]:
            raise ValueError(f"column {missing[0]} has no accuracy of its own: measure each single column")
        self.columns = tuple(columns)
        self._accuracy = dict(accuracy)
        self._improvements = {
            run: self._find_improvements(run)
            for size in range(len(self.columns) + 1)
            for run in combinations(self.columns, size)
        }

    @property
    def shallowest(self) -> str:
        """The mandatory column."""
        return self.columns[0]

    def accuracy(self, columns_run: tuple[str, ...]) -> float:
        """Held-out accuracy of the answer after these columns; 0 when none has run."""
        if not columns_run:
            return 0.0
        return self._accuracy.get(columns_run, self._accuracy[columns_run[-1:]])

    def improvements(self, columns_run: tuple[str, ...]) -> tuple[Improvement, ...]:
        """Every way on to a more accurate answer through deeper columns, the most accurate first."""
        return self._improvements[columns_run]

    def _find_improvements(self, columns_run: tuple[str, ...]) -> tuple[Improvement, ...]:
        deeper = self.columns[self.columns.index(columns_run[-1]) + 1 :] if columns_run else self.columns
        ways = (added for size in range(1, len(deeper) + 1) for added in combinations(deeper, size))
        found = [Improvement(added, self.accuracy(columns_run + added)) for added in ways]
        better = [way for way in found if way.accuracy > self.accuracy(columns_run)]
        return tuple(sorted(better, key=lambda way: -way.accuracy))


@dataclass(frozen=True, slots=True)
class Plan(Generic[TicketT]):
    """What to run now and who is done.

    Attributes:
        column: The column to run; None exactly when `batch` is empty.
        batch: Tickets to run it for.
        finished: Tickets whose answer in hand is final, each with the reason.
    """

    column: str | None
    batch: tuple[TicketT, ...]
    finished: tuple[tuple[TicketT, StoppedBy], ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request is taken in, and what to tell its caller if it is not.

    Attributes:
        is_accepted: Its column 1 is predicted to be there in time, and nobody admitted before loses theirs by
            it.
        needs_s: Predicted time until its column 1 would be there [s from now].
    """

    is_accepted: bool
    needs_s: float


def plan(waiting: Sequence[TicketT], now_s: float, profile: LatencyProfile, ladder: Ladder) -> Plan[TicketT]:
    """Decide what to run now.

    Column 1 of those without an answer comes first, earliest deadline first. A request alone opens with
    whatever leads to the most accurate answer that fits, be it a deeper column at once. Only when nobody
    waits for column 1 is the earliest ticket refined, towards the most accurate combination that still fits.

    Args:
        waiting: Every queued ticket, any order. May be empty. None of them is running.
        now_s: Current time [s, the engine's monotonic clock].
        profile: Latency by column and batch size [s].
        ladder: Accuracy by combination of columns.

    Returns:
        `batch` is empty exactly when `column` is None; each ticket of `batch` is predicted to finish by its
        `ready_by_s`. Tickets in neither `batch` nor `finished` go on waiting: for their turn, or, without an
        answer and past help, for their deadline.

    Cost: O(n log n + n * 2^C) in n waiting tickets and C columns; never blocks.
    """
    unanswered: list[TicketT] = []
    refinable: list[tuple[TicketT, Improvement]] = []
    finished: list[tuple[TicketT, StoppedBy]] = []
    for ticket in sorted(waiting, key=_ready_by):
        if not ticket.columns_run:
            if now_s + profile.latency(ladder.shallowest, 1).median_s <= ticket.ready_by_s:
                unanswered.append(ticket)
        elif not _is_content(ticket) and (way := _best_way(ticket, now_s, profile, ladder)):
            refinable.append((ticket, way))
        else:
            finished.append((ticket, stopped_by(ticket, now_s, profile, ladder)))

    column: str | None = None
    batch: list[TicketT] = []
    if len(unanswered) == 1 and not refinable:
        opening = _best_way(unanswered[0], now_s, profile, ladder)
        column, batch = opening.added[0] if opening else ladder.shallowest, unanswered
    elif unanswered:
        column = ladder.shallowest
        n = _worthwhile_batch(column, [ticket.ready_by_s for ticket in unanswered], now_s, profile)
        batch = unanswered[:n]
    elif refinable:
        column = refinable[0][1].added[0]
        same = [(ticket, way.added[1:]) for ticket, way in refinable if way.added[0] == column]
        ends_by_s = [
            ticket.ready_by_s - sum(profile.latency(later, 1).likely_s for later in rest)
            for ticket, rest in same
        ]
        n = _worthwhile_batch(column, ends_by_s, now_s, profile)
        batch = [ticket for ticket, _ in same[:n]]
    return Plan(column, tuple(batch), tuple(finished))


def stopped_by(ticket: Ticket, now_s: float, profile: LatencyProfile, ladder: Ladder) -> StoppedBy:
    """Why an answer given now is not a deeper one.

    `load` means that a deeper rung would have fitted, had nothing come in between: others that took the time,
    a stop, a run that failed. `deepest` includes that deeper rungs exist but none makes the answer more
    accurate.
    """
    if _is_content(ticket):
        return "confidence"
    if not ladder.improvements(ticket.columns_run):
        return "deepest"
    return "load" if _best_way(ticket, now_s - ticket.lost_s, profile, ladder) else "budget"


def admit(
    ready_by_s: float,
    now_s: float,
    busy_until_s: float,
    waiting: Sequence[Ticket],
    profile: LatencyProfile,
    ladder: Ladder,
) -> Admission:
    """Decide whether a request that arrives now can be promised column 1 in time.

    Plays the queue through, with the batches that `plan` would form and every run at its high quantile: the
    promise holds as long as no run takes longer.

    Args:
        ready_by_s: When its result must be there [s].
        now_s: Current time [s].
        busy_until_s: When the run in progress is predicted to end [s]; in the past when there is none.
        waiting: Every queued ticket, any order.
        profile: Latency by column and batch size [s].
        ladder: Its shallowest column is what is promised.

    Cost: O(n log n) in waiting tickets; never blocks.
    """
    start_s = max(now_s, busy_until_s)
    before_s = _unanswered_s(waiting)
    place = bisect_right(before_s, ready_by_s)
    with_it_s = [*before_s[:place], ready_by_s, *before_s[place:]]
    ends_s = _ends_of_column_1(with_it_s, start_s, profile, ladder)
    needs_s = ends_s[place] - now_s
    are_late = [end_s > by_s for by_s, end_s in zip(with_it_s, ends_s, strict=True)]
    if are_late.pop(place):
        return Admission(is_accepted=False, needs_s=needs_s)
    if not any(are_late):
        return Admission(is_accepted=True, needs_s=needs_s)
    ends_without_s = _ends_of_column_1(before_s, start_s, profile, ladder)
    is_harmless = all(
        end_s > by_s
        for is_late, by_s, end_s in zip(are_late, before_s, ends_without_s, strict=True)
        if is_late
    )
    return Admission(is_accepted=is_harmless, needs_s=needs_s)


def backlog_s(
    now_s: float, busy_until_s: float, waiting: Sequence[Ticket], profile: LatencyProfile, ladder: Ladder
) -> float:
    """Predicted time until everyone who waits now has column 1 [s from now]. Arguments as for `admit`."""
    free_s = max(now_s, busy_until_s)
    return max([free_s, *_ends_of_column_1(_unanswered_s(waiting), free_s, profile, ladder)]) - now_s


def _unanswered_s(waiting: Sequence[Ticket]) -> list[float]:
    return sorted(ticket.ready_by_s for ticket in waiting if not ticket.columns_run)


def _ends_of_column_1(
    queue_s: Sequence[float], start_s: float, profile: LatencyProfile, ladder: Ladder
) -> list[float]:
    """When column 1 would be there for each of these deadlines (ascending), every run at its high quantile.

    For one past help, on whom `plan` spends nothing: when it would be there if run next.
    """
    column, largest = ladder.shallowest, profile.batch_sizes[-1]
    alone = profile.latency(column, 1)
    ends_s: list[float] = []
    now_s = start_s
    while left_s := queue_s[len(ends_s) : len(ends_s) + largest]:
        if now_s + alone.median_s > left_s[0]:
            ends_s.append(now_s + alone.high_s)
            continue
        n = _worthwhile_batch(column, left_s, now_s, profile)
        now_s += profile.latency(column, n).high_s
        ends_s += [now_s] * n
    return ends_s


def _ready_by(ticket: Ticket) -> float:
    return ticket.ready_by_s


def _is_content(ticket: Ticket) -> bool:
    return ticket.min_confidence is not None and ticket.confidence >= ticket.min_confidence


def _best_way(ticket: Ticket, now_s: float, profile: LatencyProfile, ladder: Ladder) -> Improvement | None:
    """The most accurate answer that this ticket, served alone from now, is predicted to have in time.

    Without an answer in hand the first run must not overrun, so it counts with its high quantile. Ties: the
    cheaper.
    """
    best: Improvement | None = None
    best_cost_s = 0.0
    for way in ladder.improvements(ticket.columns_run):
        if best and way.accuracy < best.accuracy:
            break
        first, *rest = (profile.latency(column, 1) for column in way.added)
        cost_s = first.likely_s if ticket.columns_run else first.high_s
        cost_s += sum(latency.likely_s for latency in rest)
        if now_s + cost_s <= ticket.ready_by_s and (best is None or cost_s < best_cost_s):
            best, best_cost_s = way, cost_s
    return best


def _worthwhile_batch(column: str, ends_by_s: Sequence[float], now_s: float, profile: LatencyProfile) -> int:
    """How many of these tickets, taken in order, to run together: at least 1.

    A larger batch must be cheaper per image than a smaller one, and safe for each of its tickets.
    """
    best_n, best_each_s = 1, profile.latency(column, 1).median_s
    earliest_s = float("inf")
    for n, end_s in enumerate(ends_by_s[: profile.batch_sizes[-1]], 1):
        latency = profile.latency(column, n)
        earliest_s = min(earliest_s, end_s)
        if now_s + latency.high_s > earliest_s:
            break
        if latency.median_s / n < best_each_s:
            best_n, best_each_s = n, latency.median_s / n
    return best_n
