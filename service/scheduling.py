"""The policy: which column to run now, for whom, who is done, and whom to refuse. Pure functions.

Must not know of clocks, I/O, asyncio, arrays or HTTP: the server and a simulator call the very same code.

The shallowest column is mandatory and every deeper one optional (imprecise computation: see Liu et al.,
"Algorithms for scheduling imprecise computations", IEEE Computer 1991). A single run is predicted by its high
quantile where a safer choice remains (to batch first answers, to open with a deep column) and by its likely
latency where none does; a series of runs by the high quantile of their sum.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, get_args

from service.ladder import Improvement, Ladder
from service.latency import LatencyProfile
from service.waiting import NO_TRAFFIC, Queue, Ticket, TicketT, Traffic, ready_by

StoppedBy = Literal["budget", "confidence", "deepest", "load"]
STOPPED_BY: tuple[StoppedBy, ...] = get_args(StoppedBy)

ANSWER_WORTH = 4.0
"""What an answer in time is worth, in corrected answers, unless the operator says otherwise: a refinement
that makes one wrong answer right is not run if more than a quarter of an answer is expected to be lost by it.
Found on a server under load: half of it loses deadlines there that no simulation loses, since a refinement
also takes caches and cores from those who read and answer."""

OVERLOAD = 1.25
"""More than this many times of what can be served in the best batches is overload."""

SCARCE = 0.75
"""From this many times of what can be served in the best batches on, a run that is in vain costs another."""

HOPE = 0.4
"""Share of the predicted time that must be left for a first answer to be tried for, while time is not scarce,
unless the operator says otherwise: whoever is predicted to be late by less is in time often enough."""

REFINE_BELOW = 0.3
"""Answers are refined while no larger share than this of those who come find the event loop at work for
others (`Traffic.busy`), unless the operator says otherwise. A refinement costs more than its run: the loop
plans it and takes it in, and on a processor it takes caches and cores from those who read and answer."""

LIGHT = 0.1
"""Share of the time that column 1 alone would need for all who come, below which traffic is light: some who
come at once and then nobody keep the loop at work, but not for long."""

CROWDED = 2.0
"""A run beside another may take this many times as long: they share caches and perhaps a core."""

SPREAD = 0.5
"""Column 1 is taken to need its median time, give or take up to this share of it."""

IDLE = 0.03
"""Share of the time that column 1 alone would need, below which a server is nearly idle."""
INDISTINCT = 0.003
"""Accuracies that differ by less are the same: the standard error of 0.95 over 5,000 held-out images."""

DEAR_ALONE = 2.0
"""An image that runs alone is dear if it takes this many times as long as one in the best batch."""

LEAST_SPARE = 0.05
"""Share of the time that is thought to be left for refinements in the heaviest traffic."""

WORTH_FILLING = 1.3
"""A batch is worth filling where two runs take this many times as long as one for both."""


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
        preempts: The refinement in progress must make way for that.
    """

    is_accepted: bool
    needs_s: float
    preempts: bool = False


