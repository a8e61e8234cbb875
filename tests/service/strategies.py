"""Profiles, ladders, queues and traffic: a few by hand, any number at random."""

from collections.abc import Mapping
from itertools import combinations

from hypothesis import strategies as st

from service.ladder import ConfidenceTable, Ladder
from service.latency import Latency, LatencyProfile
from service.waiting import Ticket, Traffic
from tests.fakes import ACCURACY

LADDER = Ladder(("1", "2", "3"), ACCURACY)


def profile_of(
    singles_ms: Mapping[str, float],
    *,
    per_image: float = 1.0,
    high: float = 1.0,
    sizes: tuple[int, ...] = (1, 2, 4),
) -> LatencyProfile:
    """Each further image of a batch costs `per_image` of the first; the high quantile is `high` medians."""
    return LatencyProfile(
        {
            column: {
                n: Latency(median, median * high)
                for n in sizes
                for median in [ms / 1e3 * (1 + per_image * (n - 1))]
            }
            for column, ms in singles_ms.items()
        }
    )


MS = {"1": 1.0, "2": 3.0, "3": 8.0}
NO_GAIN = profile_of(MS)
GAIN = profile_of(MS, per_image=0.1)


def ticket(ready_by_ms: float, *columns_run: str, **fields: float) -> Ticket:
    return Ticket(ready_by_ms / 1e3, columns_run=columns_run, **fields)


COLUMNS = ("1", "2", "3", "4")
SUBSETS = [run for size in range(1, 5) for run in combinations(COLUMNS, size)]
PER_IMAGE = st.floats(0, 1.2)
SIZES = st.sampled_from([(1,), (1, 2, 4), (1, 8)])


@st.composite
def profiles(
    draw: st.DrawFn,
    per_image: st.SearchStrategy[float] = PER_IMAGE,
    sizes: st.SearchStrategy[tuple[int, ...]] = SIZES,
) -> LatencyProfile:
    """Deeper columns are slower, larger batches are no faster; any gain, any spread."""
    costs = sorted(draw(st.lists(st.floats(0.1, 20.0), min_size=4, max_size=4)))
    return profile_of(
        dict(zip(COLUMNS, costs, strict=True)),
        per_image=draw(per_image),
        high=draw(st.floats(1, 3)),
        sizes=draw(sizes),
    )


@st.composite
def tables(draw: st.DrawFn, columns_run: tuple[str, ...]) -> ConfidenceTable:
    """Any accuracies in two to four rows, for some of the combinations that go on from these columns."""
    inner = sorted(draw(st.sets(st.sampled_from([0.3, 0.5, 0.7, 0.9]), min_size=1, max_size=3)))
    n_rows = len(inner) + 1
    rows = st.tuples(*[st.floats(0, 1)] * n_rows)
    further = [run for run in SUBSETS if run[: len(columns_run)] == columns_run and run != columns_run]
    covered = [columns_run, *(sorted(draw(st.sets(st.sampled_from(further)))) if further else ())]
    return ConfidenceTable(
        columns=columns_run,
        edges=(0.0, *inner, 1.0),
        n=draw(st.tuples(*[st.integers(0, 3000)] * n_rows)),
        accuracy={run: draw(rows) for run in covered},
    )


@st.composite
def ladders(draw: st.DrawFn, *, with_tables: bool = True) -> Ladder:
    singles = {(column,) for column in COLUMNS}
    measured = singles | draw(st.sets(st.sampled_from(SUBSETS)))
    tabulated = sorted(draw(st.sets(st.sampled_from(SUBSETS), max_size=4))) if with_tables else ()
    return Ladder(
        COLUMNS,
        {run: draw(st.floats(0.1, 1.0)) for run in sorted(measured)},
        [draw(tables(columns_run)) for columns_run in tabulated],
    )


tickets = st.builds(
    Ticket,
    ready_by_s=st.floats(-0.01, 0.1),
    min_confidence=st.none() | st.floats(0, 1),
    columns_run=st.just(()) | st.sampled_from(SUBSETS),
    confidence=st.floats(0, 1),
    lost_s=st.just(0.0) | st.floats(0, 0.02),
)
queues = st.lists(tickets, max_size=12)
traffics = st.builds(
    Traffic,
    rate_hz=st.just(0.0) | st.floats(0, 1e4),
    slacks_s=st.lists(st.floats(-0.001, 0.1), max_size=8).map(lambda slacks_s: tuple(sorted(slacks_s))),
    busy=st.just(0.0) | st.floats(0, 1),
)
