"""Policies by name: the one that ships, and what others do, to be compared on the same requests. Pure.

Must not know of clocks, I/O, asyncio, arrays or HTTP. Each answers a request with the one column it was run
on; none but the first refines. They are written to be strong: none spends a run on a request that it cannot
answer in time, and all batch where the profile says that it pays.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from service.ladder import Ladder
from service.latency import LatencyProfile
from service.scheduling import (
    ANSWER_WORTH,
    HOPE,
    REFINE_BELOW,
    Admission,
    Anytime,
    Plan,
    Policy,
    StoppedBy,
    least_to_try_s,
)
from service.waiting import NO_TRAFFIC, Queue, Ticket, TicketT, Traffic, ready_by

PolicyName = Literal["anytime", "fixed-shallow", "fixed-deep", "deepest-fit", "slackfit"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

N_BUCKETS = 10
"""Of latency in SlackFit. More: follows the slack more finely, with less room for batches."""

Choice = Callable[[Sequence[Ticket], float, LatencyProfile, Ladder], tuple[str, int]]
"""Column and batch size for tickets in the order of service, the first of which can be served in time."""


class OneShot:
    """Runs every request once, on a column that is chosen when its turn comes.

    Args:
        choose: The column and how many to run together.
        by_deadline: Earliest deadline first instead of first come, first served.
        hope: As for `Anytime`.
    """

    def __init__(self, choose: Choice, *, by_deadline: bool, hope: float) -> None:
        self._hope = hope
        self._choose = choose
        self._by_deadline = by_deadline

    def plan(
        self,
        waiting: Queue[TicketT],
        now_s: float,
        profile: LatencyProfile,
        ladder: Ladder,
        traffic: Traffic = NO_TRAFFIC,
    ) -> Plan[TicketT]:
        """As `Policy`; whoever has an answer is done.

        Cost: O(n) in waiting tickets.
        """
        reason: StoppedBy = "deepest"
        finished = tuple((ticket, reason) for same in waiting.answered.values() for ticket in same)
        hope = self._hope if len(waiting.unanswered) == 1 else 1.0
        least_s = least_to_try_s(profile, self._column(profile, ladder), traffic, hope)
        queue: list[TicketT] = []
        if self._by_deadline:
            first = bisect_left(waiting.unanswered, now_s + least_s, key=ready_by)
            queue = waiting.unanswered[first : first + profile.batch_sizes[-1]]
        else:
            for ticket in waiting:
                if not ticket.columns_run and now_s + least_s <= ticket.ready_by_s:
                    queue.append(ticket)
                    if len(queue) == profile.batch_sizes[-1]:
                        break
        if not queue:
            return Plan(None, (), finished)
        column, n = self._choose(queue, now_s, profile, ladder)
        return Plan(column, tuple(queue[:n]), finished)

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
        """Take everyone in whose run would fit on an idle server; who waits too long is dropped later."""
        column = self._column(profile, ladder)
        hope = 1.0 if waiting.unanswered else self._hope
        least_s = least_to_try_s(profile, column, traffic, hope)
        needs_s = profile.latency(column, 1).median_s
        return Admission(is_accepted=now_s + least_s <= ready_by_s, needs_s=needs_s)

    def _column(self, profile: LatencyProfile, ladder: Ladder) -> str:
        """The least that it runs."""
        return self._choose((), 0.0, profile, ladder)[0]


def _fixed(place: int) -> Choice:
    def choose(
        queue: Sequence[Ticket], now_s: float, profile: LatencyProfile, ladder: Ladder
    ) -> tuple[str, int]:
        column = ladder.columns[place]
        return column, _in_time_together(column, queue, now_s, profile)

    return choose


def _deepest_fit(
    queue: Sequence[Ticket], now_s: float, profile: LatencyProfile, ladder: Ladder
) -> tuple[str, int]:
    """The deepest column that the first in the queue has time for."""
    slack_s = queue[0].ready_by_s - now_s if queue else 0.0
    fitting = [c for c in ladder.columns if profile.latency(c, 1).high_s <= slack_s]
    column = fitting[-1] if fitting else ladder.shallowest
    return column, _in_time_together(column, queue, now_s, profile)


def _slackfit(
    queue: Sequence[Ticket], now_s: float, profile: LatencyProfile, ladder: Ladder
) -> tuple[str, int]:
    """SlackFit: the bucket of latencies that the most urgent slack reaches; in it the largest batch.

    Source: Khare et al., "SuperServe: Fine-Grained Inference Serving for Unpredictable Workloads", NSDI 2025:
    pairs of network and batch size in buckets of latency, the bucket by the slack of the most urgent query,
    in it the largest batch; among equals the most accurate.
    """
    options = [
        (profile.latency(column, size).high_s, size, ladder.accuracy((column,)), column)
        for column in ladder.columns
        for size in profile.batch_sizes
    ]
    least_s, most_s = min(options)[0], max(options)[0]
    width_s = max((most_s - least_s) / N_BUCKETS, 1e-9)
    slack_s = queue[0].ready_by_s - now_s if queue else 0.0
    fitting = [option for option in options if option[0] <= slack_s and option[1] <= max(1, len(queue))]
    if not fitting:
        return ladder.shallowest, 1
    bucket = max((latency_s - least_s) // width_s for latency_s, *_ in fitting)
    _, size, _, column = max(
        (option for option in fitting if (option[0] - least_s) // width_s == bucket),
        key=lambda option: option[1:3],
    )
    return column, size


def _in_time_together(column: str, queue: Sequence[Ticket], now_s: float, profile: LatencyProfile) -> int:
    """The batch, taken in order, that is cheapest per image and safe for each of its tickets: at least 1."""
    best_n, best_each_s = 1, profile.latency(column, 1).median_s
    earliest_s = float("inf")
    for n, ticket in enumerate(queue, 1):
        latency = profile.latency(column, n)
        earliest_s = min(earliest_s, ticket.ready_by_s)
        if now_s + latency.high_s > earliest_s:
            break
        if latency.median_s / n < best_each_s:
            best_n, best_each_s = n, latency.median_s / n
    return best_n


def named(
    name: PolicyName,
    answer_worth: float = ANSWER_WORTH,
    hope: float = HOPE,
    refine_below: float = REFINE_BELOW,
) -> Policy:
    """The policy of this name.

    Args:
        name: One of `POLICY_NAMES`.
        answer_worth: For the one that weighs answers against accuracy, see `Anytime`.
        hope: How little time is enough to try, see `Anytime`.
        refine_below: How busy the event loop may be while answers are refined, see `Anytime`.
    """
    match name:
        case "anytime":
            return Anytime(answer_worth, hope, refine_below)
        case "fixed-shallow":
            return OneShot(_fixed(0), by_deadline=False, hope=hope)
        case "fixed-deep":
            return OneShot(_fixed(-1), by_deadline=False, hope=hope)
        case "deepest-fit":
            return OneShot(_deepest_fit, by_deadline=False, hope=hope)
        case "slackfit":
            return OneShot(_slackfit, by_deadline=True, hope=hope)
