"""Who waits, in the orders that a policy asks for, and who is to be expected. Pure: no clock, no I/O.

Must not know of how a policy decides, or how long anything takes.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from service.ladder import Ladder


@dataclass(slots=True, eq=False)
class Ticket:
    """A waiting request, as far as the policy cares. Only the engine changes one, and not while it is queued.

    Attributes:
        ready_by_s: Latest time for the next result to be there: the deadline less the reserve for writing the
            answer, and with an answer in hand `refined_by_s`.
        min_confidence: The caller is content with an answer at least this confident; None: never.
        columns_run: Columns that have run, shallow first; empty while there is no answer.
        confidence: Probability of the answer in hand.
        lost_s: Time this ticket has stood still, or gone slower, because of others [s].
        in_hand_by_s: Takes the place of `ready_by_s` when there is an answer, if it is sooner: late, all of
            it is lost, while a refinement that is cut short loses little.
    """

    ready_by_s: float
    min_confidence: float | None = None
    columns_run: tuple[str, ...] = ()
    confidence: float = 0.0
    lost_s: float = 0.0
    in_hand_by_s: float = math.inf

    @property
    def refined_by_s(self) -> float:
        """Latest time for a result to be there that is not the first [s]."""
        return min(self.ready_by_s, self.in_hand_by_s)

    @property
    def is_content(self) -> bool:
        """The caller asked for no more confidence than the answer in hand has."""
        return self.min_confidence is not None and self.confidence >= self.min_confidence


N_LOOKED_AT = 8
"""At most about twice as many slacks are looked at one by one."""

SAME_S = 1e-3
"""How long traffic is taken to be the same if nobody comes [s]: several decisions are made for a request."""

TicketT = TypeVar("TicketT", bound=Ticket)


def ready_by(ticket: Ticket) -> float:
    """Sorting key: earliest deadline first."""
    return ticket.ready_by_s


Kind = tuple[tuple[str, ...], int] | None
"""What tickets with an answer have in common as far as their future goes: the columns that have run and the
row of the confidence table; None when there is nothing to be gained."""


class Queue(Generic[TicketT]):
    """Every waiting ticket, in the orders that policies ask for. Only the engine adds and takes away.

    Those without an answer are kept by deadline. Those with one are kept by kind, and within a kind by
    deadline: however many wait, a policy has to look at no more than a few of each kind.

    Cost: adding and taking away are O(log n) and a shift of a list.
    """

    def __init__(self, ladder: Ladder, tickets: Iterable[TicketT] = ()) -> None:
        self.unanswered: list[TicketT] = []
        self.answered: dict[Kind, list[TicketT]] = {}
        self._ladder = ladder
        self._kind_of: dict[TicketT, Kind] = {}
        for ticket in tickets:
            self.add(ticket)

    def add(self, ticket: TicketT) -> None:
        """Take a ticket in. It must not change while it is here, except for `lost_s`."""
        kind: Kind = None
        if ticket.columns_run:
            kind = self._kind(ticket)
            insort(self.answered.setdefault(kind, []), ticket, key=ready_by)
        else:
            insort(self.unanswered, ticket, key=ready_by)
        self._kind_of[ticket] = kind

    def remove(self, ticket: TicketT) -> None:
        """Take a ticket away.

        Raises:
            KeyError: it is not here.
        """
        kind = self._kind_of.pop(ticket)
        among = self.answered[kind] if ticket.columns_run else self.unanswered
        place = bisect_left(among, ticket.ready_by_s, key=ready_by)
        del among[among.index(ticket, place)]
        if ticket.columns_run and not among:
            del self.answered[kind]

    def __len__(self) -> int:
        return len(self._kind_of)

    def __iter__(self) -> Iterator[TicketT]:
        """In the order in which they were added."""
        return iter(self._kind_of)

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._kind_of

    def _kind(self, ticket: TicketT) -> Kind:
        row = self._ladder.row(ticket.columns_run, ticket.confidence)
        if ticket.is_content or not self._ladder.improvements(ticket.columns_run, row):
            return None
        return ticket.columns_run, row


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has been arriving lately, as an expectation of what will.

    Attributes:
        rate_hz: Requests a second.
        slacks_s: Time that a sample of them had left when they were taken in [s], ascending.
        busy: Share of them for whom what reads and answers had no time when they came. Of arrivals that know
            nothing of each other it is the share of the time in which it is at work; a caller who comes again
            when the answer is there hardly ever waits, however often.
    """

    rate_hz: float = 0.0
    slacks_s: Sequence[float] = ()
    busy: float = 0.0

    def losses(self, run_s: float, column_1_s: float) -> float:
        """How many requests to expect during a run that will miss their column 1 if they wait for its end.

        A request that comes t before the run's end is lost if its slack is shorter than t and column 1
        together, although it is longer than column 1. Those that queue up behind one another are not counted.

        Args:
            run_s: Length of the run [s].
            column_1_s: Predicted latency of column 1 [s].
        """
        if not self.slacks_s or not self.rate_hz:
            return 0.0
        first = bisect_left(self.slacks_s, column_1_s)
        last = bisect_left(self.slacks_s, column_1_s + run_s)
        exposed_s = (last - first) * (run_s + column_1_s) - sum(islice(self.slacks_s, first, last))
        return self.rate_hz * exposed_s / len(self.slacks_s)

    def losses_hz(self, wait_s: float, least_s: float, most_s: float) -> float:
        """How many requests a second to expect that miss their column 1 if each has to wait for so long.

        Column 1 takes any time between the least and the most, one as likely as the other: a short wait makes
        nobody certain to be late, but many likelier to be.

        Args:
            wait_s: Until its run can start [s].
            least_s: The least that column 1 takes [s].
            most_s: The most that it takes; longer than the least [s].

        Cost: some microseconds; of many who are at risk a few stand for all.
        """
        if not self.slacks_s or not self.rate_hz:
            return 0.0
        first = bisect_left(self.slacks_s, least_s)
        last = bisect_left(self.slacks_s, most_s + wait_s)
        stride = (last - first) // N_LOOKED_AT + 1
        lost_s = 0.0
        for slack_s in islice(self.slacks_s, first, last, stride):
            lost_s += min(slack_s, most_s) - max(slack_s - wait_s, least_s)
        return self.rate_hz * lost_s * stride / ((most_s - least_s) * len(self.slacks_s))