class Policy(Protocol):
    """What decides. Both methods are pure and keep nothing between calls."""

    def plan(
        self,
        waiting: Queue[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Plan[TicketT]:
        """Decide what to run now.

        Args:
            waiting: Every queued ticket. May be empty. None of them is running.
            now_s: Current time [s, the engine's monotonic clock].
            profile: Latency by column and batch size [s].
            ladder: Accuracy by combination of columns.
            traffic: What to expect to arrive.

        Returns:
            `batch` is empty exactly when `column` is None; each ticket of `batch` is predicted to finish by
            its `ready_by_s`. Tickets in neither `batch` nor `finished` go on waiting: for their turn, or,
            without an answer and past help, for their deadline.
        """

    def admit(
        self,
        ready_by_s: float,
        now_s: float,
        busy_until_s: float,
        waiting: Queue[TicketT],
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Admission:
        """Decide whether to take in a request that arrives now.

        Args:
            ready_by_s: When its result must be there [s].
            now_s: Current time [s].
            busy_until_s: When the next run can likely start [s]; in the past if that is at once.
            waiting: Every queued ticket.
            profile: Latency by column and batch size [s].
            ladder: Its shallowest column is what is promised.
            traffic: What to expect to arrive.
        """


def admit(
    policy: Policy,
    ready_by_s: float,
    now_s: float,
    busy_until_s: float,
    sooner_s: float,
    waiting: Queue[TicketT],
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic,
    *,
    is_beside: bool = False,
) -> Admission:
    """Ask a policy whether to take in a request that arrives now, and have a refinement make way if it must.

    Args:
        policy: That decides.
        ready_by_s: As `Policy.admit`.
        now_s: As `Policy.admit`.
        busy_until_s: As `Policy.admit`.
        sooner_s: When the run in progress would end if it were preempted; infinity if it cannot be [s].
        waiting: As `Policy.admit`.
        profile: As `Policy.admit`.
        ladder: As `Policy.admit`.
        traffic: As `Policy.admit`.
        is_beside: Its column 1 would run beside the refinement in progress, at once but perhaps more slowly.
    """
    start_s = now_s if is_beside else busy_until_s
    admission = policy.admit(ready_by_s, now_s, start_s, waiting, profile, ladder, traffic)
    if sooner_s >= busy_until_s:
        return admission
    if is_beside:
        return replace(admission, preempts=now_s + CROWDED * admission.needs_s > ready_by_s)
    if admission.is_accepted and now_s + admission.needs_s <= ready_by_s:
        return admission
    sooner = policy.admit(ready_by_s, now_s, sooner_s, waiting, profile, ladder, traffic)
    return replace(sooner, preempts=True)


_LOAD: StoppedBy = "load"
_Finished = tuple[tuple[TicketT, StoppedBy], ...]
_Refinable = dict[tuple[tuple[str, ...], int], list[TicketT]]
"""By kind, and within it by deadline."""


class _Costs(dict[tuple[str, ...], float]):
    """What it likely takes to run these columns one after the other for one ticket [s]; worked out once."""

    def __init__(self, profile: LatencyProfile) -> None:
        self._profile = profile

    def __missing__(self, columns: tuple[str, ...]) -> float:
        self[columns] = sum(self._profile.latency(column, 1).likely_s for column in columns)
        return self[columns]


class Anytime:
    """The policy that ships: answers first, then refinement by what it gains for the time it takes.

    Column 1 of those without an answer comes first, earliest deadline first. Only when nobody waits for it
    are answers refined: the run that is expected to correct most answers per second, counted by the
    confidence of the answers in hand, and less what it is expected to cost those who will arrive while it
    lasts. A request that is alone is taken to the most accurate answer that fits; on a server that is nearly
    idle by opening with a deeper column, if it must be: elsewhere somebody may come for whom a refinement
    would make way, and a first run would not.

    Args:
        answer_worth: What an answer in time is worth, in corrected answers. Larger: fewer deadlines are
            missed because of a refinement, fewer answers are refined.
        hope: While time is not scarce and nobody else waits, a first answer is tried for if this share of its
            predicted time is left. 1: only for whom it is predicted to be in time. Smaller: more are in time
            who were not expected to be, and more callers learn late that there is no answer.
        refine_below: Answers are refined while `Traffic.busy` is not above this, or traffic is light. 1:
            always. Smaller: more are in time in heavy traffic, fewer are refined.
    """

    def __init__(
        self, answer_worth: float = ANSWER_WORTH, hope: float = 1.0, refine_below: float = REFINE_BELOW
    ) -> None:
        self._answer_worth = answer_worth
        self._hope = hope
        self._refine_below = refine_below

    def plan(
        self,
        waiting: Queue[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Plan[TicketT]:
        """As `Policy`.

        Cost: O(K * 2^C + log n) in n waiting tickets, C columns and K kinds of them; never blocks.
        """
        if len(waiting) == 1:  # the usual case, and its answer waits for this
            return self._plan_alone(next(iter(waiting)), now_s, profile, ladder, traffic)
        # One who is predicted to be late is given a try where it can cost nobody else.
        hope = self._hope if len(waiting.unanswered) == 1 else 1.0
        least_s = least_to_try_s(profile, ladder.shallowest, traffic, hope)
        first = bisect_left(waiting.unanswered, now_s + least_s, key=ready_by)
        costs = _Costs(profile)
        finished: _Finished[TicketT]
        refinable: _Refinable[TicketT] = {}
        if self._refines(profile, ladder, traffic):
            finished, refinable = _part_with_the_hopeless(waiting, now_s, profile, ladder, traffic, costs)
        else:
            answered = [ticket for same in waiting.answered.values() for ticket in same]
            finished = tuple([(one, stopped_by(one, now_s, profile, ladder)) for one in answered])
        if first < len(waiting.unanswered):
            if better := self._better_than_a_small_batch(
                waiting, first, refinable, now_s, profile, ladder, traffic, costs
            ):
                return Plan(*better, finished)
            n_waiting = len(waiting.unanswered) - first
            least = min(_least_batch(ladder.shallowest, n_waiting, profile, traffic), n_waiting)
            if least > 1:
                together_s = profile.latency(ladder.shallowest, least).likely_s
                fitting = bisect_left(waiting.unanswered, now_s + together_s, key=ready_by)
                if fitting < len(waiting.unanswered):
                    first = fitting
            slack_s = waiting.unanswered[first].ready_by_s - now_s
            n = _worthwhile_batch(ladder.shallowest, len(waiting.unanswered) - first, slack_s, profile)
            return Plan(ladder.shallowest, tuple(waiting.unanswered[first : first + n]), finished)
        if not refinable:
            return Plan(None, (), finished)
        if best := self._best_refinement(refinable, now_s, profile, ladder, traffic, costs):
            return Plan(*best, finished)
        hopeless = ((ticket, _LOAD) for same in refinable.values() for ticket in same)
        return Plan(None, (), (*finished, *hopeless))

    def admit(
        self,
        ready_by_s: float,
        now_s: float,
        busy_until_s: float,
        waiting: Queue[TicketT],
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Admission:
        """As `Policy`: whether it can be promised column 1 in time.

        Plays the queue through, with the batches that `plan` would form. Who is more likely to be in time
        than not is let in as long as there is time for everybody, and so is who has hope, if nobody else
        waits. When there is not, up to the high quantile of when each will be answered, because a run for
        one who is late is then taken from another. In overload nobody is let in who has no time for the best
        batch.

        Cost: O(n) in waiting tickets without an answer; never blocks.
        """
        start_s = max(now_s, busy_until_s)
        scarce = is_scarce(profile, ladder.shallowest, traffic)
        if not (scarce or waiting.unanswered):  # the usual case, and a request's time is short
            alone = profile.latency(ladder.shallowest, 1)
            needs_s = max(start_s - now_s + alone.median_s, alone.likely_s)
            spared_s = (1 - self._hope) * alone.median_s
            return Admission(is_accepted=now_s + needs_s - spared_s <= ready_by_s, needs_s=needs_s)
        before_s = [ticket.ready_by_s for ticket in waiting.unanswered]
        place = bisect_right(before_s, ready_by_s)
        with_it_s = [*before_s[:place], ready_by_s, *before_s[place:]]
        least = _least_batch(ladder.shallowest, len(with_it_s), profile, traffic)
        ends_s = _ends_of_column_1(with_it_s, start_s, profile, ladder, least, is_sure=scarce)
        needs_s = max(ends_s[place] - now_s, profile.latency(ladder.shallowest, least).likely_s)
        if now_s + needs_s > ready_by_s:
            return Admission(is_accepted=False, needs_s=needs_s)
        # Who is ahead loses nothing, unless the queue is now long enough to be served in batches only. Who is
        # past help in any case keeps nobody out.
        begins_batches = least > 1 and least > _least_batch(
            ladder.shallowest, len(before_s), profile, traffic
        )
        first = 0 if begins_batches else place + 1
        helped_s = start_s + profile.latency(ladder.shallowest, 1).median_s
        is_harmless = all(
            end_s <= by_s or by_s < helped_s
            for by_s, end_s in zip(with_it_s[first:], ends_s[first:], strict=True)
        )
        return Admission(is_accepted=is_harmless, needs_s=needs_s)

    def _refines(self, profile: LatencyProfile, ladder: Ladder, traffic: Traffic) -> bool:
        """Whether there is time to refine answers beside reading, deciding and writing."""
        if traffic.busy <= self._refine_below:
            return True
        return traffic.rate_hz * profile.latency(ladder.shallowest, 1).median_s < LIGHT

    def _plan_alone(
        self, ticket: TicketT, now_s: float, profile: LatencyProfile, ladder: Ladder, traffic: Traffic
    ) -> Plan[TicketT]:
        if not ticket.columns_run:
            if ticket.ready_by_s < now_s + least_to_try_s(profile, ladder.shallowest, traffic, self._hope):
                return Plan(None, (), ())
            return Plan(self._opening(ticket, now_s, profile, ladder, traffic), (ticket,), ())
        way = None
        if not ticket.is_content and self._refines(profile, ladder, traffic):
            way = _best_way(ticket, now_s, profile, ladder, traffic, self._answer_worth)
        if way:
            return Plan(way.added[0], (ticket,), ())
        return Plan(None, (), ((ticket, stopped_by(ticket, now_s, profile, ladder)),))

    def _opening(
        self, ticket: Ticket, now_s: float, profile: LatencyProfile, ladder: Ladder, traffic: Traffic
    ) -> str:
        """What to run first for one who is alone: column 1, unless going through it would cost the answer.

        An answer is in hand the sooner, and a stream begins; so a way around it has to be better by more than
        held-out images can tell.
        """
        column_1 = profile.latency(ladder.shallowest, 1)
        if traffic.rate_hz * column_1.median_s >= IDLE:
            return ladder.shallowest
        way = _best_way(ticket, now_s, profile, ladder, traffic, self._answer_worth)
        if not way or way.added[0] == ladder.shallowest:
            return ladder.shallowest
        through_s = column_1.high_s + sum(profile.latency(column, 1).likely_s for column in way.added)
        through = ladder.accuracy((ladder.shallowest, *way.added))
        is_in_time = now_s + through_s <= ticket.refined_by_s
        return ladder.shallowest if is_in_time and through >= way.accuracy - INDISTINCT else way.added[0]

    def _better_than_a_small_batch(
        self,
        waiting: Queue[TicketT],
        first: int,
        refinable: _Refinable[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic,
        costs: _Costs,
    ) -> tuple[str, tuple[TicketT, ...]] | None:
        """A refinement to run while the batch of column 1 fills, where that pays and risks nobody's answer.

        It pays where those waiting and those who will have come by then take much less time together than
        apart: on a GPU, not on a CPU. In overload every run is needed for first answers.
        """
        column, largest = ladder.shallowest, profile.batch_sizes[-1]
        n = len(waiting.unanswered) - first
        if n >= largest or not refinable or _least_batch(column, n, profile, traffic) > 1:
            return None
        pair_s = profile.latency(column, min(2, largest)).median_s
        if 2 * profile.latency(column, 1).median_s < WORTH_FILLING * pair_s:
            return None
        best = self._best_refinement(refinable, now_s, profile, ladder, traffic, costs)
        if not best:
            return None
        run_s = profile.latency(best[0], len(best[1])).high_s
        n_more = min(int(traffic.rate_hz * run_s), largest - n)
        if n_more < 1:
            return None
        apart_s = profile.latency(column, n).median_s + profile.latency(column, n_more).median_s
        if apart_s < WORTH_FILLING * profile.latency(column, n + n_more).median_s:
            return None
        by_s = [ticket.ready_by_s for ticket in waiting.unanswered[first:]]
        ends_s = _ends_of_column_1(by_s, now_s + run_s, profile, ladder)
        is_safe = all(end_s <= ready_by_s for end_s, ready_by_s in zip(ends_s, by_s, strict=True))
        return best if is_safe else None

    def _best_refinement(
        self,
        refinable: _Refinable[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic,
        costs: _Costs,
    ) -> tuple[str, tuple[TicketT, ...]] | None:
        """The run expected to correct most answers per second, less what arrives and is lost by it."""
        offers = _offers(refinable, now_s, ladder, costs)
        risks = _Risks(profile, ladder, traffic)
        best: tuple[str, tuple[TicketT, ...]] | None = None
        best_rate = 0.0
        for column, of_column in offers.items():
            of_column.sort(key=lambda offer: -offer.rate)
            single_s = profile.latency(column, 1).likely_s
            for size in profile.batch_sizes:
                run_s = profile.latency(column, size).likely_s
                batch: list[TicketT] = []
                gain = 0.0
                for offer in of_column:
                    extra_s = run_s - single_s  # a larger batch leaves less time for the rest of the way
                    place = bisect_left(offer.tickets, now_s + offer.cost_s + extra_s, key=ready_by)
                    taken = offer.tickets[place : place + size - len(batch)]
                    batch += taken
                    gain += len(taken) * offer.rate * single_s
                    if len(batch) == size:
                        break
                if len(batch) <= size // 2 and size > 1:
                    break
                share, losses = risks.of(run_s)
                rate = (share * gain - self._answer_worth * losses) / run_s
                if rate > best_rate:
                    best, best_rate = (column, tuple(batch)), rate
        return best


def stopped_by(ticket: Ticket, now_s: float, profile: LatencyProfile, ladder: Ladder) -> StoppedBy:
    """Why an answer given now is not a deeper one.

    `load` means that a deeper rung would have fitted, had nothing come in between: others that took the time,
    a stop, a run that failed, a busy loop. `deepest` includes that deeper rungs exist but none makes the
    answer more accurate.
    """
    if ticket.is_content:
        return "confidence"
    ways = ladder.improvements(ticket.columns_run)
    if not ways:
        return "deepest"
    costs = _Costs(profile)
    left_s = ticket.ready_by_s - now_s + ticket.lost_s
    return "load" if any(costs[way.added] <= left_s for way in ways) else "budget"


def to_come_s(ticket: Ticket, now_s: float, profile: LatencyProfile, ladder: Ladder) -> float:
    """Predicted time of the columns that would still be run for this ticket, were it alone [s]."""
    way = None if ticket.is_content else _best_way(ticket, now_s, profile, ladder, NO_TRAFFIC, 0.0)
    return sum(profile.latency(column, 1).median_s for column in way.added) if way else 0.0


def backlog_s(
    now_s: float,
    busy_until_s: float,
    waiting: Queue[TicketT],
    profile: LatencyProfile,
    ladder: Ladder,
) -> float:
    """Predicted time until everyone who waits now has column 1, in the best batches [s from now]."""
    each_s = profile.best_batch(ladder.shallowest)[0] if waiting.unanswered else 0.0
    return max(0.0, busy_until_s - now_s) + len(waiting.unanswered) * each_s


def is_scarce(profile: LatencyProfile, column: str, traffic: Traffic) -> bool:
    """Whether not even this column in its best batches could serve everybody who comes."""
    if traffic.rate_hz * profile.latency(column, 1).median_s <= SCARCE:
        return False  # the usual case, and the best batch is found after each run anew
    return traffic.rate_hz * profile.best_batch(column)[0] > SCARCE


def least_to_try_s(profile: LatencyProfile, column: str, traffic: Traffic, hope: float) -> float:
    """How much time must be left for a first answer by this column to be tried for [s]."""
    median_s = profile.latency(column, 1).median_s
    return median_s if is_scarce(profile, column, traffic) else hope * median_s


def _ends_of_column_1(
    queue_s: Sequence[float],
    start_s: float,
    profile: LatencyProfile,
    ladder: Ladder,
    least_batch: int = 1,
    *,
    is_sure: bool = True,
) -> list[float]:
    """When column 1 is sure, or as likely as not, to be there for each of these deadlines (ascending).

    One after the other, runs take the sum of their medians; that they all take their high quantile at once is
    as unlikely as a series of sixes. What a single run may take longer adds up like independent errors do: as
    the root of the sum of squares.

    Args:
        queue_s: Deadlines, ascending [s].
        start_s: When the first run can start [s].
        profile: Latency by column and batch size [s].
        ladder: Its shallowest column is the one.
        least_batch: Who has no time for a batch of this size, if so many wait, is past help.
        is_sure: Up to the high quantile instead of the median.

    Returns:
        For one past help, on whom `plan` spends nothing: when it would be there if run next, or later.
    """
    column = ladder.shallowest
    alone = profile.latency(column, 1)
    alone_s = alone.high_s if is_sure else alone.median_s
    ends_s: list[float] = []
    now_s, variance_s2 = start_s, 0.0
    n_queue = len(queue_s)
    while len(ends_s) < n_queue:
        by_s = queue_s[len(ends_s)]
        slack_s = by_s - now_s
        n_left = n_queue - len(ends_s)
        # Both bounds are those of `plan`, and added up as there: a difference is rounded otherwise.
        if now_s + alone.median_s > by_s:
            ends_s.append(now_s + alone_s)
            continue
        least = min(least_batch, n_left)
        if least > 1 and now_s + profile.latency(column, least).likely_s > by_s:
            ends_s.append(by_s + alone_s)
            continue
        n = _worthwhile_batch(column, n_left, slack_s, profile)
        latency = profile.latency(column, n)
        now_s += latency.median_s
        variance_s2 += (latency.high_s - latency.median_s) ** 2
        ends_s += [now_s + (math.sqrt(variance_s2) if is_sure else 0.0)] * n
    return ends_s


def _best_way(
    ticket: Ticket,
    now_s: float,
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic,
    answer_worth: float,
) -> Improvement | None:
    """What a ticket that is alone is worth running next, and on: towards the most accurate answer that fits.

    Without an answer in hand the first run must not overrun, so it counts with its high quantile. Ties: the
    cheaper.
    """
    best: Improvement | None = None
    best_worth = (0.0, 0.0)
    risks = _Risks(profile, ladder, traffic)
    for way in ladder.improvements(ticket.columns_run, ladder.row(ticket.columns_run, ticket.confidence)):
        if way.gain < best_worth[0]:
            continue
        first, *rest = (profile.latency(column, 1) for column in way.added)
        first_s = first.likely_s if ticket.columns_run else first.high_s
        cost_s = first_s + sum(latency.likely_s for latency in rest)
        if now_s + cost_s > (ticket.refined_by_s if rest else ticket.ready_by_s):
            continue
        share, losses = risks.of(first_s, is_refinement=bool(ticket.columns_run))
        worth = share * way.gain - answer_worth * losses
        if worth > 0 and (best is None or (worth, -cost_s) > best_worth):
            best, best_worth = way, (worth, -cost_s)
    return best


class _Risks:
    """What a run costs those who will come while it lasts.

    A refinement that can be preempted lets everybody wait a little who comes, and comes to its end only if
    nobody comes for whom it makes way. Any other run lets everybody wait for its end.
    """

    def __init__(self, profile: LatencyProfile, ladder: Ladder, traffic: Traffic) -> None:
        self._traffic = traffic
        self._is_preemptible = profile.preemption_s < math.inf
        column_1 = profile.latency(ladder.shallowest, 1)
        self._column_1_s = column_1.likely_s
        self._losses_hz = 0.0
        if self._is_preemptible:
            least_s, most_s = (1 - SPREAD) * column_1.median_s, (1 + SPREAD) * column_1.median_s
            self._losses_hz = traffic.losses_hz(profile.preemption_s, least_s, max(most_s, column_1.high_s))

    def of(self, run_s: float, *, is_refinement: bool = True) -> tuple[float, float]:
        """How likely such a run is to reach its end, and how many lose their answer because of it."""
        losses = self._traffic.losses(run_s, self._column_1_s)
        if not (self._is_preemptible and is_refinement):
            return 1.0, losses
        return math.exp(-losses), self._losses_hz * run_s


def _part_with_the_hopeless(
    waiting: Queue[TicketT],
    now_s: float,
    profile: LatencyProfile,
    ladder: Ladder,
    traffic: Traffic,
    costs: _Costs,
) -> tuple[_Finished[TicketT], _Refinable[TicketT]]:
    """Who of those with an answer is done, and who is kept to be refined.

    Done is who wants nothing deeper, and for whom nothing deeper will be had in time: answers that have more
    to gain are refined first, in the time that first answers leave over. One whose turn would come too late
    is sent its answer now rather than in the last moment.
    """
    if not waiting.answered:
        return (), {}
    finished = [(t, stopped_by(t, now_s, profile, ladder)) for t in waiting.answered.get(None, ())]
    refinable: _Refinable[TicketT] = {}
    best = []
    for kind in waiting.answered:
        if kind is not None:
            ways = ladder.improvements(*kind)
            rate, cost_s = max((way.gain / costs[way.added], costs[way.added]) for way in ways)
            best.append((rate, cost_s, min(costs[way.added] for way in ways), kind))
    each_s = profile.best_batch(ladder.shallowest)[0]
    spare = max(LEAST_SPARE, 1 - traffic.rate_hz * each_s)
    turn_s = now_s
    for _, cost_s, least_s, kind in sorted(best, reverse=True):
        kept: list[TicketT] = []
        for ticket in waiting.answered[kind]:
            if ticket.ready_by_s < turn_s + least_s:
                finished.append((ticket, stopped_by(ticket, now_s, profile, ladder)))
            else:
                turn_s += cost_s / spare
                kept.append(ticket)
        if kept:
            refinable[kind] = kept
    return tuple(finished), refinable


@dataclass(frozen=True, slots=True)
class _Offer(Generic[TicketT]):
    """Tickets of one kind that would go one way.

    Attributes:
        rate: Answers corrected per second of running the whole way for one of them.
        cost_s: Of the whole way for one of them [s].
        tickets: Those for whom it fits, by deadline; perhaps more than that.
    """

    rate: float
    cost_s: float
    tickets: list[TicketT]


def _offers(
    refinable: _Refinable[TicketT], now_s: float, ladder: Ladder, costs: _Costs
) -> dict[str, list[_Offer[TicketT]]]:
    """By column to run next, the best way of each kind that begins with it and still fits somebody."""
    offers: dict[str, list[_Offer[TicketT]]] = {}
    for kind, same in refinable.items():
        best: dict[str, _Offer[TicketT]] = {}
        latest_s = same[-1].ready_by_s
        for way in ladder.improvements(*kind):
            cost_s = costs[way.added]
            if now_s + cost_s > latest_s:
                continue
            rate = way.gain / cost_s
            column = way.added[0]
            if column not in best or rate > best[column].rate:
                best[column] = _Offer(rate, cost_s, same)
        for column, offer in best.items():
            offers.setdefault(column, []).append(offer)
    return offers


def _least_batch(column: str, n_waiting: int, profile: LatencyProfile, traffic: Traffic) -> int:
    """The smallest batch worth a run: 1, or the best one where a run for fewer costs others their answers.

    That is so in overload, when not even the best batch can serve everybody; and where batching pays much, as
    on a GPU, as soon as two of the best batches wait: earliest deadline first would serve everybody in the
    last moment, when there is time for one image only.
    """
    each_s, best_n = profile.best_batch(column)
    is_dear_alone = profile.latency(column, 1).median_s > DEAR_ALONE * each_s
    is_overload = traffic.rate_hz * each_s > OVERLOAD
    return best_n if is_overload or (is_dear_alone and n_waiting >= 2 * best_n) else 1


def _worthwhile_batch(column: str, n_waiting: int, slack_s: float, profile: LatencyProfile) -> int:
    """How many tickets, the earliest of which has this slack, to run together: at least 1.

    A larger batch must be cheaper per image than a smaller one, and safe for the earliest.
    """
    best_n, best_each_s = 1, profile.latency(column, 1).median_s
    for size in profile.batch_sizes[1:]:
        latency = profile.latency(column, size)
        if latency.high_s > slack_s:
            break
        n = min(size, n_waiting)
        if latency.median_s / n < best_each_s:
            best_n, best_each_s = n, latency.median_s / n
        if n == n_waiting:
            break
    return best_n