NO_TRAFFIC = Traffic()


class TrafficMonitor:
    """Keeps `Traffic` current.

    Args:
        window_s: Time over which the past fades [s]. Larger: steadier, later to see a burst.
        n_slacks: How many of the latest slacks to keep.
    """

    def __init__(self, window_s: float = 0.25, n_slacks: int = 64) -> None:
        self._window_s = window_s
        self._weight = self._weight_waited = 0.0
        self._at_s = 0.0
        self._latest = [0.0] * n_slacks
        self._slacks_s: list[float] = []
        self._n = 0
        self._known = NO_TRAFFIC
        self._known_at_s = -math.inf

    def arrived(self, now_s: float, slack_s: float, *, has_waited: bool = False) -> None:
        """Count a request that was offered, admitted or not.

        Args:
            now_s: Current time [s].
            slack_s: How much time it has left [s].
            has_waited: What reads and answers was at work for others when it came.
        """
        share_left = self._share_left(now_s)
        self._weight = self._weight * share_left + 1.0
        self._weight_waited = self._weight_waited * share_left + has_waited
        self._at_s = now_s
        place = self._n % len(self._latest)
        if self._n >= len(self._latest):
            del self._slacks_s[bisect_left(self._slacks_s, self._latest[place])]
        self._latest[place] = slack_s
        insort(self._slacks_s, slack_s)
        self._n += 1
        self._known_at_s = -math.inf

    def traffic(self, now_s: float) -> Traffic:
        """What to expect now.

        The latest arrival is not counted: whoever asks does so because of it, and one who comes to an idle
        server is no traffic to themselves. Among those who found what answers at work, it is.
        """
        if abs(now_s - self._known_at_s) < SAME_S:
            return self._known
        others = max(0.0, self._weight - 1.0) * self._share_left(now_s)
        rate_hz, busy = others / self._window_s, self._weight_waited / max(1.0, self._weight)
        self._known, self._known_at_s = Traffic(rate_hz, tuple(self._slacks_s), busy), now_s
        return self._known

    def _share_left(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._at_s) / self._window_s)
